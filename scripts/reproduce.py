# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Repeat a run from its recipe.json and report whether its losses are equal.

examples:
  python scripts/reproduce.py runs/quickstart
      repeat all steps; no file is written, and the run folder is not changed
  python scripts/reproduce.py runs/quickstart --steps 50 --json
      repeat only the first 50 steps

Differences in the environment (versions, devices, mesh, code) are listed first: on other devices, bitwise equality cannot
be expected. If the run folder has a checkpoint of the last repeated step, its arrays are compared as well.

exit status: 0 equal, 1 not equal or failed, 2 wrong usage
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError


def main(arguments: list[str]) -> int:
    """Repeat the run and print the comparison."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--steps", type=int, help="last step to repeat; default: the last step of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: must be at least 1")
    result = reproduce(options.run, options.steps)
    print(json.dumps(result) if options.json else format_result(result))
    return 0 if result["equal"] else 1


def reproduce(run_dir: Path, steps: int | None = None) -> dict[str, Any]:
    """Repeat a run up to step `steps` and return the comparison with its metrics log and its checkpoint."""
    from mesh_transformer.scripts.stress.fault_injection import count_ulps

    from mesh_transformer.checkpoint.store import Store
    from mesh_transformer.train.replay import open_replay, read_losses, replay
    from mesh_transformer.train.state import flatten_state

    logged = read_losses(run_dir)
    if not logged:
        raise ValueError(
            f"{run_dir}: metrics.jsonl has no losses to compare with; pass the folder of a run that has logged steps"
        )
    run, changes = open_replay(run_dir, 0)
    last = min(max(logged), steps or run.config.train.steps)
    result: dict[str, Any] = {"changed": changes, "compared": 0, "first_differing_step": None, "ulps": 0}
    for replayed in replay(run, last):
        if replayed.step not in logged:
            continue
        result["compared"] += 1
        if replayed.loss.tobytes() == logged[replayed.step].tobytes():
            continue
        result["ulps"] = max(result["ulps"], count_ulps(np.asarray(replayed.loss), np.asarray(logged[replayed.step])))
        if result["first_differing_step"] is None:
            result |= {
                "first_differing_step": replayed.step,
                "logged": float(logged[replayed.step]),
                "repeated": float(replayed.loss),
            }
    store = Store(run_dir / "checkpoints", writable=False)
    differing = None
    if last in store.steps():
        stored = store.open_arrays(last)
        differing = [
            name
            for name, array in flatten_state(run.state).items()
            if np.asarray(array).tobytes() != stored[name].read(tuple(slice(0, dim) for dim in array.shape)).tobytes()
        ]
    equal = result["first_differing_step"] is None and result["compared"] > 0 and not differing
    return {"run": str(run_dir), "equal": equal, "steps": last, **result, "differing_arrays": differing}


def format_result(result: dict[str, Any]) -> str:
    """Return the comparison of a repeated run with its record as lines of text."""
    lines = [f"changed since the run: {change}" for change in result["changed"]]
    if result["first_differing_step"] is None:
        lines.append(f"{result['compared']} losses up to step {result['steps']} are equal, bit for bit")
    else:
        lines.append(
            f"step {result['first_differing_step']} is the first step whose loss differs: logged {result['logged']!r}, "
            f"repeated {result['repeated']!r}; at most {result['ulps']} ulps in {result['compared']} losses"
        )
    differing = result["differing_arrays"]
    if differing is not None:
        comparison = (
            f"{len(differing)} arrays differ, the first is {differing[0]}" if differing else "equal, bit for bit"
        )
        lines.append(f"checkpoint of step {result['steps']}: {comparison}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
