# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A verdict as a page of text and as one JSON object."""

from collections.abc import Sequence
from typing import Any

from mesh_transformer.plan.estimate import LABEL
from mesh_transformer.plan.fit import Cost, Plan
from mesh_transformer.plan.job import CompiledStats, Traffic

MIB, GIB, GB = 2**20, 2**30, 10**9


def format_plan(verdict: Plan) -> str:
    """The plan as people read it."""
    measured = verdict.stats
    parts = [_heading(measured), _memory(verdict)]
    if measured.bytes_by_kind.get("cache") is None:
        parts.append(_training(verdict))
    else:
        parts.append(_sampling(verdict))
    if verdict.roofline:
        parts.append(_times(verdict))
    if measured.traffic:
        parts.append(_traffic(measured.traffic))
    if measured.state_bytes:
        parts.append(_storage(verdict))
    if verdict.encode:
        parts += [
            "before that, once for all rows, the encoder reads and the first tokens are drawn",
            _memory(verdict.encode),
        ]
        parts += [_times(verdict.encode)] if verdict.encode.roofline else []
    parts += [f"note: {note}" for note in verdict.notes]
    return "\n\n".join(parts)


def format_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows with columns of equal width: the first `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_ms(seconds: float) -> str:
    """Milliseconds with three digits, or all that lie before the point."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def describe_mesh(sizes: dict[str, int]) -> str:
    """The axes of more than one device."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def describe_fit(verdict: Plan) -> str:
    """Yes or no, and by how much."""
    memory = verdict.memory
    if memory.fits is None or memory.usable is None:
        return "not judged: what these devices hold is not known"
    spare = memory.usable - memory.peak
    share = abs(spare) / memory.usable
    if not memory.fits:
        return f"no: {-spare / GIB:,.2f} GiB ({share:.0%}) too much"
    return f"yes: {spare / GIB:,.2f} GiB ({share:.0%}) to spare"


def _heading(measured: CompiledStats) -> str:
    how = measured.compiler if measured.compiler == LABEL else f"compiled by {measured.compiler}"
    how += f" in {measured.compile_seconds:.0f} s" if measured.compile_seconds else ""
    mesh = describe_mesh(measured.mesh)
    return (
        f"{measured.topology}: {measured.devices:,} device(s), mesh {mesh}; {measured.parameters:,} parameters\n{how}"
    )


def _memory(verdict: Plan) -> str:
    memory = verdict.memory
    name, unit = ("GiB", GIB) if memory.peak >= GIB else ("MiB", MIB)
    rows = [("memory of each device", name)]
    rows += [
        (kind, f"{size / unit:,.2f}") for kind, size in memory.bytes_by_kind.items() if size or kind == "parameters"
    ]
    peak = "peak" if not verdict.stats.compiler_error else "needed, in the compiler's words"
    rows.append((peak, f"{memory.peak / unit:,.2f}"))
    if memory.usable is not None:
        rows.append(("usable", f"{memory.usable / unit:,.2f}"))
    text = format_table(rows) + f"\nfits: {describe_fit(verdict)}"
    return text + (f"\n{verdict.stats.compiler_error}" if verdict.stats.compiler_error else "")


def _training(verdict: Plan) -> str:
    measured = verdict.stats
    again = measured.hardware_flops / measured.flops - 1 if measured.flops else 0.0
    rows = [
        ("tokens a step", f"{measured.tokens:,}"),
        ("model FLOPs a step", f"{measured.flops:.4g}"),
        ("hardware FLOPs a step", f"{measured.hardware_flops:.4g} ({again:.0%} computed again)"),
    ]
    return format_table(rows, left=2)


def _sampling(verdict: Plan) -> str:
    measured, job = verdict.stats, verdict.stats.bytes_by_kind
    rows = [
        ("rows", f"{measured.tokens:,}"),
        ("cache of all devices", f"{job['cache'] * measured.devices / GIB:,.2f} GiB at most (replicas included)"),
        ("FLOPs for a token of every row", f"{measured.flops:.4g}"),
    ]
    if verdict.roofline:
        rows.append(("tokens/s at most, all rows", f"{measured.tokens / verdict.roofline.lower_bound:,.0f}"))
        rows.append(("tokens/s at most, each row", f"{1 / verdict.roofline.lower_bound:,.1f}"))
        rows.append(("  if nothing overlaps", f"{1 / verdict.roofline.upper_bound:,.1f}"))
    return format_table(rows, left=2)


def _times(verdict: Plan) -> str:
    roofline, cost = verdict.roofline, verdict.cost
    assert roofline is not None
    rows = [("roofline of a step", "ms", "")]
    for name, seconds in sorted(roofline.terms.items(), key=lambda term: -term[1]):
        rows.append((name, format_ms(seconds), "<- bound" if name == roofline.bound else ""))
    rows.append(("at least, all else hidden", format_ms(roofline.lower_bound), f"MFU {verdict.mfu:.0%}"))
    rows.append(("if nothing overlaps", format_ms(roofline.upper_bound), f"MFU {verdict.mfu_no_overlap:.0%}"))
    text = format_table(rows)
    if cost is None or verdict.stats.bytes_by_kind.get("cache") is not None:
        return text
    return text + "\n\n" + format_table(_cost_rows(verdict, cost), left=2)


def _amount(value: float) -> str:
    """Three digits, or all that lie before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cost_rows(verdict: Plan, cost: Cost) -> list[tuple[str, str]]:
    assert verdict.roofline is not None
    slow = verdict.roofline.upper_bound / verdict.roofline.lower_bound
    rows = [
        ("tokens a day", f"{cost.tokens / cost.days:.4g} (or {cost.tokens / cost.days / slow:.4g})"),
        (f"days for {cost.tokens:.4g} tokens", f"{_amount(cost.days)} (or {_amount(cost.days * slow)})"),
        ("chip-hours", f"{_amount(cost.chip_hours)} (or {_amount(cost.chip_hours * slow)})"),
        ("energy", f"{_amount(cost.megawatt_hours)} MWh (or {_amount(cost.megawatt_hours * slow)})"),
    ]
    if cost.money is not None:
        rows.append(("money", f"{_amount(cost.money)} (or {_amount(cost.money * slow)})"))
    return rows


def _traffic(traffic: Sequence[Traffic]) -> str:
    most = max(row.sent for row in traffic)
    name, unit = ("GB", GB) if most >= GB else ("MB", 1e6)
    rows = [("sent by each device in a step", "operation", "group", "times", name)]
    shown = [row for row in traffic if row.sent >= most / 1000][:12]
    for row in shown:
        over = "+".join(row.axes) + (f" ({row.groups_spanned} slices or hosts)" if row.groups_spanned > 1 else "")
        rows.append((over or "dcn", row.kind, str(row.group), f"{row.count:,}", f"{row.sent / unit:,.3f}"))
    if rest := sum(row.sent for row in traffic) - sum(row.sent for row in shown):
        rows.append(("others", "", "", "", f"{rest / unit:,.3f}"))
    return format_table(rows, left=2)


def _storage(verdict: Plan) -> str:
    keep = verdict.config.checkpoint.keep_last + 1  # the one that is being written is whole before an older one goes
    rows = [
        ("a checkpoint on disk", f"{verdict.checkpoint_bytes / GB:,.1f} GB"),
        (f"disk for {keep} of them", f"{keep * verdict.checkpoint_bytes / GB:,.1f} GB"),
        (f"host memory to save or restore, each of {verdict.hosts:,}", f"{verdict.host_bytes / GB:,.1f} GB at most"),
    ]
    if verdict.host_memory:
        rows.append(("host memory there is", f"{verdict.host_memory / GB:,.0f} GB"))
    return format_table(rows, left=2)


def plan_to_json(verdict: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds, energy in MWh."""
    measured, memory, roofline, cost = verdict.stats, verdict.memory, verdict.roofline, verdict.cost
    table: dict[str, Any] = {
        "topology": measured.topology,
        "devices": measured.devices,
        "mesh": measured.mesh,
        "compiler": measured.compiler,
        "estimated": measured.compiler == LABEL,
        "fast": measured.low_effort,
        "parameters": measured.parameters,
        "tokens_per_step": measured.tokens,
        "bytes_by_kind": memory.bytes_by_kind,
        "peak_bytes": memory.peak,
        "usable_bytes": memory.usable,
        "fits": verdict.fits,
        "refused": measured.compiler_error,
        "flops_per_step": measured.flops,
        "hardware_flops_per_step": measured.hardware_flops,
        "hbm_bytes_per_step": measured.hbm_bytes,
        "sent_bytes_per_step": [row._asdict() for row in measured.traffic],
        "checkpoint_bytes": verdict.checkpoint_bytes,
        "host_bytes": verdict.host_bytes,
        "host_memory_bytes": verdict.host_memory,
        "hosts": verdict.hosts,
        "notes": verdict.notes,
    }
    if roofline:
        table |= {
            "roofline_seconds": roofline.terms,
            "bound_by": roofline.bound,
            "step_seconds": roofline.lower_bound,
            "step_seconds_without_overlap": roofline.upper_bound,
            "mfu": verdict.mfu,
            "mfu_without_overlap": verdict.mfu_no_overlap,
        }
    if cost:
        table |= {f"run_{name}": value for name, value in cost._asdict().items()}
        table["tokens_per_day"] = cost.tokens / cost.days
    if verdict.encode:
        table["reading"] = plan_to_json(verdict.encode)
    return table
