# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Time that training loses outside its compiled step: data, metrics, display and log, on a run's own file.

Rounds of the bare compiled step and rounds of the loop take turns on the same state; a round of the loop has its
batches made, its metrics read and written and its display drawn as in training. Evaluation and saving are left out.

examples:
  python scripts/bench/loop.py
      configs/quickstart.toml, 15 rounds of 20 steps each
  python scripts/bench/loop.py my.toml --rounds 30 --json
      one JSON object
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import load_config
from mesh_transformer.data.dataset import open_data
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.mesh import init_devices
from mesh_transformer.reports.console import Progress
from mesh_transformer.reports.metrics_log import MetricsLog
from mesh_transformer.train.loop import train_steps
from mesh_transformer.train.recorder import Recorder
from mesh_transformer.train.run import Run, open_run


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml")
    add_set_option(parser)
    parser.add_argument("--rounds", type=int, default=15, help="of each side; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of a round; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.config, [*options.set, f"run.dir={json.dumps(folder)}"])
        layout = init_devices(config.mesh)
        run = open_run(config, open_data(config), layout)
        bare, loop = measure(run, options.rounds, options.steps)
    lost = [1 - a / b for a, b in zip(bare, loop, strict=True)]
    result = {
        "compiled_step_ms": round(1000 * statistics.median(bare), 2),
        "loop_step_ms": round(1000 * statistics.median(loop), 2),
        "lost_share": round(statistics.median(lost), 4),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"compiled step  {result['compiled_step_ms']:8.2f} ms\nstep in a loop {result['loop_step_ms']:8.2f} ms")
        print(f"lost outside the compiled step: {100 * result['lost_share']:.1f} % (median of {options.rounds} pairs)")
    return 0


def measure(run: Run, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds per step of each round, bare and in the loop."""
    size = run.config.train.batch_size
    batch = run.shard_batch(run.data.train.batch(0, size), size)
    bare, loop = [], []
    with (
        MetricsLog(Path(run.dir), run.config.track, config={}, first_step=0) as log,
        Progress(run.dir.name, run.config.train.steps, 0) as progress,
        StopRequest() as stop,
    ):
        for number in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(steps):
                run.state, _ = run.train_step(run.state, batch)
            jax.block_until_ready(run.state)
            middle = time.perf_counter()
            quiet = dataclasses.replace(run.config.train, steps=run.step + steps, evaluate_every=0)
            never = dataclasses.replace(run.config.checkpoint, every=10**9)
            config = dataclasses.replace(
                run.config,
                train=quiet,
                checkpoint=never,
                optimizer=dataclasses.replace(
                    run.config.optimizer, warmup_steps=0
                ),  # fewer steps than a warm-up may be
            )
            part = dataclasses.replace(run, config=config)
            recorder = Recorder(part, log, progress)
            begin = time.perf_counter()
            train_steps(part, recorder, stop)
            jax.block_until_ready(part.state)
            end = time.perf_counter()
            run.state = part.state
            if number:  # the first compiles
                bare.append((middle - start) / steps)
                loop.append((end - begin) / steps)
    return bare, loop


if __name__ == "__main__":
    sys.exit(run_command(main))
