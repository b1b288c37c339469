# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every plan that the files in configs/ name in their first lines, compiled, as one table.

A line `# python device_plan.py configs/NAME.toml --topology T [--set KEY=VALUE ...]` asks for one. What was compiled is
kept by a digest of the program, so that an interrupted call goes on where it was; a plan takes one to ten minutes.

examples:
  python scripts/bench/plan_all.py
      compile what is missing and write docs/plans.md
  python scripts/bench/plan_all.py configs/gptj_6b.toml --output gptj.md --fresh
      the plans of one file, compiled anew
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
from mesh_transformer.plan.compile_jobs import CompileError, compile_job
from mesh_transformer.plan.estimate import estimate_training
from mesh_transformer.plan.fit import Plan, make_plan
from mesh_transformer.plan.job import CompileJob
from mesh_transformer.plan.report import describe_mesh
from mesh_transformer.plan.suggestions import Suggestion, change_config, suggest_change

ROOT = Path(__file__).parents[2]
COMMAND = "# python device_plan.py "
GIB = 2**30


class Row(NamedTuple):
    """One plan: as the file asks for it, and with the smallest change that fits where it does not."""

    command: str
    job: CompileJob
    verdict: Plan
    remedy: Suggestion | None
    fixed: Plan | None


def find_commands(path: Path) -> Iterator[str]:
    """The plans that a configuration's first lines ask for."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(COMMAND):
            yield line.removeprefix("# python ")


def make_job(command: str) -> CompileJob:
    """The job of a command line of device_plan.py."""
    words = shlex.split(command)
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    return CompileJob(config=load_config(ROOT / words[1], sets), topology=words[words.index("--topology") + 1])


def plan_row(command: str, cache: Path) -> Row:
    """Compile one plan, and changes to it until one fits."""
    job, compile_one = make_job(command), functools.partial(compile_job, cache=cache)
    verdict = make_plan(job.config, compile_one(job))
    remedy = fixed = None
    if verdict.memory.fits is False:
        remedy = suggest_change(job, verdict.stats, compile_one, log=lambda line: print(f"    {line}", flush=True))
        if remedy:
            fixed = make_plan(change_config(job.config, remedy.change.overrides), remedy.stats)
    return Row(command, job, verdict, remedy, fixed)


def format_rows(rows: list[Row]) -> str:
    """The page."""
    lines = [
        "# Plans",
        "",
        "What every run in `configs/` needs on the hardware it is meant for. Each row was compiled at the compiler's default",
        "effort, for devices that were not there (`python scripts/bench/plan_all.py`); none is a formula. Peak and usable memory are",
        "GiB of one device. Step times lie between two bounds: everything hidden behind the longest of products, memory and",
        "communication, and nothing hidden. Days are for the run's own tokens. None of these was measured on the hardware.",
        "",
        "| run | topology | mesh | peak / usable | fits | step s | MFU | bound by | tokens a day | days | checkpoint GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(_format_row(row, row.verdict, ""))
        if row.fixed and row.remedy:
            lines.append(_format_row(row, row.fixed, row.remedy.change.description))
    lines += ["", "The commands:", "", "```", *(f"python {row.command}" for row in rows), "```", ""]
    lines += _format_errors(rows)
    return "\n".join(lines) + "\n"


def _format_row(row: Row, verdict: Plan, change: str) -> str:
    measured, memory, roofline, cost = verdict.stats, verdict.memory, verdict.roofline, verdict.cost
    name = Path(shlex.split(row.command)[1]).stem + (f", with {change}" if change else "")
    cells = [
        name,
        measured.topology,
        describe_mesh(measured.mesh),
        f"{memory.peak / GIB:.2f} / {(memory.usable or 0) / GIB:.2f}",
        "yes" if memory.fits else "**no**",
    ]
    if roofline is None or cost is None:
        return "| " + " | ".join([*cells, "-", "-", "-", "-", "-", f"{verdict.checkpoint_bytes / 1e9:,.0f}"]) + " |"
    slow = roofline.upper_bound / roofline.lower_bound
    cells += [
        f"{roofline.lower_bound:.3g} - {roofline.upper_bound:.3g}",
        f"{verdict.mfu_no_overlap:.0%} - {verdict.mfu:.0%}",
        roofline.bound,
        f"{cost.tokens / cost.days / slow:.2g} - {cost.tokens / cost.days:.2g}",
        f"{cost.days:,.3g} - {cost.days * slow:,.3g}",
        f"{verdict.checkpoint_bytes / 1e9:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _format_errors(rows: list[Row]) -> list[str]:
    """The memory estimate (plan/estimate.py) against every compile."""
    lines = [
        "## The estimate against the compiler",
        "",
        "`plan/estimate.py` prunes searches, and stands in where no compiler is installed. Its peak against the compiled one:",
        "",
        "| run | topology | estimate GiB | compiled GiB | estimate / compiled |",
        "|---|---|---|---|---|",
    ]
    ratios = []
    for row in rows:
        for job, verdict in _compiled_pairs(row):
            guess, peak = estimate_training(job.config, job.topology).peak_bytes, verdict.memory.peak
            ratios.append(guess / peak)
            name = Path(shlex.split(row.command)[1]).stem
            refused = " (refused)" if verdict.stats.compiler_error else ""
            lines.append(
                f"| {name} | {job.topology} | {guess / GIB:.2f} | {peak / GIB:.2f}{refused} | {guess / peak:.2f} |"
            )
    if ratios:
        lines += ["", f"Median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}."]
    return lines


def _compiled_pairs(row: Row) -> Iterator[tuple[CompileJob, Plan]]:
    yield row.job, row.verdict
    if row.fixed:
        yield CompileJob(config=row.fixed.config, topology=row.job.topology), row.fixed


def main(arguments: list[str]) -> int:
    """Compile what is missing, write the page."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("configs", nargs="*", type=Path, help="default: every file in configs/")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "plans.md", help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/mesh-transformer/plans").expanduser())
    parser.add_argument("--fresh", action="store_true", help="use nothing that was compiled before")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # whatever devices are here, they are not what is planned for
    cache = options.cache / f"fresh-{int(time.time())}" if options.fresh else options.cache
    paths = options.configs or sorted((ROOT / "configs").glob("*.toml"))
    rows, failed = [], 0
    for command in (command for path in paths for command in find_commands(path)):
        print(command, flush=True)
        start = time.monotonic()
        try:
            row = plan_row(command, cache)
        except CompileError as error:
            failed += 1
            print(f"    {error}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        shown = row.fixed or row.verdict
        words = f", with {row.remedy.change.description}" if row.remedy else ""
        fits = f"fits{words}" if shown.memory.fits else "does not fit, whatever was tried"
        print(f"    {shown.memory.peak / GIB:.2f} GiB, {fits}, {time.monotonic() - start:.0f} s", flush=True)
        options.output.write_text(format_rows(rows), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
