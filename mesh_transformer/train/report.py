# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: one page without network or scripts from elsewhere, made from metrics.jsonl and config.toml."""

import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from mesh_transformer.train.metrics import FILE, read_metrics
from mesh_transformer.train.plot import Series, format_number, plot

EVENTS_SHOWN = 200
STYLES = ("accent", "second", "third", "fourth")
Line = Mapping[str, Any]


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run folder, whole or not at all; the path."""
    lines = read_metrics(run_dir / FILE)
    config = run_dir / "config.toml"
    page = make_page(run_dir.name, lines, config.read_text(encoding="utf-8") if config.exists() else "")
    path, temporary = run_dir / "report.html", run_dir / f"report.html.tmp-{os.getpid()}"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def make_page(name: str, lines: Iterable[Line], config: str) -> str:
    """The page of a run; everything that came from outside is escaped."""
    lines = list(lines)
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "evaluation", "event")}
    train, evaluation, events = by_kind["train"], by_kind["evaluation"], by_kind["event"]
    samples = [line for line in events if line["event"] == "samples"]
    parts = [
        f"<header><h1>{escape(name)}</h1><button type=button id=theme>light / dark</button></header>",
        _headline(train, evaluation),
        _scores(evaluation),
        f'<section class="plots">{"".join(_plots(train, evaluation, events))}</section>',
        _samples(samples[-1]["text"] if samples else ""),
        _events(line for line in events if line["event"] != "samples"),
        f"<details><summary>configuration</summary><pre>{escape(config)}</pre></details>",
    ]
    title = escape(name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_read("report.css")}</style></head>'
        f"<body><main>{''.join(parts)}</main><script>{_read('report.js')}</script></body></html>\n"
    )


def _headline(train: list[Line], evaluation: list[Line]) -> str:
    if not train:
        return "<p>no step yet</p>"
    last = train[-1]
    seconds = last["time"] - train[0]["time"]
    figures = [("step", f"{last['step']:,}"), ("training loss", _text(last.get("loss"), "{:.4f}"))]
    if evaluation:
        figures.append(("held-out bits per byte", _text(evaluation[-1].get("bits_per_byte"), "{:.3f}")))
    figures.append(("tokens per second", _text(last.get("tokens_per_s"), "{:,.0f}")))
    figures.append(("of the product peak", _text(last.get("mfu"), "{:.0%}")))
    figures.append(("between first and last line", f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"))
    if last.get("skipped"):
        figures.append(("steps skipped", str(last["skipped"])))
    return (
        '<dl class="figures">'
        + "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures)
        + "</dl>"
    )


def _scores(evaluation: list[Line]) -> str:
    last = {line["set"]: line for line in evaluation}
    if not last:
        return ""
    rows = []
    for name, line in last.items():
        bars = [("this model", line.get("bits_per_byte"), "model")]
        bars += [(f"{tool} -9", line.get(f"{tool}_bits_per_byte"), "tool") for tool in ("xz", "gzip")]
        shown = [(label, value, style) for label, value, style in bars if value is not None]
        widest = max((value for _, value, _ in shown), default=1.0)
        rows.append(f"<h3>{escape(name)}, step {line['step']:,}: loss {_text(line.get('loss'), '{:.4f}')}</h3>")
        rows += [
            f'<div class="bar {style}"><span>{label}</span><i style="width:{60 * value / widest:.1f}%"></i><b>{value:.3f}</b></div>'
            for label, value, style in shown
        ]
    return f"<section><h2>Held-out bits per byte</h2>{''.join(rows)}</section>"


def _plots(train: list[Line], evaluation: list[Line], events: list[Line]) -> list[str]:
    skipped = sorted({line["step"] for line in events if line["event"] == "skipped"})
    sets = dict.fromkeys(line["set"] for line in evaluation)
    loss = _points(train, "loss")
    losses = [Series("training", loss, "faint"), Series("smoothed", _smooth(loss), "main")]
    bits = []
    for style, name in zip(STYLES, sets, strict=False):
        own = [line for line in evaluation if line["set"] == name]
        losses.append(Series(name, _points(own, "loss"), style, markers=True))
        bits.append(Series(name, _points(own, "bits_per_byte"), style, markers=True))
    plots = [
        plot("Loss", "nats per token, by step", losses, marks=skipped),
        plot("Held-out bits per byte", "by step", bits),
        plot("Learning rate", "by step", [Series("learning rate", _points(train, "learning_rate"), "main")]),
        plot(
            "Gradient norm",
            "before clipping, by step",
            [Series("norm", _points(train, "grad_norm"), "main")],
            log=True,
            marks=skipped,
        ),
        plot("Throughput", "tokens per second, by step", [Series("tokens/s", _points(train, "tokens_per_s"), "main")]),
        plot("Share of the product peak", "model FLOPs, by step", [Series("share", _points(train, "mfu"), "main")]),
    ]
    if any("noise_scale" in line for line in train):
        plots.append(
            plot(
                "Noise scale",
                "sequences, by step",
                [Series("noise scale", _points(train, "noise_scale"), "main")],
                log=True,
            )
        )
    if any("layer_grad_norms" in line for line in train):
        layers = len(train[-1]["layer_grad_norms"])
        picked = sorted({0, layers // 3, 2 * layers // 3, layers - 1})
        norms = [
            Series(f"layer {i}", [(line["step"], line["layer_grad_norms"][i]) for line in train], style)
            for style, i in zip(STYLES, picked, strict=False)
        ]
        plots.append(plot("Gradient norm of layers", "by step", norms, log=True))
    return plots


def _samples(text: str) -> str:
    if not text:
        return ""
    return f"<section><h2>Samples</h2><pre class=samples>{escape(text)}</pre></section>"


def _events(events: Iterable[Line]) -> str:
    rows = [f"<tr><td>{line['step']:,}<td>{escape(line['event'])}<td>{escape(line['text'])}" for line in events]
    left_out = f"<p>the last {EVENTS_SHOWN} of {len(rows):,}</p>" if len(rows) > EVENTS_SHOWN else ""
    return (
        f"<details><summary>events</summary>{left_out}<table><tr><th>step<th>event<th>what"
        f"{''.join(rows[-EVENTS_SHOWN:])}</table></details>"
    )


def _points(lines: Iterable[Line], name: str) -> list[tuple[float, float | None]]:
    return [(line["step"], line.get(name)) for line in lines]


def _smooth(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Exponential average over about a twentieth of the points, without the bias of its start."""
    keep = 1.0 - 1.0 / max(len(points) / 20, 2.0)
    total = weight = 0.0
    smoothed: list[tuple[float, float | None]] = []
    for x, y in points:
        if y is not None:
            total, weight = keep * total + y, keep * weight + 1.0
        smoothed.append((x, total / weight if weight else None))
    return smoothed


def _text(value: float | None, form: str) -> str:
    return format_number(None) if value is None else form.format(value)


def _read(name: str) -> str:
    """A file beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
