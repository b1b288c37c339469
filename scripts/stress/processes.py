# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Proof by counting that a run of several processes cannot be lost: processes killed at random, topologies changed.

A tiny model is trained by device_train.py in real processes (jax.distributed, collectives over Gloo) on this machine.
With --trials one process of all, drawn at random, is killed with SIGKILL again and again, every second time while a
checkpoint is being written; after each kill the others must stop by themselves, and the newest checkpoint must be
intact and not older than the last one seen committed. With --moves the run is stopped by SIGTERM to one process and goes
on in another number of processes and on another mesh. At the end its losses and final state are compared with those of
a run that nobody interrupted, and the examples that its steps were given are counted.

examples:
  python scripts/stress/processes.py --processes 2 --trials 30
      30 kills, the state at the end bit-equal
  python scripts/stress/processes.py --moves 4:data=4,fsdp=2 2:fsdp=4 1:tensor=2,fsdp=2 4:tensor=4
      processes:mesh of each leg, the first of which is also that of kills and of the run to compare with

exit status: 0 nothing was lost, 1 something was
"""

import functools
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.cli import FAILED, PREEMPTED, make_parser, run_command

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "launch"))
import local  # noqa: E402  (a program, not a package)

DEVICES, BATCH, SEQ_LEN = 4, 8, 16  # devices: of all processes together
EVERY = 2  # steps between two checkpoints
LEG_SECONDS = 600.0  # for a leg to come as far as is wanted
STOP_SECONDS = 60.0  # the others may take after a kill
HEARTBEAT_SECONDS = 20.0
CONFIG = """
[model]
n_layers = 1
d_model = 32
n_heads = 4
n_vocab = 264
seq_len = {seq_len}
[data]
cache_dir = "{folder}/cache"
[data.train.numbers]
path = "{folder}/texts"
[optimizer]
schedule = "constant"
[train]
steps = 100_000
batch_size = {batch}
log_every = 1
[checkpoint]
every = {every}
[mesh]
heartbeat_seconds = {heartbeat}
"""


class Topology(NamedTuple):
    """Processes, and sizes of the mesh axes."""

    processes: int
    mesh: tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Kill or move, compare, print."""
    if arguments[:1] == ["--child"]:
        return run_child(Path(arguments[1]), arguments[2:])
    parser = make_parser(__doc__ or "")
    parser.add_argument("--processes", type=int, default=2, help="of a run that is killed; default: %(default)s")
    parser.add_argument("--trials", type=int, default=0, help="kills")
    parser.add_argument("--moves", nargs="+", metavar="N:MESH", help="topologies, one leg each")
    parser.add_argument("--leg-steps", type=int, default=4, help="least steps of a leg; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if not (options.trials or options.moves):
        parser.error("say --trials, --moves or both")
    legs = [parse_topology(text) for text in options.moves or [f"{options.processes}:fsdp=2"]]
    with tempfile.TemporaryDirectory() as temporary:
        proof, first = Proof(Path(temporary), random.Random(options.seed), quiet=options.json), legs[0]
        report: dict[str, Any] = {}
        if options.trials:
            report |= proof.kill(first, options.trials)
        if options.moves:
            report |= proof.move(legs, options.leg_steps)
        report |= proof.compare(first)
    is_moved = first != proof.last
    good = report["wrong"] == [] and report["examples seen twice"] == report["examples never seen"] == 0
    good = good and report["largest relative difference of losses"] <= (1e-5 if is_moved else 0.0)
    good = good and (is_moved or report["arrays that differ"] == 0)
    if options.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{name:<40} {value}" for name, value in report.items()))
        print("nothing was lost" if good else "something was lost")
    return 0 if good else FAILED


def parse_topology(text: str) -> Topology:
    """ "4:fsdp=2,tensor=2" -> 4 processes, those sizes."""
    count, _, mesh = text.partition(":")
    return Topology(int(count), tuple(part for part in mesh.split(",") if part))


class Proof:
    """A run and one to compare it with, in a folder."""

    def __init__(self, folder: Path, draw: random.Random, *, quiet: bool):
        self.folder, self.draw, self.quiet = folder, draw, quiet
        self.wrong: list[str] = []
        self.last = Topology(0, ())
        (folder / "texts").mkdir()
        for i in range(20):  # no two examples are alike
            (folder / "texts" / f"{i}.txt").write_text(" ".join(f"{i}.{j}" for j in range(2500)))
        self.config = folder / "tiny.toml"
        sizes = dict(seq_len=SEQ_LEN, batch=BATCH, every=EVERY, heartbeat=HEARTBEAT_SECONDS)
        self.config.write_text(CONFIG.format(folder=folder, **sizes))

    def kill(self, topology: Topology, trials: int) -> dict[str, Any]:
        """So many kills; what happened."""
        inside, stops, named, victims = 0, [], 0, []
        for trial in range(trials):
            leg = Leg(self, "run", topology)
            leg.wait_for_step(self.newest() + EVERY)
            victim = self.draw.randrange(topology.processes)
            if trial % 2:
                leg.wait_for_draft()
            time.sleep(self.draw.random() * (0.02 if trial % 2 else 1.0))
            before = self.newest()
            leg.processes[victim].kill()
            killed = time.monotonic()
            codes = leg.wait(STOP_SECONDS)
            stops.append(time.monotonic() - killed)
            inside += bool(leg.drafts())
            others = [code for process, code in enumerate(codes) if process != victim]
            named += f"process {victim} of {topology.processes}" in leg.output()
            victims.append(victim)
            if any(code in (None, 0) for code in others):
                self.wrong.append(f"trial {trial}: the others ended with {others}")
            self.check_newest(f"trial {trial}", before)
            self.say(
                f"kill {trial + 1}: process {victim}, others gone after {stops[-1]:.1f} s, newest step {self.newest()}"
            )
        self.last = topology
        return {
            "kills": trials,
            "of process": {process: victims.count(process) for process in range(topology.processes)},
            "inside a save": inside,
            "others named the one killed": named,
            "seconds until the others had stopped, most": round(max(stops), 1),
        }

    def move(self, legs: Sequence[Topology], leg_steps: int) -> dict[str, Any]:
        """One leg after the other; what happened."""
        reached = []
        for number, topology in enumerate(legs[:-1]):
            leg = Leg(self, "run", topology)
            leg.wait_for_step(self.newest() + leg_steps, committed=False)
            leg.processes[self.draw.randrange(topology.processes)].send_signal(signal.SIGTERM)
            codes = leg.wait(STOP_SECONDS)
            if set(codes) != {PREEMPTED}:
                self.wrong.append(
                    f"leg {number}: ended with {codes} after SIGTERM to one process\n{leg.output()[-2000:]}"
                )
            self.check_newest(f"leg {number}", 0)
            reached.append(self.newest())
            self.say(f"leg {number + 1}: {topology}, stopped with step {reached[-1]}")
        self.last = legs[-1]
        return {"legs": [f"{leg.processes}:{','.join(leg.mesh)}" for leg in legs], "stopped at steps": reached}

    def compare(self, topology: Topology) -> dict[str, Any]:
        """Finish the run, do it again without interruptions, and compare."""
        steps = self.newest() + 2 * EVERY
        for name, where in (("run", self.last), ("straight", topology)):
            leg = Leg(self, name, where, f"train.steps={steps}")
            if set(codes := leg.wait(LEG_SECONDS)) != {0}:
                raise RuntimeError(f"{name}: ended with {codes}: {leg.output()[-3000:]}")
        left = [path.name for path in (self.folder / "run" / "checkpoints").iterdir() if "-" in path.name]
        self.wrong += [f"left behind: {name}" for name in left]
        losses = [self.losses(name) for name in ("run", "straight")]
        if list(losses[0]) != list(range(1, steps + 1)):
            self.wrong.append(f"the metrics name the steps {list(losses[0])}")
        states = [self.state(name, steps) for name in ("run", "straight")]
        differ = [name for name, array in states[0].items() if array.tobytes() != states[1][name].tobytes()]
        seen = self.examples(steps)
        return {
            "wrong": self.wrong,
            "steps": steps,
            "largest relative difference of losses": max(
                abs(losses[0].get(step, np.inf) - loss) / loss for step, loss in losses[1].items()
            ),
            "arrays that differ": len(differ),
            "largest difference of a weight, in ulps": max(  # of the largest weight of its array
                count_ulps(array, states[1][name]) for name, array in states[0].items() if name.startswith("params/")
            ),
            "examples seen": len(seen),
            "examples seen twice": len(seen) - len(set(seen)),
            "examples never seen": len(set(range(steps * BATCH)) - set(seen)),
        }

    def newest(self) -> int:
        """The newest committed step, 0 if there is none."""
        found = (self.folder / "run" / "checkpoints").glob("step_*/COMMIT")
        return max((int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit()), default=0)

    def check_newest(self, where: str, least: int) -> None:
        """The newest checkpoint is not older than that, and every byte is as it was written."""
        program = [sys.executable, ROOT / "scripts" / "checkpoint.py", "verify", self.folder / "run"]
        done = subprocess.run([*program], capture_output=True, text=True, check=False)
        if done.returncode or self.newest() < least:
            self.wrong.append(
                f"{where}: newest step {self.newest()}, committed was {least}: {done.stdout}{done.stderr}"
            )

    def losses(self, run: str) -> dict[int, float]:
        """By step."""
        lines = map(json.loads, (self.folder / run / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    def state(self, run: str, step: int) -> dict[str, np.ndarray]:
        """Every array of a checkpoint."""
        from mesh_transformer.checkpoint.store import Store

        arrays = Store(self.folder / run / "checkpoints", writable=False).open_arrays(step)
        return {name: array.read((slice(None),) * len(array.shape)) for name, array in arrays.items()}

    def examples(self, steps: int) -> list[int]:
        """Numbers of the examples that the steps were given, by the last attempt at each: what its processes read of it."""
        given: dict[int, dict[str, set[int]]] = {}
        for line in map(json.loads, (self.folder / "run.examples").read_text().splitlines()):
            attempts = given.setdefault(line["first"] // BATCH, {})
            attempts.setdefault(line["attempt"], set()).update(line["examples"])
        return [example for step in range(steps) for example in sorted(list(given[step].values())[-1])]

    def say(self, text: str) -> None:
        """How far it is."""
        if not self.quiet:
            print(text, flush=True)


class Leg:
    """The processes of a run between two interruptions."""

    def __init__(self, proof: Proof, name: str, topology: Topology, *settings: str):
        self.proof, self.run = proof, proof.folder / name
        self.log = open(proof.folder / "output", "w+", encoding="utf-8")  # noqa: SIM115 (closed in wait)
        devices = max(DEVICES // topology.processes, 1)
        mesh = [f"mesh.{part}" for part in topology.mesh]
        settings = (f'run.dir="{self.run}"', f"mesh.cpu_devices={devices}", *mesh, *settings)
        attempt = f"{time.monotonic_ns()}"
        command = [sys.executable, __file__, "--child", f"{self.run}.examples", attempt, str(proof.config)]
        command += [f"--set={setting}" for setting in settings]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{proof.folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.processes = local.start_processes(
            command, topology.processes, output=self.log, JAX_PLATFORMS="cpu", **cache
        )

    def wait_for_step(self, step: int, *, committed: bool = True) -> None:
        """Until a checkpoint of that step is there, or the step is taken."""
        told = re.compile(rf"step {step}/")
        self._until(lambda: self.proof.newest() >= step if committed else told.search(self.output()), f"step {step}")

    def wait_for_draft(self) -> None:
        """Until a checkpoint is being written."""
        self._until(self.drafts, "a save")

    def drafts(self) -> list[Path]:
        """Checkpoints that are being written, or were."""
        return list((self.run / "checkpoints").glob("step_*.tmp-*"))

    def output(self) -> str:
        """What was printed so far."""
        return Path(self.log.name).read_text(encoding="utf-8")

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses; None of a process that had not ended by then, which is killed."""
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            time.sleep(0.02)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return codes

    def _until(self, is_so: Any, what: str) -> None:
        end = time.monotonic() + LEG_SECONDS
        while not is_so():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self.wait(0)
                raise RuntimeError(f"{what} was not reached: {self.output()[-3000:]}")
            time.sleep(0.002)


def count_ulps(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in float32 steps at the largest value of `b`."""
    return float(np.abs(a - b).max() / np.spacing(np.abs(b).max()))


def run_child(examples: Path, arguments: list[str]) -> int:
    """device_train.py, with a note of every example that this process reads."""
    sys.path.insert(0, str(ROOT))
    import device_train
    from mesh_transformer.data.loader import Batch, Loader

    attempt, *arguments = arguments
    read = Loader.batch

    @functools.wraps(read)
    def noting(self: Loader, first: int, size: int, rows: Iterable[int] | None = None) -> Batch:
        own = list(range(size) if rows is None else rows)
        line = json.dumps({"attempt": attempt, "first": first, "examples": [first + row for row in own]})
        with open(examples, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        return read(self, first, size, rows)

    Loader.batch = noting
    return device_train.main(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
