# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure the time that training spends outside its compiled step: data, metrics, display and log, for any run's configuration.

Rounds of the compiled step alone and rounds of the training loop alternate on the same state. A round of the loop prepares
batches, fetches and logs metrics and updates the display as in training. Evaluation and saving are disabled.

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
from mesh_transformer.data.loader import Batch
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
    parser.add_argument(
        "config", nargs="?", default="configs/quickstart.toml", help="TOML file of the run; default: %(default)s"
    )
    add_set_option(parser)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds of each kind; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="steps per round; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.config, [*options.set, f"run.dir={json.dumps(folder)}"])
        layout = init_devices(config.mesh)
        run = open_run(config, open_data(config), layout)
        compiled, loop = measure(run, options.rounds, options.steps)
    overhead = [1 - compiled_s / loop_s for compiled_s, loop_s in zip(compiled, loop, strict=True)]
    result = {
        "compiled_step_ms": round(1000 * statistics.median(compiled), 2),
        "loop_step_ms": round(1000 * statistics.median(loop), 2),
        "overhead_fraction": round(statistics.median(overhead), 4),
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"compiled step     {result['compiled_step_ms']:8.2f} ms")
        print(f"step of the loop  {result['loop_step_ms']:8.2f} ms")
        print(
            f"time outside the compiled step: {result['overhead_fraction']:.1%} (median of {options.rounds} pairs of rounds)"
        )
    return 0


def measure(run: Run, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds per step in each round: of the compiled step alone, and of the training loop."""
    batch_size = run.config.train.batch_size
    batch = run.shard_batch(run.data.train.batch(0, batch_size), batch_size)
    compiled: list[float] = []
    loop: list[float] = []
    with (
        MetricsLog(Path(run.dir), run.config.track, config={}, first_step=0) as log,
        Progress(run.dir.name, run.config.train.steps, 0) as progress,
        StopRequest() as stop,
    ):
        for number in range(rounds + 1):
            compiled_seconds = time_compiled_steps(run, batch, steps)
            part = limit_steps(run, steps)
            recorder = Recorder(part, log, progress)  # measures the matmul peak, which is not timed
            start = time.perf_counter()
            train_steps(part, recorder, stop)
            jax.block_until_ready(part.state)
            loop_seconds = time.perf_counter() - start
            run.state = part.state
            if number:  # the first round compiles
                compiled.append(compiled_seconds / steps)
                loop.append(loop_seconds / steps)
    return compiled, loop


def time_compiled_steps(run: Run, batch: Batch, steps: int) -> float:
    """Return the seconds that `steps` calls of the compiled step take, on the same batch."""
    start = time.perf_counter()
    for _ in range(steps):
        run.state, _ = run.train_step(run.state, batch)
    jax.block_until_ready(run.state)
    return time.perf_counter() - start


def limit_steps(run: Run, steps: int) -> Run:
    """Return a copy of the run that ends after `steps` more steps, without evaluation and saving."""
    config = dataclasses.replace(
        run.config,
        train=dataclasses.replace(run.config.train, steps=run.step + steps, evaluate_every=0),
        checkpoint=dataclasses.replace(run.config.checkpoint, every=10**9),
        optimizer=dataclasses.replace(run.config.optimizer, warmup_steps=0),  # a warmup must be shorter than the run
    )
    return dataclasses.replace(run, config=config)


if __name__ == "__main__":
    sys.exit(run_command(main))
