# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Make a run again from its recipe and say whether its losses come out equal.

examples:
  python scripts/reproduce.py runs/quickstart
      from the first step to the last; nothing is written, nothing in the run's folder changes
  python scripts/reproduce.py runs/quickstart --steps 50 --json
      only the first steps

What has changed since (versions, devices, mesh, code) is listed first: on other devices equality is not to be expected
to the last bit. If the run's folder still holds a checkpoint of the last step taken here, it is compared as well.

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
    """Parse, repeat, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--steps", type=int, help="no further than this step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: must be at least 1")
    result = reproduce(options.run, options.steps)
    print(json.dumps(result) if options.json else format_result(result))
    return 0 if result["equal"] else 1


def reproduce(run_dir: Path, steps: int | None = None) -> dict[str, Any]:
    """Losses of the run, of the repetition, and where they part."""
    from mesh_transformer.scripts.stress.fault_injection import count_ulps

    from mesh_transformer.checkpoint.store import Store
    from mesh_transformer.train.replay import open_replay, read_losses, replay
    from mesh_transformer.train.state import flatten_state

    logged = read_losses(run_dir)
    if not logged:
        raise ValueError(f"{run_dir}: its metrics.jsonl holds no losses to compare with")
    run, changes = open_replay(run_dir, 0)
    last = min(max(logged), steps or run.config.train.steps)
    result: dict[str, Any] = {"changed": changes, "compared": 0, "first_differing_step": None, "ulps": 0}
    for taken in replay(run, last):
        if taken.step not in logged:
            continue
        result["compared"] += 1
        if taken.loss.tobytes() == logged[taken.step].tobytes():
            continue
        result["ulps"] = max(result["ulps"], count_ulps(np.asarray(taken.loss), np.asarray(logged[taken.step])))
        if result["first_differing_step"] is None:
            both = {"logged": float(logged[taken.step]), "here": float(taken.loss)}
            result |= {"first_differing_step": taken.step, **both}
    store = Store(run_dir / "checkpoints", writable=False)
    differing = None
    if last in store.steps():
        stored, made = store.open_arrays(last), flatten_state(run.state)
        whole = {name: array.read(tuple(slice(0, dim) for dim in array.shape)) for name, array in stored.items()}
        differing = [name for name in made if np.asarray(made[name]).tobytes() != whole[name].tobytes()]
    equal = result["first_differing_step"] is None and result["compared"] > 0 and not differing
    return {"run": str(run_dir), "equal": equal, "steps": last, **result, "differing_arrays": differing}


def format_result(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [f"changed since: {change}" for change in result["changed"]]
    if result["first_differing_step"] is None:
        lines.append(f"{result['compared']} losses up to step {result['steps']} are equal, bit for bit")
    else:
        lines.append(
            f"step {result['first_differing_step']} is the first that differs: {result['logged']!r} then, "
            f"{result['here']!r} now; at most {result['ulps']} ulps in {result['compared']} losses"
        )
    differing = result["differing_arrays"]
    if differing is not None:
        many = f"{len(differing)} arrays differ, the first {differing[0]}" if differing else "is equal, bit for bit"
        lines.append(f"the checkpoint of step {result['steps']}: {many}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
