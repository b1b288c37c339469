# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Planning of a run: compile or estimate it, print the plan, and suggest a change if it does not fit in memory."""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.config import Config, ConfigError
from mesh_transformer.plan.compile_jobs import compile_job
from mesh_transformer.plan.estimate import estimate_training
from mesh_transformer.plan.fit import Plan, make_plan
from mesh_transformer.plan.hardware.chips import CPU
from mesh_transformer.plan.hardware.topologies import MissingCompilerError, parse_topology
from mesh_transformer.plan.job import CompiledStats, CompileJob
from mesh_transformer.plan.report import format_plan, plan_to_json
from mesh_transformer.plan.search import format_search, search
from mesh_transformer.plan.search_plot import draw_search
from mesh_transformer.plan.suggestions import Suggestion, suggest_change

AMOUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of a plan; see the flags of device_plan.py."""

    topology: str = "local"
    title: str = ""  # name of the run, in the plot
    low_effort: bool = False
    tokens: float | None = None
    price_per_chip_hour: float | None = None
    decode: bool = False
    batch: int = 8
    context: int | None = None
    search: int | None = None
    plot: Path | None = None
    cache: Path | None = None
    print_json: bool = False
    print_parameters: bool = False


def parse_amount(text: str) -> float:
    """Parse a number of tokens such as "300B" (3e11). Raises ConfigError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"--tokens {text}: expected a positive number such as 300B, 1.5T or 2e9")
    return float(match[1]) * AMOUNTS[match[2]]


def run_plan(config: Config, options: PlanOptions) -> None:
    """Plan a run and print the report."""
    topology = parse_topology(options.topology)  # first, so that an unknown name is reported at once
    if topology.name != "local":
        jax.config.update("jax_platforms", "cpu")  # do not initialize local accelerators, which are not planned for
    job = CompileJob(
        config=config,
        topology=options.topology,
        low_effort=options.low_effort,
        batch=options.batch if options.decode else 0,
        context=(options.context or config.model.seq_len) if options.decode else 0,
    )
    compile_one = functools.partial(compile_job, cache=options.cache)
    if options.search:
        _print_search(job, compile_one, options)
    else:
        _print_plan(job, compile_one, options)


def _print_plan(job: CompileJob, compile_one: Callable[[CompileJob], CompiledStats], options: PlanOptions) -> None:
    missing = ""
    try:
        stats = compile_one(job)
    except MissingCompilerError as error:
        if options.decode:
            raise
        missing = str(error)
        stats = estimate_training(job.config, job.topology)
    plan = _make_plan(job, stats, options)
    is_too_large = plan.memory.fits is False
    suggestion = None
    if is_too_large and plan.chip and job.topology != "local" and not missing and not options.decode:
        suggestion = suggest_change(job, stats, compile_one, log=_log)
    if options.print_json:
        table = plan_to_json(plan) | ({"missing": missing} if missing else {})
        if is_too_large:
            table["smallest_change"] = _suggestion_to_json(suggestion, job, options)
        print(json.dumps(table))
        return
    if stats.sharding_table and options.print_parameters:
        print(stats.sharding_table)
    print(format_plan(plan))
    if missing:
        print(f"\nestimated, not compiled: {missing}")
    elif is_too_large and not options.decode:
        print("\n" + _describe_suggestion(suggestion))


def _make_plan(job: CompileJob, stats: CompiledStats, options: PlanOptions) -> Plan:
    return make_plan(job.config, stats, tokens=options.tokens, price=options.price_per_chip_hour)


def _print_search(job: CompileJob, compile_one: Callable[[CompileJob], CompiledStats], options: PlanOptions) -> None:
    topology = parse_topology(job.topology)
    if not topology.devices:
        raise ConfigError(
            f"--topology {job.topology}: --search needs a topology with a fixed number of devices; pass v5e-8, 8xH100 or "
            "cpu-8, for example"
        )
    if options.decode:
        raise ConfigError("--decode cannot be combined with --search, which plans training; remove one of them")
    chip = topology.chip or CPU
    assert options.search
    result = search(job, compile_one, chip=chip, count=options.search, log=_log)
    if options.print_json:
        candidates = [
            {"overrides": list(candidate.overrides), "estimate": candidate.estimate.peak_bytes}
            | plan_to_json(make_plan(job.config, candidate.stats))
            for candidate in result.compiled
            if candidate.stats
        ]
        print(json.dumps({"considered": len(result.considered), "compiled": candidates}))
    else:
        print(format_search(result, chip))
    if options.plot:
        title = f"{options.title} on {job.topology}: {len(result.considered):,} candidates"
        options.plot.write_text(draw_search(result, chip, title), encoding="utf-8")
        _log(f"plot: {options.plot}")


def _describe_suggestion(suggestion: Suggestion | None) -> str:
    if suggestion is None:
        return "no tested change fits in memory; use a larger --topology, or --search"
    flags = " ".join(f"--set '{override}'" for override in suggestion.change.overrides)
    peak = suggestion.stats.peak_bytes / 2**30
    return f"smallest change that fits: {suggestion.change.description} (peak {peak:,.2f} GiB, compiled)\n    {flags}"


def _suggestion_to_json(suggestion: Suggestion | None, job: CompileJob, options: PlanOptions) -> dict[str, Any] | None:
    if suggestion is None:
        return None
    return {
        "overrides": list(suggestion.change.overrides),
        "description": suggestion.change.description,
        "tried_before": suggestion.tried,
        "plan": plan_to_json(_make_plan(job, suggestion.stats, options)),
    }


def _log(line: str) -> None:
    print(line, file=sys.stderr)
