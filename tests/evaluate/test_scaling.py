# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A known law is found again, with errors that mean something; runs side by side, from their own files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mesh_transformer.config import ConfigError, TrackConfig, load_config
from mesh_transformer.evaluate.scaling import fit_law
from mesh_transformer.reports.metrics_log import MetricsLog
from mesh_transformer.reports.svg import Series, plot

COMPUTE = np.geomspace(1e15, 1e19, 9)


def law(compute: np.ndarray) -> np.ndarray:
    return 2.5 * (compute / 1e15) ** -0.2 + 1.7


def test_a_law_without_noise_is_found_exactly():
    fit = fit_law(COMPUTE[::-1], law(COMPUTE)[::-1])
    assert fit is not None
    assert (fit.a, fit.b, fit.c, fit.c0) == pytest.approx((2.5, 0.2, 1.7, 1e15), rel=1e-4)
    assert fit.rms < 1e-6
    assert fit.last_error == pytest.approx(0, abs=1e-5)
    assert fit(1e20) == pytest.approx(float(law(np.array(1e20))), rel=1e-4)


def test_errors_cover_noise():
    """About two thirds of noisy samples lie within a standard error of the true value."""
    rng = np.random.default_rng(0)
    within = []
    for _ in range(50):
        fit = fit_law(COMPUTE, law(COMPUTE) + rng.normal(size=9) * 0.01)
        assert fit is not None
        within.append(abs(fit.b - 0.2) < fit.errors[1])
    assert 24 <= sum(within) <= 43


@pytest.mark.parametrize(
    ("compute", "losses"),
    [([1, 2, 3], [3, 2, 1]), ([1, 2, 4, 8], [1, 2, 3, 4]), ([0, 1, 2, 3], [4, 3, 2, 1]), ([1, 1, 1, 1], [4, 3, 2, 1])],
)
def test_no_law_for_few_or_rising_losses(compute, losses):
    assert fit_law(compute, losses) is None


def test_a_logarithmic_axis_spaces_powers_evenly():
    drawn = plot("Loss", "nats", [Series("run", [(1, 1.0), (100, 2.0), (10_000, 3.0)], "main")], log_x=True)
    path = drawn.split('class="main" d="M')[1].split('"')[0]
    x = [float(point.split()[0]) for point in path.split("L")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


def make_run(folder: Path, d_model: int, loss: float) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(f"""
[model]
n_layers = 1
d_model = {d_model}
n_heads = 1
n_vocab = 32
seq_len = 16
[data.train.x]
path = "x"
[train]
steps = 40
batch_size = 4
""")
    with MetricsLog(folder, TrackConfig(), config={}, first_step=0) as log:
        log.event(0, "started", "", {"parameters": 12 * d_model * d_model})
        for step in range(1, 41):
            log.train(step, {"loss": loss + 2 / step})
        log.evaluation(40, "held", {"loss": loss, "bits_per_byte": loss / 2})
    return folder


@pytest.fixture(scope="module")
def compare(load_script):
    return load_script("compare_runs")


def test_runs_are_compared(compare, tmp_path, capsys):
    sizes = (8, 16, 24, 48)
    runs = [make_run(tmp_path / f"d{d}", d, 2 + 4 * d**-0.5) for d in sizes]
    page = tmp_path / "compare.html"
    assert compare.main([*map(str, runs), "--output", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    flops = [run["flops"] for run in found["runs"]]
    assert flops == sorted(flops)
    # 6 FLOPs for each weight and token, and attention's scores
    config = load_config(runs[-1] / "config.toml")
    weights = 12 * 48**2 + 32 * 48
    assert flops[-1] == pytest.approx(40 * 4 * (6 * 16 * weights + 12 * 16 * 16 * 48), rel=0.1)
    assert found["runs"][0]["tokens"] == 40 * 4 * config.model.seq_len
    assert [point[1] for point in found["points"]] == pytest.approx([2 + 4 * d**-0.5 for d in sizes])
    assert found["law"]["rms"] < 0.01
    text = page.read_text()
    for words in (
        "Loss against tokens",
        "Loss against FLOPs",
        "Loss against time",
        "Held-out bits per byte, held",
        "law",
    ):
        assert words in text
    assert compare.main([*map(str, runs[:2]), "--output", str(page)]) == 0
    out = capsys.readouterr().out
    assert "at least 4 are needed" in out
    assert "held bits/byte" in out


def test_a_folder_without_training_is_an_error(compare, tmp_path):
    with pytest.raises(ConfigError, match="not a trained run"):
        compare.main([str(tmp_path), "--output", str(tmp_path / "page.html")])


def test_time_excludes_interruptions(compare, tmp_path):
    run = make_run(tmp_path / "run", 8, 2.0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["time"] = 100.0 + i
    for line in lines[20:]:
        line["time"] += 5000.0
    lines.insert(20, {"step": 19, "kind": "event", "event": "resumed", "text": "", "time": 5119.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = compare.read_history(run, "run")
    assert history.seconds[-1] == pytest.approx(39.5, abs=0.6)
    assert not math.isnan(history.parameters)
