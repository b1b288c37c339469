# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Text and JSON output of a plan."""

from collections.abc import Sequence
from typing import Any

from mesh_transformer.plan.estimate import LABEL
from mesh_transformer.plan.fit import Cost, Plan
from mesh_transformer.plan.job import CompiledStats, Traffic

MIB, GIB, GB = 2**20, 2**30, 10**9


def format_plan(plan: Plan) -> str:
    """Return the text of a plan."""
    stats = plan.stats
    parts = [_heading(stats), _memory(plan)]
    if stats.bytes_by_kind.get("cache") is None:
        parts.append(_training(plan))
    else:
        parts.append(_sampling(plan))
    if plan.roofline:
        parts.append(_times(plan))
    if stats.traffic:
        parts.append(_traffic(stats.traffic))
    if stats.state_bytes:
        parts.append(_storage(plan))
    if plan.encode:
        parts += [
            "encoder: runs once per batch before decoding; the same program samples the first tokens",
            _memory(plan.encode),
        ]
        parts += [_times(plan.encode)] if plan.encode.roofline else []
    parts += [f"note: {note}" for note in plan.notes]
    return "\n\n".join(parts)


def format_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows as aligned columns: the first `left` columns are left-aligned, the others right-aligned."""
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
    """Format seconds as milliseconds with at least three significant digits."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def describe_mesh(sizes: dict[str, int]) -> str:
    """Return the mesh axes with more than one device, as text."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def describe_fit(plan: Plan) -> str:
    """Return text that states whether a plan fits in memory, and the size of the free or the missing memory."""
    memory = plan.memory
    if memory.fits is None or memory.usable is None:
        return "unknown: these devices do not report their memory"
    spare = memory.usable - memory.peak
    share = abs(spare) / memory.usable
    if not memory.fits:
        return f"no: {-spare / GIB:,.2f} GiB ({share:.0%}) over the limit"
    return f"yes: {spare / GIB:,.2f} GiB ({share:.0%}) free"


def _heading(stats: CompiledStats) -> str:
    origin = stats.compiler if stats.compiler == LABEL else f"compiled by {stats.compiler}"
    origin += f" in {stats.compile_seconds:.0f} s" if stats.compile_seconds else ""
    mesh = describe_mesh(stats.mesh)
    return f"{stats.topology}: {stats.devices:,} device(s), mesh {mesh}; {stats.parameters:,} parameters\n{origin}"


def _memory(plan: Plan) -> str:
    memory = plan.memory
    name, unit = ("GiB", GIB) if memory.peak >= GIB else ("MiB", MIB)
    rows = [("memory per device", name)]
    rows += [
        (kind, f"{n_bytes / unit:,.2f}")
        for kind, n_bytes in memory.bytes_by_kind.items()
        if n_bytes or kind == "parameters"
    ]
    peak = "peak" if not plan.stats.compiler_error else "required, reported by the compiler"
    rows.append((peak, f"{memory.peak / unit:,.2f}"))
    if memory.usable is not None:
        rows.append(("usable", f"{memory.usable / unit:,.2f}"))
    text = format_table(rows) + f"\nfits: {describe_fit(plan)}"
    return text + (f"\n{plan.stats.compiler_error}" if plan.stats.compiler_error else "")


def _training(plan: Plan) -> str:
    stats = plan.stats
    recomputed = stats.hardware_flops / stats.flops - 1 if stats.flops else 0.0
    rows = [
        ("tokens per step", f"{stats.tokens:,}"),
        ("model FLOPs per step", f"{stats.flops:.4g}"),
        ("hardware FLOPs per step", f"{stats.hardware_flops:.4g} ({recomputed:.0%} recomputed)"),
    ]
    return format_table(rows, left=2)


def _sampling(plan: Plan) -> str:
    stats, sizes = plan.stats, plan.stats.bytes_by_kind
    rows = [
        ("sequences", f"{stats.tokens:,}"),
        ("KV cache of all devices", f"{sizes['cache'] * stats.devices / GIB:,.2f} GiB (including replicas)"),
        ("FLOPs per step (one token per sequence)", f"{stats.flops:.4g}"),
    ]
    if plan.roofline:
        rows.append(("maximum tokens/s, all sequences", f"{stats.tokens / plan.roofline.lower_bound:,.0f}"))
        rows.append(("maximum tokens/s, per sequence", f"{1 / plan.roofline.lower_bound:,.1f}"))
        rows.append(("  without overlap", f"{1 / plan.roofline.upper_bound:,.1f}"))
    return format_table(rows, left=2)


def _times(plan: Plan) -> str:
    roofline, cost = plan.roofline, plan.cost
    assert roofline is not None
    rows = [("roofline of a step", "ms", "")]
    for name, seconds in sorted(roofline.terms.items(), key=lambda term: -term[1]):
        rows.append((name, format_ms(seconds), "<- bound" if name == roofline.bound else ""))
    rows.append(("lower bound (full overlap)", format_ms(roofline.lower_bound), f"MFU {plan.mfu:.0%}"))
    rows.append(("upper bound (no overlap)", format_ms(roofline.upper_bound), f"MFU {plan.mfu_no_overlap:.0%}"))
    text = format_table(rows)
    if cost is None or plan.stats.bytes_by_kind.get("cache") is not None:
        return text
    return text + "\n\n" + format_table(_cost_rows(plan, cost), left=2)


def _amount(value: float) -> str:
    """Format a value with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cost_rows(plan: Plan, cost: Cost) -> list[tuple[str, str]]:
    """Return rows with the cost for the lower and the upper bound of the step time."""
    assert plan.roofline is not None
    slow = plan.roofline.upper_bound / plan.roofline.lower_bound
    rows = [
        ("tokens per day", f"{cost.tokens / cost.days / slow:.4g} to {cost.tokens / cost.days:.4g}"),
        (f"days for {cost.tokens:.4g} tokens", f"{_amount(cost.days)} to {_amount(cost.days * slow)}"),
        ("chip-hours", f"{_amount(cost.chip_hours)} to {_amount(cost.chip_hours * slow)}"),
        ("energy", f"{_amount(cost.megawatt_hours)} to {_amount(cost.megawatt_hours * slow)} MWh"),
    ]
    if cost.money is not None:
        rows.append(("cost", f"{_amount(cost.money)} to {_amount(cost.money * slow)}"))
    return rows


def _traffic(traffic: Sequence[Traffic]) -> str:
    largest = max(row.sent for row in traffic)
    name, unit = ("GB", GB) if largest >= GB else ("MB", 1e6)
    rows = [("sent per device and step", "operation", "group", "count", name)]
    shown = [row for row in traffic if row.sent >= largest / 1000][:12]
    for row in shown:
        over = "+".join(row.axes) + (f" ({row.groups_spanned} slices or hosts)" if row.groups_spanned > 1 else "")
        rows.append((over or "dcn", row.kind, str(row.group), f"{row.count:,}", f"{row.sent / unit:,.3f}"))
    if rest := sum(row.sent for row in traffic) - sum(row.sent for row in shown):
        rows.append(("other", "", "", "", f"{rest / unit:,.3f}"))
    return format_table(rows, left=2)


def _storage(plan: Plan) -> str:
    count = plan.config.checkpoint.keep_last + 1  # a new checkpoint is written before the oldest is deleted
    rows = [
        ("checkpoint on disk", f"{plan.checkpoint_bytes / GB:,.1f} GB"),
        (f"disk for {count} checkpoints", f"{count * plan.checkpoint_bytes / GB:,.1f} GB"),
        (f"host memory to save or restore, per host ({plan.hosts:,})", f"{plan.host_bytes / GB:,.1f} GB maximum"),
    ]
    if plan.host_memory:
        rows.append(("host memory available", f"{plan.host_memory / GB:,.0f} GB"))
    return format_table(rows, left=2)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON-compatible values; sizes in bytes, times in seconds, energy in MWh."""
    stats, memory, roofline, cost = plan.stats, plan.memory, plan.roofline, plan.cost
    table: dict[str, Any] = {
        "topology": stats.topology,
        "devices": stats.devices,
        "mesh": stats.mesh,
        "compiler": stats.compiler,
        "estimated": stats.compiler == LABEL,
        "low_effort": stats.low_effort,
        "parameters": stats.parameters,
        "tokens_per_step": stats.tokens,
        "bytes_by_kind": memory.bytes_by_kind,
        "peak_bytes": memory.peak,
        "usable_bytes": memory.usable,
        "fits": plan.fits,
        "compiler_error": stats.compiler_error,
        "flops_per_step": stats.flops,
        "hardware_flops_per_step": stats.hardware_flops,
        "hbm_bytes_per_step": stats.hbm_bytes,
        "sent_bytes_per_step": [row._asdict() for row in stats.traffic],
        "checkpoint_bytes": plan.checkpoint_bytes,
        "host_bytes": plan.host_bytes,
        "host_memory_bytes": plan.host_memory,
        "hosts": plan.hosts,
        "notes": plan.notes,
    }
    if roofline:
        table |= {
            "roofline_seconds": roofline.terms,
            "bound_by": roofline.bound,
            "step_seconds": roofline.lower_bound,
            "step_seconds_without_overlap": roofline.upper_bound,
            "mfu": plan.mfu,
            "mfu_without_overlap": plan.mfu_no_overlap,
        }
    if cost:
        table |= {f"run_{name}": value for name, value in cost._asdict().items()}
        table["tokens_per_day"] = cost.tokens / cost.days
    if plan.encode:
        table["encode"] = plan_to_json(plan.encode)
    return table
