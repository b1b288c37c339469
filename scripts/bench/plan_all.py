# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compile every plan that the files in configs/ list in their first lines, and write them as one table.

A line `# python device_plan.py configs/NAME.toml --topology T [--set KEY=VALUE ...]` requests a plan. Compiled results
are cached by a digest of the program, so an interrupted run resumes; a plan takes one to ten minutes.

examples:
  python scripts/bench/plan_all.py
      compile the plans that are not cached, and write docs/plans.md
  python scripts/bench/plan_all.py configs/gptj_6b.toml --output gptj.md --no-cache
      the plans of one file, compiled again
"""

import functools
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import load_config
from mesh_transformer.config.schema import CACHE_DIR
from mesh_transformer.plan.compile_jobs import CompileError, compile_job
from mesh_transformer.plan.estimate import estimate_training
from mesh_transformer.plan.fit import Plan, make_plan
from mesh_transformer.plan.job import CompileJob
from mesh_transformer.plan.report import describe_mesh
from mesh_transformer.plan.suggestions import Suggestion, change_config, suggest_change

ROOT = Path(__file__).parents[2]
COMMAND = "# python device_plan.py "
GIB = 2**30


class PlannedRun(NamedTuple):
    """A plan of a configuration and, if it does not fit, of the smallest change of the configuration that fits."""

    command: str
    job: CompileJob
    plan: Plan
    suggestion: Suggestion | None
    fixed: Plan | None


def find_commands(path: Path) -> Iterator[str]:
    """Yield the commands in a configuration's first lines."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(COMMAND):
            yield line.removeprefix("# python ")


def make_job(command: str) -> CompileJob:
    """Return the job of a device_plan.py command."""
    words = shlex.split(command)
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return CompileJob(config=load_config(ROOT / words[1], sets), topology=words[words.index("--topology") + 1])


def plan_command(command: str, cache: Path) -> PlannedRun:
    """Compile a plan and, if it does not fit, changes of its configuration until one fits."""
    job, compile_one = make_job(command), functools.partial(compile_job, cache=cache)
    plan = make_plan(job.config, compile_one(job))
    suggestion = fixed = None
    if plan.memory.fits is False:
        suggestion = suggest_change(job, plan.stats, compile_one, log=lambda line: print(f"    {line}", flush=True))
        if suggestion:
            fixed = make_plan(change_config(job.config, suggestion.change.overrides), suggestion.stats)
    return PlannedRun(command, job, plan, suggestion, fixed)


def format_rows(rows: list[PlannedRun]) -> str:
    """Return the page docs/plans.md."""
    lines = [
        "# Plans",
        "",
        "The requirements of every run in `configs/` on its intended hardware. Each row was compiled with default compiler",
        "effort for absent devices (`python scripts/bench/plan_all.py`). Peak and usable memory are GiB per device. Step times are",
        "given as lower bound (matmuls, memory traffic and communication overlap fully) and upper bound (no overlap). Days are for",
        "the run's tokens. Nothing in this table was measured on the hardware.",
        "",
        "| run | topology | mesh | peak / usable | fits | step s | MFU | bound by | tokens per day | days | checkpoint GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(_format_row(row, row.plan, ""))
        if row.fixed and row.suggestion:
            lines.append(_format_row(row, row.fixed, row.suggestion.change.description))
    lines += ["", "The commands:", "", "```", *(f"python {row.command}" for row in rows), "```", ""]
    lines += _format_errors(rows)
    return "\n".join(lines) + "\n"


def _format_row(row: PlannedRun, plan: Plan, change: str) -> str:
    stats, memory, roofline, cost = plan.stats, plan.memory, plan.roofline, plan.cost
    name = Path(shlex.split(row.command)[1]).stem + (f", with {change}" if change else "")
    cells = [
        name,
        stats.topology,
        describe_mesh(stats.mesh),
        f"{memory.peak / GIB:.2f} / {(memory.usable or 0) / GIB:.2f}",
        "yes" if memory.fits else "**no**",
    ]
    if roofline is None or cost is None:
        return "| " + " | ".join([*cells, "-", "-", "-", "-", "-", f"{plan.checkpoint_bytes / 1e9:,.0f}"]) + " |"
    slow = roofline.upper_bound / roofline.lower_bound
    cells += [
        f"{roofline.lower_bound:.3g} - {roofline.upper_bound:.3g}",
        f"{plan.mfu_no_overlap:.0%} - {plan.mfu:.0%}",
        roofline.bound,
        f"{cost.tokens / cost.days / slow:.2g} - {cost.tokens / cost.days:.2g}",
        f"{cost.days:,.3g} - {cost.days * slow:,.3g}",
        f"{plan.checkpoint_bytes / 1e9:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _format_errors(rows: list[PlannedRun]) -> list[str]:
    """Return the section that compares the memory estimate (plan/estimate.py) with every compilation."""
    lines = [
        "## Accuracy of the estimate",
        "",
        "`plan/estimate.py` prunes searches, and replaces the compiler where none is installed. Its peak",
        "memory compared with the compiled one:",
        "",
        "| run | topology | estimate GiB | compiled GiB | estimate / compiled |",
        "|---|---|---|---|---|",
    ]
    ratios = []
    for row in rows:
        for job, plan in _compiled_pairs(row):
            estimate, peak = estimate_training(job.config, job.topology).peak_bytes, plan.memory.peak
            ratios.append(estimate / peak)
            name = Path(shlex.split(row.command)[1]).stem
            rejected = " (rejected)" if plan.stats.compiler_error else ""
            lines.append(
                f"| {name} | {job.topology} | {estimate / GIB:.2f} | {peak / GIB:.2f}{rejected} | {estimate / peak:.2f} |"
            )
    if ratios:
        lines += ["", f"Median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}."]
    return lines


def _compiled_pairs(row: PlannedRun) -> Iterator[tuple[CompileJob, Plan]]:
    yield row.job, row.plan
    if row.fixed:
        yield CompileJob(config=row.fixed.config, topology=row.job.topology), row.fixed


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("configs", nargs="*", type=Path, help="configurations; default: every file in configs/")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "plans.md", help="page to write; default: %(default)s"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(CACHE_DIR).expanduser() / "plans",
        help="folder of compiled results; default: %(default)s",
    )
    parser.add_argument("--no-cache", action="store_true", help="ignore cached results")
    options = parser.parse_args(arguments)
    jax.config.update(
        "jax_platforms", "cpu"
    )  # plans are compiled for absent devices, so the local accelerators are not used
    cache = options.cache / f"uncached-{int(time.time())}" if options.no_cache else options.cache
    paths = options.configs or sorted((ROOT / "configs").glob("*.toml"))
    rows, failed = [], 0
    for command in (command for path in paths for command in find_commands(path)):
        print(command, flush=True)
        start = time.monotonic()
        try:
            row = plan_command(command, cache)
        except CompileError as error:
            failed += 1
            print(f"    {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        shown = row.fixed or row.plan
        words = f", with {row.suggestion.change.description}" if row.suggestion else ""
        fits = f"fits{words}" if shown.memory.fits else "does not fit, and neither does any tested change"
        print(f"    {shown.memory.peak / GIB:.2f} GiB, {fits}, {time.monotonic() - start:.0f} s", flush=True)
        options.output.write_text(format_rows(rows), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
