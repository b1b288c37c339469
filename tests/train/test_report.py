# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The report survives hostile strings and odd numbers; the display and the plots say what they should."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mesh_transformer.train.metrics import FILE
from mesh_transformer.train.plot import MAX_POINTS, Series, format_number, make_axis, plot
from mesh_transformer.train.progress import Progress
from mesh_transformer.train.report import make_page, write_report

HOSTILE = "</script><img src=x onerror=alert(1)> ' \" & <b>"


class Tags(HTMLParser):
    """Collects start tags and attributes, as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def train_line(step, **values):
    return {"time": float(step), "step": step, "kind": "train", "loss": 3.0 / step, "grad_norm": 1.0, **values}


def test_hostile_strings_stay_text():
    lines = [
        train_line(1),
        {"time": 1.0, "step": 1, "kind": "evaluation", "set": HOSTILE, "loss": 1.0, "bits_per_byte": 1.5},
        {"time": 1.0, "step": 1, "kind": "event", "event": HOSTILE, "text": HOSTILE},
        {"time": 1.0, "step": 1, "kind": "event", "event": "samples", "text": HOSTILE},
    ]
    tags = parse(make_page(HOSTILE, lines, HOSTILE)).found
    assert not [tag for tag, attributes in tags if tag == "img" or any(name.startswith("on") for name in attributes)]
    assert [tag for tag, _ in tags].count("script") == 1
    plots = [json.loads(attributes["data-plot"] or "") for _, attributes in tags if "data-plot" in attributes]
    assert any(series["name"] == HOSTILE for data in plots for series in data["series"])
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", make_page("run", lines, ""))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [train_line(1)],
        [train_line(1, loss=None, grad_norm=None), train_line(2, loss=None, grad_norm=None)],
        [train_line(i, grad_norm=10.0 ** (i - 8), loss=10.0 ** (8 - i)) for i in range(1, 17)],
        [train_line(1, loss=2.0), train_line(2, loss=2.0)],
        [train_line(i, noise_scale=None if i % 2 else 5.0, layer_grad_norms=[1.0, 0.0]) for i in range(1, 9)],
    ],
    ids=["none", "one", "null", "wide", "flat", "gaps"],
)
def test_odd_numbers_make_a_page(lines):
    page = make_page("run", lines, "")
    assert "nan" not in page.lower().replace("</nav", "")
    assert len(parse(page).found) > 10


def test_a_long_run_stays_small_and_keeps_its_extremes(tmp_path):
    lines = [train_line(i, learning_rate=1e-3, tokens_per_s=1e4, mfu=0.5) for i in range(1, 20_001)]
    lines[777]["grad_norm"] = 987.0
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_report(tmp_path)
    assert path.stat().st_size < 400_000
    assert "987.0" in path.read_text()
    assert sorted(item.name for item in tmp_path.iterdir()) == [FILE, "report.html"]
    drawn = plot("t", "u", [Series("s", [(i, float(i % 7)) for i in range(50_000)], "main")])
    assert drawn.count("L") <= 1.1 * MAX_POINTS


def test_ticks_are_round_and_cover_the_data():
    axis = make_axis(0.13, 4.87)
    assert axis.ticks == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (axis.place(axis.low), axis.place(axis.high)) == (0.0, 1.0)
    assert make_axis(1e-6, 6e-4).ticks[-1] == pytest.approx(6e-4)
    log = make_axis(0.02, 300.0, log=True)
    assert all(0 <= log.place(tick) <= 1 for tick in log.ticks)
    assert 3 <= len(log.ticks) <= 8
    assert [format_number(x) for x in (0, 1234.5, 2e6, 6e-05, 0.5)] == ["0", "1.234k", "2M", "6e-05", "0.5"]


def test_plain_output_is_one_line_an_update():
    text = io.StringIO()
    with Progress("run", 20, 0, console=Console(file=text, width=60)) as progress:
        progress.update(10, {"loss": 2.5, "learning_rate": 1e-3, "tokens_per_s": 12345.6, "mfu": 0.5, "skipped": 0})
        progress.note("step 11 skipped: " + "x" * 100)
        progress.update(20, {"books_bits_per_byte": 1.25, "skipped": 3})
    first, note, last = text.getvalue().splitlines()
    assert re.fullmatch(
        r"step 10/20  loss 2\.5000  learning rate 1\.00e-03  tokens/s 12,346  of product peak 50%(  0m\d\ds left)?", first
    )
    assert note == "step 11 skipped: " + "x" * 100
    assert last == "step 20/20  skipped 3  books bits/byte 1.2500"
