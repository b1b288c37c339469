# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: one page without network or scripts from elsewhere, made from metrics.jsonl and config.toml."""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mesh_transformer.reports.console import format_time
from mesh_transformer.reports.evaluation_results import Evaluation, draw_evaluations, read_evaluations
from mesh_transformer.reports.expert_load import draw_loads, read_loads
from mesh_transformer.reports.metrics_log import FILE, representative_layers, read_metrics
from mesh_transformer.reports.svg import Series, drawable, format_number, plot
from mesh_transformer.storage.atomic_files import replace_file

EVENTS_SHOWN = 200
ROWS_SHOWN = 20  # of the table of numbers
RAW_POINTS, SMOOTH_POINTS = 500, 200  # drawn of a series; a plot is about 570 units wide
STYLES = ("accent", "second", "third", "fourth")
# name in the metrics, title of the plot, unit, name of the line, logarithmic
TRACES = (
    ("learning_rate", "Learning rate", "by step", "learning rate", False),
    ("grad_norm", "Gradient norm", "before clipping, by step", "norm", True),
    ("tokens_per_s", "Throughput", "tokens per second, by step", "tokens/s", False),
    ("mfu", "Share of the product peak", "model FLOPs, by step", "share", False),
    ("noise_scale", "Noise scale", "sequences, by step", "noise scale", True),
    ("dropped_share", "Choices that found their expert full", "share, by step", "dropped", False),
    ("largest_expert_load", "Largest load of an expert", "multiples of an even one, any layer, by step", "load", False),
    ("unused_experts", "Experts without a token", "in all layers together, by step", "experts", False),
    ("router_entropy", "Entropy of the routers", "nats; undecided: log of how many", "entropy", False),
    ("balance_loss", "Balance loss", "1: even; mean over layers, by step", "loss", False),
    ("router_z_loss", "z loss of the routers", "mean over layers, by step", "loss", False),
)
# No empty plot where it was not measured.
OPTIONAL = {
    "noise_scale", "dropped_share", "largest_expert_load", "unused_experts", "router_entropy", "balance_loss", "router_z_loss",
}  # fmt: skip
Line = Mapping[str, Any]
Points = Sequence[tuple[float, float | None]]


def write_report(run_dir: Path) -> Path:
    """Write report.html into the run folder, whole or not at all; the path. Raises MetricsError for damaged metrics."""
    lines = read_metrics(run_dir / FILE)
    config = run_dir / "config.toml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    page = make_page(run_dir.name, lines, text, read_evaluations(run_dir))
    path = run_dir / "report.html"
    replace_file(path, page.encode("utf-8", errors="replace"))  # texts may hold lone surrogates
    return path


def make_page(
    name: str, lines: Iterable[Line], config: str, evaluations: Mapping[int, Evaluation] | None = None
) -> str:
    """The page of a run; everything that came from outside is escaped, and no script but ours may run."""
    lines = list(lines)
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "evaluation", "event")}
    train, evaluation, events = by_kind["train"], by_kind["evaluation"], by_kind["event"]
    samples = [line for line in events if line.get("event") == "samples"]
    parts = [
        f"<header><h1>{escape(name)}</h1><button type=button id=theme>light / dark</button></header>",
        _headline(lines, train, evaluation),
        _scores(evaluation),
        f'<section class="plots">{"".join(_plots(train, evaluation, events))}</section>',
        draw_evaluations(evaluations or {}),
        _samples(str(samples[-1].get("text", "")) if samples else ""),
        _events([line for line in events if line.get("event") != "samples"]),
        _table(train),
        f"<details><summary>configuration</summary><pre>{escape(config)}</pre></details>",
    ]
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _headline(lines: list[Line], train: list[Line], evaluation: list[Line]) -> str:
    if not train:
        return "<p>no step yet</p>"
    last = train[-1]
    parameters = [number for line in lines if (number := _number(line, "parameters")) is not None]
    figures = [("step", f"{last['step']:,}", ""), ("training loss", _text(_number(last, "loss"), "{:.4f}"), "")]
    for name, line in _last_scores(evaluation).items():
        others = [(tool, _number(line, f"{tool}_bits_per_byte")) for tool in ("gzip", "xz")]
        more = ", ".join(f"{tool} -9: {value:.3f}" for tool, value in others if value is not None)
        figures.append((f"bits per byte, {name}", _text(_number(line, "bits_per_byte"), "{:.3f}"), more))
    figures.append(("tokens per second", _text(_number(last, "tokens_per_s"), "{:,.0f}"), ""))
    figures.append(("of the product peak", _text(_number(last, "mfu"), "{:.0%}"), ""))
    if parameters:
        figures.append(("parameters", format_number(parameters[-1]), ""))
    figures.append(("time", format_time(active_seconds(lines)[-1]), "without interruptions"))
    if loads := [own for layer in read_loads(train) for own in layer]:
        unused = sum(all(not load for load in own) for own in loads)
        figures.append(("experts never used", f"{unused} of {len(loads)}", "in the layers drawn, at any step told of"))
    if _number(last, "skipped"):
        figures.append(("steps skipped", _text(_number(last, "skipped"), "{:,}"), ""))
    tiles = (
        f"<div><dt>{escape(label)}</dt><dd>{value}</dd>{f'<dd class=more>{more}</dd>' if more else ''}</div>"
        for label, value, more in figures
    )
    return f'<dl class="figures">{"".join(tiles)}</dl>'


def active_seconds(lines: Sequence[Line]) -> list[float]:
    """For each line the seconds since the first, less what passed between a line and the resumption after it."""
    passed, before = [0.0], None
    for line in lines:
        time = _number(line, "time")
        more = 0.0 if before is None or time is None or line.get("event") == "resumed" else max(time - before, 0.0)
        passed.append(passed[-1] + more)
        before = before if time is None else time
    return passed[1:] or passed


def _last_scores(evaluation: list[Line]) -> dict[str, Line]:
    return {str(line.get("set", "")): line for line in evaluation}


def _scores(evaluation: list[Line]) -> str:
    rows = []
    for name, line in _last_scores(evaluation).items():
        bars = [("this model", _number(line, "bits_per_byte"), "model")]
        bars += [(f"{tool} -9", _number(line, f"{tool}_bits_per_byte"), "tool") for tool in ("xz", "gzip")]
        shown = [(label, value, style) for label, value, style in bars if value is not None]
        widest = max((value for _, value, _ in shown), default=1.0) or 1.0
        rows.append(f"<h3>{escape(name)}, step {line['step']:,}: loss {_text(_number(line, 'loss'), '{:.4f}')}</h3>")
        rows += [
            f'<div class="bar {style}"><span>{label}</span><i style="width:{60 * value / widest:.1f}%"></i><b>{value:.3f}</b></div>'
            for label, value, style in shown
        ]
    return f"<section><h2>Held-out bits per byte</h2>{''.join(rows)}</section>" if rows else ""


def _plots(train: list[Line], evaluation: list[Line], events: list[Line]) -> list[str]:
    skipped = sorted({line["step"] for line in events if line.get("event") == "skipped"})
    # A skipped step left no trace in the model: it is marked, but its loss does not set the scale of all others.
    losses = _trace("training", _points([line for line in train if line["step"] not in set(skipped)], "loss"))
    bits = []
    for number, name in enumerate(_last_scores(evaluation)):
        style = STYLES[number % len(STYLES)]
        own = [line for line in evaluation if str(line.get("set", "")) == name]
        losses.append(Series(name, downsample(_points(own, "loss"), RAW_POINTS), style, markers=True))
        bits.append(Series(name, downsample(_points(own, "bits_per_byte"), RAW_POINTS), style, markers=True))
    marked = "nats per token, by step" + ("; dashed: skipped" if skipped else "")
    plots = [plot("Loss", marked, losses, marks=skipped), plot("Held-out bits per byte", "by step", bits)]
    for name, title, unit, label, log in TRACES:
        points = _points(train, name)
        if name not in OPTIONAL or any(y is not None for _, y in points):
            plots.append(
                plot(title, unit, _trace(label, points, log=log), log=log, marks=skipped if name == "grad_norm" else ())
            )
    layers = max((len(norms) for line in train if isinstance(norms := line.get("layer_grad_norms"), list)), default=0)
    if layers:
        norms = [
            Series(f"layer {i}", downsample(smooth(_points(train, "layer_grad_norms", i), log=True), SMOOTH_POINTS), style)
            for style, i in zip(STYLES, representative_layers(layers), strict=False)
        ]
        plots.append(plot("Gradient norm of layers", "smoothed, by step", norms, log=True))
    return plots + draw_loads(train)


def _trace(name: str, points: Points, *, log: bool = False) -> list[Series]:
    """A line as measured and, where that is a band rather than a line, smoothed on top of it."""
    if len(points) < 50 or name == "learning rate":
        return [Series(name, downsample(points, RAW_POINTS), "main")]
    smoothed = downsample(smooth(points, log=log), SMOOTH_POINTS)
    return [Series(name, downsample(points, RAW_POINTS), "faint"), Series("smoothed", smoothed, "main")]


def _samples(text: str) -> str:
    if not text:
        return ""
    return f"<section><h2>Samples</h2><pre class=samples>{escape(text)}</pre></section>"


def _events(events: list[Line]) -> str:
    rows = [
        f"<tr><td>{line['step']:,}<td>{escape(str(line.get('event', '')))}<td>{escape(str(line.get('text', '')))}"
        for line in events
    ]
    left_out = f"<p>the last {EVENTS_SHOWN} of {len(rows):,}</p>" if len(rows) > EVENTS_SHOWN else ""
    is_open = " open" if any(line.get("event") == "save failed" for line in events) else ""
    return (
        f"<details{is_open}><summary>events</summary>{left_out}<table><tr><th>step<th>event<th>what"
        f"{''.join(rows[-EVENTS_SHOWN:])}</table></details>"
    )


def _table(train: list[Line]) -> str:
    """The curves for those who do not see them: about ROWS_SHOWN steps, the last among them."""
    names = ["loss", *(name for name, *_ in TRACES if any(name in line for line in train))]
    every = max(math.ceil(len(train) / ROWS_SHOWN), 1)
    rows = (
        f"<tr><td>{line['step']:,}" + "".join(f"<td>{_text(_number(line, name), '{:.4g}')}" for name in names)
        for line in train[::-1][::every][::-1]
    )
    heading = "".join(f"<th>{name.replace('_', ' ')}" for name in ["step", *names])
    return f"<details><summary>numbers</summary><div class=numbers><table><tr>{heading}{''.join(rows)}</table></div></details>"


def _number(line: Line, name: str, item: int | None = None) -> float | None:
    """A value that can be drawn: None for what is missing, no number, or beyond any axis; never denormal."""
    value = line.get(name)
    if item is not None:
        value = value[item] if isinstance(value, list) and item < len(value) else None
    return drawable(value)


def _points(lines: Iterable[Line], name: str, item: int | None = None) -> list[tuple[float, float | None]]:
    return [(line["step"], _number(line, name, item)) for line in lines]


def downsample(points: Points, count: int) -> list[tuple[float, float | None]]:
    """At most about `count` points: of each stretch the lowest and highest, or a gap; and the ends, so that axes reach."""
    if len(points) <= count:
        return list(points)
    stretch = math.ceil(2 * len(points) / count)
    kept: list[tuple[float, float | None]] = [points[0]]
    for start in range(1, len(points) - 1, stretch):
        part = points[start : min(start + stretch, len(points) - 1)]
        valued = [(y, x) for x, y in part if y is not None]
        kept += sorted({(x, y) for y, x in (min(valued), max(valued))}) if valued else [part[0]]
    return [*kept, points[-1]]


def smooth(points: Points, *, log: bool = False) -> list[tuple[float, float | None]]:
    """Mean (geometric if `log`) over about a fiftieth of the points around each, fewer near the start, which is steep."""
    reach = max(len(points) // 100, 2)
    totals, counts = [0.0], [0]
    for _, y in points:
        usable = y is not None and (y > 0 or not log)
        totals.append(totals[-1] + ((math.log(y) if log else y) if y is not None and usable else 0.0))
        counts.append(counts[-1] + usable)
    smoothed: list[tuple[float, float | None]] = []
    for i, (x, _) in enumerate(points):
        near = min(i // 4, reach)
        first, end = i - near, min(i + near + 1, len(points))
        count = counts[end] - counts[first]
        mean = (totals[end] - totals[first]) / max(count, 1)
        smoothed.append((x, (math.exp(mean) if log else mean) if count else None))
    return smoothed


def _text(value: float | None, form: str) -> str:
    return format_number(None) if value is None else form.format(value)


CSS = """
:root{color-scheme:light dark;--back:#fbfbfa;--card:#fff;--ink:#1d1f23;--dim:#686e78;--rule:#e4e5e8;--main:#3056d3;
--faint:#aab8e8;--accent:#d1495b;--second:#0f8b6d;--third:#b7791f;--fourth:#7b4fb5;--mark:#e8a33d}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){--back:#14161a;--card:#1c1f25;--ink:#e8eaee;--dim:#9aa1ad;
--rule:#2e323a;--main:#8aa4ff;--faint:#43508a;--accent:#ff8896;--second:#54c9a8;--third:#e7b355;--fourth:#c19bf0;
--mark:#8f6a24}}
:root[data-theme=dark]{color-scheme:dark;--back:#14161a;--card:#1c1f25;--ink:#e8eaee;--dim:#9aa1ad;--rule:#2e323a;
--main:#8aa4ff;--faint:#43508a;--accent:#ff8896;--second:#54c9a8;--third:#e7b355;--fourth:#c19bf0;--mark:#8f6a24}
:root[data-theme=light]{color-scheme:light}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
header{display:flex;justify-content:space-between;align-items:center}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:17px;margin:30px 0 8px}
h3{font-size:14px;margin:10px 0 6px;font-weight:500}
button{font:inherit;font-size:13px;color:var(--dim);background:var(--card);border:1px solid var(--rule);border-radius:6px;
padding:4px 10px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(125px,1fr));gap:12px;margin:20px 0}
.figures>div{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:10px 14px}
dt{color:var(--dim);font-size:13px;overflow-wrap:anywhere}
dd{margin:2px 0 0;font-size:21px;font-variant-numeric:tabular-nums;white-space:nowrap}
dd.more{font-size:12px;color:var(--dim);white-space:normal}
.bar{display:flex;align-items:center;gap:10px;font-size:14px;margin:3px 0}.bar span{width:84px;color:var(--dim)}
.bar i{height:14px;border-radius:3px;background:var(--rule)}.bar.model i{background:var(--main)}.bar b{font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px;margin-top:24px}
.plot{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px 10px;min-width:0}
figcaption{display:flex;justify-content:space-between;gap:8px;margin-bottom:4px}
figcaption span{color:var(--dim);font-size:13px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--dim);font-size:12px;font-variant-numeric:tabular-nums}
.pointer[x1="-9"]{display:none}
svg path{fill:none;stroke-width:1.8;stroke-linejoin:round}
.map path{stroke:none}path.more{fill:var(--accent)}path.less{fill:var(--main)}.frame{fill:none;stroke:var(--rule)}
.heat::before{content:"";display:inline-block;width:12px;height:12px;border:1px solid var(--rule);margin-right:6px;
vertical-align:-2px;background:color-mix(in srgb,var(--main) calc(100%*var(--share)),transparent)}
.heat.more::before{background:color-mix(in srgb,var(--accent) calc(100%*var(--share)),transparent)}
.grid{stroke:var(--rule)}
.mark{stroke:var(--mark);stroke-dasharray:3 3}
.pointer{stroke:var(--dim);stroke-width:1}path.faint{stroke:var(--faint);stroke-width:1}
path.main{stroke:var(--main)}path.accent{stroke:var(--accent)}path.second{stroke:var(--second)}
path.third{stroke:var(--third)}path.dashed{stroke-dasharray:6 4}path.dotted{stroke-dasharray:2 3}
path.fourth{stroke:var(--fourth)}circle.faint,circle.main{fill:var(--main)}circle.accent{fill:var(--accent)}
circle.second{fill:var(--second)}circle.third{fill:var(--third)}circle.fourth{fill:var(--fourth)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--dim);min-height:21px}
.key::before{content:"";display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:6px;vertical-align:3px;
background:var(--main)}
.key.faint::before{background:var(--faint)}.key.accent::before{background:var(--accent)}
.key.second::before{background:var(--second)}
.key.third::before{background:var(--third)}.key.fourth::before{background:var(--fourth)}
.key.dashed::before{mask:linear-gradient(90deg,#000 5px,#0000 5px 7px,#000 7px)}
.key.dotted::before{mask:repeating-linear-gradient(90deg,#000 0 2px,#0000 2px 5px)}
output{margin-left:auto;color:var(--ink)}
.nothing{color:var(--dim);text-align:center;padding:70px 0}pre{overflow:auto;font-size:13px;line-height:1.45}
.samples,details{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 16px}
.samples{white-space:pre-wrap;overflow-wrap:anywhere}details{margin-top:16px}summary{cursor:pointer;font-weight:600}
table{border-collapse:collapse;font-size:13px;width:100%}
td,th{text-align:left;padding:3px 12px 3px 0;vertical-align:top;overflow-wrap:anywhere}
.scores tr:nth-child(even){background:color-mix(in srgb,var(--rule) 35%,transparent)}
.scores td:first-child,.scores th:first-child{text-align:left}
.numbers{overflow-x:auto}.numbers td,.numbers th{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
:focus-visible{outline:2px solid var(--main);outline-offset:2px}
@media(max-width:560px){svg text{font-size:19px}.plot{padding-left:24px}main{padding:18px 12px 40px}
figcaption{flex-wrap:wrap}}
@media print{button{display:none}.plot{break-inside:avoid}}
"""

SCRIPT = """
const root=document.documentElement,wanted=new URLSearchParams(location.search).get('theme');
if(wanted)root.dataset.theme=wanted;
document.getElementById('theme').onclick=()=>{const dark=root.dataset.theme?root.dataset.theme==='dark':
matchMedia('(prefers-color-scheme: dark)').matches;root.dataset.theme=dark?'light':'dark'};
for(const svg of document.querySelectorAll('svg[data-plot]')){const data=JSON.parse(svg.dataset.plot),[low,high]=data.x;
const out=svg.parentNode.querySelector('output'),pointer=svg.querySelector('.pointer'),left=58,right=626;
svg.onpointermove=event=>{const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)/box.width*640;
const at=low+(Math.min(Math.max(x,left),right)-left)/(right-left)*(high-low);let step=null;
const texts=data.series.map(one=>{let best=one.points[0];for(const point of one.points)
if(Math.abs(point[0]-at)<Math.abs(best[0]-at))best=point;step??=best[0];return one.name+' '+Number(best[1].toPrecision(4))});
pointer.setAttribute('x1',left+(step-low)/(high-low||1)*(right-left));pointer.setAttribute('x2',pointer.getAttribute('x1'));
out.textContent='step '+step+': '+texts.join(', ')};
svg.onpointerleave=()=>{out.textContent='';pointer.setAttribute('x1',-9);pointer.setAttribute('x2',-9)}}
"""
