# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The HTML report: complete, small, self-contained, and safe against hostile or missing values."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mesh_transformer.reports.html_report import make_page, write_report
from mesh_transformer.reports.metrics_log import FILE, MetricsError

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='alert(1) & \ud800\x00"
VOID = {"meta", "line", "circle", "path", "rect", "img", "td", "th", "tr", "br"}


class Page(HTMLParser):
    """Parsed page: elements, attributes, and the text of each kind of element."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        tag = self._open[-1] if self._open else ""
        self.text[tag] = self.text.get(tag, "") + data

    def plots(self) -> list[dict]:
        return [json.loads(value) for _, name, value in self.attributes if name == "data-plot" and value]


def train_line(step: int, **values) -> dict:
    usual = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1e5, "mfu": 0.4, "skipped": 0}
    return {"step": step, "kind": "train", "time": 1e9 + step, **usual, **values}


def event(step: int, name: str, text: str = "", **values) -> dict:
    return {"step": step, "kind": "event", "time": 1e9 + step, "event": name, "text": text, **values}


def evaluation(step: int, name: str, **values) -> dict:
    return {"step": step, "kind": "evaluation", "time": 1e9 + step, "set": name, **values}


def find_points(page: Page, plot: int, name: str) -> list[list[float]]:
    (found,) = (series["points"] for series in page.plots()[plot]["series"] if series["name"] == name)
    return found


def test_a_run_of_ten_thousand_points_is_small_and_complete(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(10_000, 4)).tolist()
    lines = [
        train_line(
            step,
            loss=2 + abs(a),
            grad_norm=math.exp(b),
            tokens_per_s=1e5 + 1e3 * c,
            mfu=0.4 + d / 100,
            noise_scale=math.exp(d),
            layer_grad_norms=[math.exp(a)] * 12,
        )
        for step, (a, b, c, d) in enumerate(noise, start=1)
    ]
    lines += [
        evaluation(10_000, "stdlib", loss=1.1, bits_per_byte=1.473, gzip_bits_per_byte=2.031, xz_bits_per_byte=1.752)
    ]
    lines += [event(10_000, "samples", "def main():"), event(0, "started", parameters=124_439_808)]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.toml").write_text("[train]\nsteps = 10_000\n")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 300_000
    assert {file.name for file in tmp_path.iterdir()} == {FILE, "config.toml", "report.html"}, (
        "no temporary file is left"
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.text["dd"].count("1.473") == 1
    for expected in ("gzip -9: 2.031", "xz -9: 1.752", "124.4M", "10,000", "2:46:39"):
        assert expected in page.text["dd"]
    assert "steps = 10_000" in page.text["pre"]
    assert "def main():" in page.text["pre"]
    loss = find_points(page, 0, "training")
    assert loss[0][0] == 1
    assert loss[-1][0] == 10_000, "the axis ends at the last step"
    assert max(y for _, y in loss) == pytest.approx(
        max(line["loss"] for line in lines if line["kind"] == "train"), abs=1e-5
    )


def test_the_page_is_self_contained_and_runs_only_its_own_script():
    text = make_page("run", [train_line(1)], "")
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("//-", ""))
    assert not [name for _, name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    (policy,) = (
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "src" in str(value)
    )
    assert "default-src 'none'" in str(policy)
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'$", str(policy))


def test_hostile_text_is_escaped(tmp_path):
    lines = [
        train_line(1, loss=HOSTILE, grad_norm={"a": HOSTILE}, mfu=True, skipped=HOSTILE),
        train_line(2, layer_grad_norms=[HOSTILE, 1.0]),
        evaluation(2, HOSTILE, loss=1.0, bits_per_byte=1.0, xz_bits_per_byte=HOSTILE),
        event(2, HOSTILE, HOSTILE),
        event(2, "samples", HOSTILE),
        event(2, "started", parameters=HOSTILE),
        {"step": 2, "kind": "event"},
        {"step": 2, "kind": "evaluation"},
        {"step": 2, "kind": HOSTILE},
    ]
    harmless = [line if "set" not in line else {**line, "set": "web"} for line in lines]
    harmless = [
        {**line, **({"event": "other", "text": ""} if line.get("event") == HOSTILE else {})} for line in harmless
    ]
    page, plain = Page(make_page(HOSTILE, lines, HOSTILE)), Page(make_page("run", harmless, ""))
    assert page.tags == plain.tags, "text never adds elements"
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in plain.attributes]
    assert page.text["script"] == plain.text["script"]
    assert page.text["pre"].count("<script>alert(1)</script>") == 2
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "\ud800" not in write_report(tmp_path).read_text(encoding="utf-8")


NAMES = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "noise_scale")


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [None],
        [0.0, 0.0],
        [None, 1.0, None],
        [float("nan"), float("inf"), -float("inf")],
        [-3.0, 3.0],
        [1e-300, 1e300, 1.7e308, -1.7e308],
        [5e-324, 1.0],
        [3.4e38, 1e-38],
        [123456.0, 123456.0000001],
        [10**400, 1],
    ],
    ids=str,
)
def test_any_numbers_make_a_page_of_finite_coordinates(values):
    lines = [
        train_line(i + 1, **dict.fromkeys(NAMES, value), layer_grad_norms=[value]) for i, value in enumerate(values)
    ]
    lines += [evaluation(i + 1, "web", loss=value, bits_per_byte=value) for i, value in enumerate(values)]
    text = make_page("run", lines, "")
    Page(text)
    drawn = "".join(re.findall(r'(?:\bd|cx|cy|x1|x2|y1|y2|style)="([^"]*)"', text))
    assert not re.search(r"nan|inf", drawn, re.IGNORECASE)
    for number in re.findall(r'(?:cx|cy|x1|x2|y1|y2)="(-?[\d.]+)"', text):
        assert -10 <= float(number) <= 641


def test_experts_have_heat_maps_and_idle_ones_are_counted():
    one, other = [[2.0, 1.0, 1.0, 0.0], [1.5, 1.5, 1.0, 0.0]], [[1.0] * 4, [4.0, 0.0, 0.0, 0.0]]
    loads = [*map(list, zip(one, other, strict=True)), [[HOSTILE, None, 1e400], [0.0, 0.0, 0.0, 0.0]], HOSTILE, [2.0]]
    lines = [
        train_line(i + 1, expert_load=load, dropped_fraction=0.1, router_entropy=1.2) for i, load in enumerate(loads)
    ]
    text = make_page("run", lines, "")
    page = Page(text)
    assert text.count('class="map"') == 2
    assert "1 of 8" in page.text["dd"], "idle in one layer, used in the other"
    for title in (
        "Expert load, first layer",
        "Expert load, last layer",
        "Dropped tokens",
        "Router entropy",
    ):
        assert title in page.text["b"]
    assert "Load-balancing loss" not in page.text["b"], "it was not logged"
    assert "Expert load" not in " ".join(Page(make_page("run", [train_line(1)], "")).text["b"])


def test_a_skipped_step_is_marked_but_does_not_set_the_scale():
    lines = [train_line(step, loss=2.0 + step / 100, grad_norm=1.0) for step in range(1, 21)]
    lines[9] = train_line(10, loss=900.0, grad_norm=800.0)
    unmarked = Page(make_page("run", lines, ""))
    assert max(y for _, y in find_points(unmarked, 0, "training")) == 900.0
    marked = make_page("run", [*lines, event(10, "skipped", "step 9 skipped")], "")
    assert max(y for _, y in find_points(Page(marked), 0, "training")) == 2.2
    assert max(y for _, y in find_points(Page(marked), 2, "norm")) == 800.0, (
        "the gradient norm of a skipped step is plotted"
    )
    assert marked.count('class="mark"') == 2


def test_time_excludes_interruptions():
    lines = [train_line(1), train_line(61), {**event(61, "resumed"), "time": 2e9}, {**train_line(62), "time": 2e9 + 5}]
    assert "<dd>1:05</dd>" in make_page("run", lines, "")


def test_every_validation_set_has_a_curve_and_its_latest_score():
    names = [f"set{i}" for i in range(6)]
    lines = [evaluation(s, name, loss=1.0, bits_per_byte=3.0 / s + i) for s in (1, 2) for i, name in enumerate(names)]
    page = Page(make_page("run", [train_line(1), *lines], ""))
    assert [series["name"] for series in page.plots()[1]["series"]] == names
    assert "1.500" in page.text["dd"]
    assert "3.000" not in page.text["dd"]


def test_missing_and_damaged_metrics(tmp_path):
    assert "no training step logged yet" in write_report(tmp_path).read_text()
    (tmp_path / FILE).write_text("nonsense\n")
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:1"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
