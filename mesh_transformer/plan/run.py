# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What device_plan.py does with its arguments: compile or estimate, judge, look for what fits, print."""

import argparse
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
from mesh_transformer.plan.fit import make_plan
from mesh_transformer.plan.hardware.topologies import MissingCompilerError, parse_topology
from mesh_transformer.plan.job import CompiledStats, CompileJob
from mesh_transformer.plan.report import format_plan, plan_to_json
from mesh_transformer.plan.suggestions import Suggestion, suggest_change

AMOUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_amount(text: str) -> float:
    """ "300B" -> 3e11. Raises ConfigError for what is no such number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"--tokens {text}: expected a number such as 300B, 1.5T or 2e9")
    return float(match[1]) * AMOUNTS[match[2]]


def run_plan(config: Config, options: argparse.Namespace) -> None:
    """Plan as asked, and print."""
    topology = parse_topology(options.topology)  # a wrong name is said before anything else
    if topology.name != "local":
        jax.config.update("jax_platforms", "cpu")  # whatever devices are here, they are not what is planned for
    batch, context = (options.batch, options.context or config.model.seq_len) if options.sample else (0, 0)
    job = CompileJob(config=config, topology=options.topology, low_effort=options.fast, batch=batch, context=context)
    compile_one = functools.partial(compile_job, cache=Path(options.cache) if options.cache else None)
    tokens = parse_amount(options.tokens) if options.tokens else None
    judged = functools.partial(make_plan, tokens=tokens, price=options.price_per_chip_hour)
    if options.search:
        _print_search(job, compile_one, options)
        return
    missing, remedy = "", None
    try:
        measured = compile_one(job)
    except MissingCompilerError as error:
        if options.sample:
            raise
        missing, measured = str(error), _estimate(job)
    verdict = judged(config, measured)
    if verdict.memory.fits is False and topology.chip and not missing and not options.sample:
        remedy = suggest_change(job, measured, compile_one, log=_say)
    if options.json:
        table = plan_to_json(verdict) | ({"missing": missing} if missing else {})
        if verdict.memory.fits is False:
            table["smallest_change"] = _remedy_to_json(remedy, judged, job)
        print(json.dumps(table))
        return
    print(measured.sharding_table + "\n" if measured.sharding_table and options.parameters else "", end="")
    print(format_plan(verdict))
    if missing:
        print(f"\nnot compiled: {missing}")
    if verdict.memory.fits is False and not missing and not options.sample:
        print("\n" + _describe_remedy(remedy))


def _estimate(job: CompileJob) -> CompiledStats:
    from mesh_transformer.plan.estimate import estimate_training

    return estimate_training(job.config, job.topology)


def _print_search(
    job: CompileJob, compile_one: Callable[[CompileJob], CompiledStats], options: argparse.Namespace
) -> None:
    from mesh_transformer.plan.hardware.chips import CPU
    from mesh_transformer.plan.search import format_search, search
    from mesh_transformer.plan.search_plot import draw_search

    topology = parse_topology(job.topology)
    if not topology.devices or options.sample:
        raise ConfigError("--search needs a topology of known size (v5e-8, 8xH100, cpu-8) and plans training")
    chip = topology.chip or CPU
    found = search(job, compile_one, chip=chip, count=options.search, log=_say)
    if options.json:
        rows = [
            {"overrides": list(one.overrides), "estimate": one.estimate.peak_bytes}
            | plan_to_json(make_plan(job.config, one.stats))
            for one in found.compiled
            if one.stats
        ]
        print(json.dumps({"considered": len(found.considered), "compiled": rows}))
    else:
        print(format_search(found, chip))
    if options.picture:
        title = f"{Path(options.config).stem} on {job.topology}: {len(found.considered):,} candidates"
        Path(options.picture).write_text(draw_search(found, chip, title), encoding="utf-8")
        _say(f"picture: {options.picture}")


def _describe_remedy(remedy: Suggestion | None) -> str:
    if remedy is None:
        return "nothing that was tried fits: take a larger topology, or --search"
    words = " ".join(f"--set '{override}'" for override in remedy.change.overrides)
    peak = remedy.stats.peak_bytes / 2**30
    return f"smallest change that fits: {remedy.change.description} (peak {peak:,.2f} GiB, compiled)\n    {words}"


def _remedy_to_json(remedy: Suggestion | None, judged: Any, job: CompileJob) -> dict[str, Any] | None:
    if remedy is None:
        return None
    return {
        "overrides": list(remedy.change.overrides),
        "words": remedy.change.description,
        "tried_before": remedy.tried,
        "plan": plan_to_json(judged(job.config, remedy.stats)),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr)
