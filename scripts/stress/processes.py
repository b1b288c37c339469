# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stress test of multi-process runs: processes are killed, and the run moves to other topologies, without losing anything.

device_train.py trains a tiny model in several processes on this machine (jax.distributed, collectives over Gloo). With
--trials a random process is killed (SIGKILL) that many times, every second time during a save. After each kill the other
processes must stop by themselves, and the latest checkpoint must be intact and no older than the last checkpoint
committed before the kill. With --moves one process gets SIGTERM, and the run continues with another number of processes
on another mesh. At the end the losses and the final state are compared with those of an uninterrupted run, and the
examples that the steps used are counted.

examples:
  python scripts/stress/processes.py --processes 2 --trials 30
      30 kills; the final state must be equal bit for bit
  python scripts/stress/processes.py --moves 4:data=4,fsdp=2 2:fsdp=4 1:tensor=2,fsdp=2 4:tensor=4
      PROCESSES:MESH of each phase; the first is also the topology of the kills and of the uninterrupted run

exit status: 0 nothing was lost, 1 something was lost, 2 wrong usage
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mesh_transformer.scripts.launch import local

from mesh_transformer.cli import FAILED, PREEMPTED, make_parser, run_command

ROOT = Path(__file__).resolve().parents[2]
N_DEVICES = 4  # total over all processes
BATCH_SIZE = 8
SEQ_LEN = 16
SAVE_EVERY = 2  # steps
PHASE_SECONDS = 600.0  # time limit of a phase
STOP_SECONDS = 60.0  # time limit for the other processes after a kill
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
    """Number of processes, and mesh axes with their sizes ("fsdp=2")."""

    n_processes: int
    mesh: tuple[str, ...]


def main(arguments: list[str]) -> int:
    """Run the stress test and print its result."""
    if arguments[:1] == ["--child"]:
        return run_child(Path(arguments[1]), arguments[2], arguments[3:])
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--processes", type=int, default=2, help="number of processes for --trials; default: %(default)s"
    )
    parser.add_argument("--trials", type=int, default=0, help="number of kills; default: %(default)s")
    parser.add_argument(
        "--moves", nargs="+", metavar="N:MESH", help="topologies between which the run moves, as 2:fsdp=4"
    )
    parser.add_argument("--phase-steps", type=int, default=4, help="minimum steps of a phase; default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the kill times and the killed processes; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if not (options.trials or options.moves):
        parser.error("neither --trials nor --moves is given; pass at least one of them")
    topologies = [parse_topology(text) for text in options.moves or [f"{options.processes}:fsdp=2"]]
    first = topologies[0]
    with tempfile.TemporaryDirectory() as temporary:
        test = ProcessesTest(Path(temporary), random.Random(options.seed), quiet=options.json)
        result: dict[str, Any] = {}
        if options.trials:
            result |= test.kill(first, options.trials)
        if options.moves:
            result |= test.move(topologies, options.phase_steps)
        result |= test.compare(first)
    has_moved = first != test.topology
    passed = (
        result["problems"] == []
        and result["repeated_examples"] == result["missing_examples"] == 0
        and result["max_loss_difference"] <= (1e-5 if has_moved else 0.0)
        and (has_moved or result["different_arrays"] == 0)
    )
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:<24} {value}" for name, value in result.items()))
        print("nothing was lost" if passed else "something was lost")
    return 0 if passed else FAILED


def parse_topology(text: str) -> Topology:
    """Return the topology for text such as "4:fsdp=2,tensor=2"."""
    count, _, mesh = text.partition(":")
    return Topology(int(count), tuple(part for part in mesh.split(",") if part))


class ProcessesTest:
    """An interrupted run and an uninterrupted one, in one folder."""

    def __init__(self, folder: Path, rng: random.Random, *, quiet: bool):
        self.folder = folder
        self.random = rng
        self.quiet = quiet
        self.problems: list[str] = []
        self.topology = Topology(0, ())  # latest topology of the interrupted run
        (folder / "texts").mkdir()
        for i in range(20):  # so that all examples differ
            (folder / "texts" / f"{i}.txt").write_text(" ".join(f"{i}.{j}" for j in range(2500)))
        self.config = folder / "tiny.toml"
        sizes = dict(seq_len=SEQ_LEN, batch=BATCH_SIZE, every=SAVE_EVERY, heartbeat=HEARTBEAT_SECONDS)
        self.config.write_text(CONFIG.format(folder=folder, **sizes))

    def kill(self, topology: Topology, trials: int) -> dict[str, Any]:
        """Kill a random process `trials` times; return counts and times."""
        in_save = 0
        peer_named = 0
        stop_seconds: list[float] = []
        victims: list[int] = []
        for trial in range(trials):
            phase = Phase(self, "run", topology)
            phase.wait_for_checkpoint(self.latest_step() + SAVE_EVERY)
            victim = self.random.randrange(topology.n_processes)
            if trial % 2:
                phase.wait_for_save()
            time.sleep(self.random.random() * (0.02 if trial % 2 else 1.0))
            committed = self.latest_step()
            phase.processes[victim].kill()
            killed = time.monotonic()
            statuses = phase.wait(STOP_SECONDS)
            stop_seconds.append(time.monotonic() - killed)
            victims.append(victim)
            in_save += bool(phase.list_staging_folders())
            peer_named += f"process {victim} of {topology.n_processes}" in phase.read_output()
            others = [status for process, status in enumerate(statuses) if process != victim]
            if any(status in (None, 0) for status in others):
                self.problems.append(
                    f"trial {trial}: the other processes ended with statuses {others}, expected errors (None: did not end)"
                )
            self.check_latest(f"trial {trial}", committed)
            self.log(
                f"kill {trial + 1}: process {victim}; the others stopped after {stop_seconds[-1]:.1f} s; "
                f"latest step {self.latest_step()}"
            )
        self.topology = topology
        return {
            "kills": trials,
            "kills_by_process": {process: victims.count(process) for process in range(topology.n_processes)},
            "kills_in_save": in_save,
            "killed_process_named": peer_named,  # by the others, in their output
            "max_stop_seconds": round(max(stop_seconds), 1),  # from a kill until the others had stopped
        }

    def move(self, topologies: Sequence[Topology], phase_steps: int) -> dict[str, Any]:
        """Train on each topology except the last until one process gets SIGTERM; return the phases and their last steps."""
        stopped_at = []
        for number, topology in enumerate(topologies[:-1]):
            phase = Phase(self, "run", topology)
            phase.wait_for_step(self.latest_step() + phase_steps)
            phase.processes[self.random.randrange(topology.n_processes)].send_signal(signal.SIGTERM)
            statuses = phase.wait(STOP_SECONDS)
            if set(statuses) != {PREEMPTED}:
                self.problems.append(
                    f"phase {number}: the processes ended with statuses {statuses} after SIGTERM to one of them, expected "
                    f"{PREEMPTED} from all\n"
                    f"{phase.read_output()[-2000:]}"
                )
            self.check_latest(f"phase {number}", 0)
            stopped_at.append(self.latest_step())
            self.log(f"phase {number + 1}: {topology}, stopped with step {stopped_at[-1]}")
        self.topology = topologies[-1]
        phases = [f"{each.n_processes}:{','.join(each.mesh)}" for each in topologies]
        return {"phases": phases, "stopped_at_steps": stopped_at}

    def compare(self, topology: Topology) -> dict[str, Any]:
        """Finish the run, run it again on `topology` without interruptions, and compare the two."""
        steps = self.latest_step() + 2 * SAVE_EVERY
        for name, used in (("run", self.topology), ("uninterrupted", topology)):
            phase = Phase(self, name, used, f"train.steps={steps}")
            if set(statuses := phase.wait(PHASE_SECONDS)) != {0}:
                raise RuntimeError(
                    f"{name}: the processes ended with statuses {statuses}, expected 0 from all: {phase.read_output()[-3000:]}"
                )
        leftovers = [path.name for path in (self.folder / "run" / "checkpoints").iterdir() if "-" in path.name]
        self.problems += [f"a temporary folder remains: {name}" for name in leftovers]
        losses = self.read_losses("run")
        expected = self.read_losses("uninterrupted")
        if list(losses) != list(range(1, steps + 1)):
            self.problems.append(f"the metrics log has the steps {list(losses)}, expected 1 to {steps}")
        state = self.read_state("run", steps)
        expected_state = self.read_state("uninterrupted", steps)
        different = [name for name, array in state.items() if array.tobytes() != expected_state[name].tobytes()]
        examples = self.read_examples(steps)
        return {
            "problems": self.problems,
            "steps": steps,
            "max_loss_difference": max(  # relative
                abs(losses.get(step, np.inf) - loss) / loss for step, loss in expected.items()
            ),
            "different_arrays": len(different),
            "max_weight_ulps": max(
                count_ulps_of_max(array, expected_state[name])
                for name, array in state.items()
                if name.startswith("params/")
            ),
            "examples": len(examples),
            "repeated_examples": len(examples) - len(set(examples)),
            "missing_examples": len(set(range(steps * BATCH_SIZE)) - set(examples)),
        }

    def latest_step(self) -> int:
        """Return the latest committed step of the interrupted run, 0 without checkpoints."""
        found = (self.folder / "run" / "checkpoints").glob("step_*/COMMIT")
        return max((int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit()), default=0)

    def check_latest(self, where: str, min_step: int) -> None:
        """Check that every byte of the latest checkpoint is intact, and that its step is at least `min_step`."""
        program = [sys.executable, ROOT / "scripts" / "checkpoint.py", "verify", self.folder / "run"]
        done = subprocess.run([*program], capture_output=True, text=True, check=False)
        if done.returncode or self.latest_step() < min_step:
            self.problems.append(
                f"{where}: latest step {self.latest_step()}, expected {min_step} or later: {done.stdout}{done.stderr}"
            )

    def read_losses(self, run: str) -> dict[int, float]:
        """Return the losses of a run by step."""
        lines = map(json.loads, (self.folder / run / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    def read_state(self, run: str, step: int) -> dict[str, np.ndarray]:
        """Return every array of a checkpoint."""
        from mesh_transformer.checkpoint.store import Store

        arrays = Store(self.folder / run / "checkpoints", writable=False).open_arrays(step)
        return {name: array.read((slice(None),) * len(array.shape)) for name, array in arrays.items()}

    def read_examples(self, steps: int) -> list[int]:
        """Return the indices of the examples that each step used in the last attempt that took it."""
        used: dict[int, dict[str, set[int]]] = {}
        for line in map(json.loads, (self.folder / "run.examples").read_text().splitlines()):
            attempts = used.setdefault(line["first"] // BATCH_SIZE, {})
            attempts.setdefault(line["attempt"], set()).update(line["examples"])
        return [example for step in range(steps) for example in sorted(list(used[step].values())[-1])]

    def log(self, text: str) -> None:
        """Print progress."""
        if not self.quiet:
            print(text, flush=True)


class Phase:
    """The processes of a run between two interruptions."""

    def __init__(self, test: ProcessesTest, name: str, topology: Topology, *overrides: str):
        self.test = test
        self.run = test.folder / name
        self.log_path = test.folder / "output"
        mesh = [f"mesh.{part}" for part in topology.mesh]
        devices = max(N_DEVICES // topology.n_processes, 1)
        overrides = (f'run.dir="{self.run}"', f"mesh.cpu_devices={devices}", *mesh, *overrides)
        attempt = f"{time.monotonic_ns()}"
        command = [sys.executable, __file__, "--child", f"{self.run}.examples", attempt, str(test.config)]
        command += [f"--set={override}" for override in overrides]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{test.folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        output = open(self.log_path, "w", encoding="utf-8")  # noqa: SIM115 (threads write to it until the end)
        self.processes = local.start_processes(
            command, topology.n_processes, output=output, JAX_PLATFORMS="cpu", **cache
        )

    def wait_for_checkpoint(self, step: int) -> None:
        """Wait until the checkpoint of a step, or of a later one, is committed."""
        self._wait_until(lambda: self.test.latest_step() >= step, f"the checkpoint of step {step}")

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged."""
        pattern = re.compile(rf"step {step}/")
        self._wait_until(lambda: pattern.search(self.read_output()) is not None, f"step {step}")

    def wait_for_save(self) -> None:
        """Wait until a checkpoint is being written."""
        self._wait_until(lambda: bool(self.list_staging_folders()), "a save")

    def list_staging_folders(self) -> list[Path]:
        """Return the folders of unfinished saves."""
        return list((self.run / "checkpoints").glob("step_*.tmp-*"))

    def read_output(self) -> str:
        """Return the output of all processes so far."""
        return self.log_path.read_text(encoding="utf-8")

    def wait(self, seconds: float) -> list[int | None]:
        """Return the exit statuses; None for a process that still ran after `seconds` and was killed."""
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
            time.sleep(0.02)
        statuses = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return statuses

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PHASE_SECONDS
        while not condition():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self.wait(0)
                raise RuntimeError(f"the processes did not reach {what}: {self.read_output()[-3000:]}")
            time.sleep(0.002)


def count_ulps_of_max(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference in units in the last place of the largest absolute value of `b`."""
    return float(np.abs(a - b).max() / np.spacing(np.abs(b).max()))


def run_child(examples: Path, attempt: str, arguments: list[str]) -> int:
    """Run device_train.py in this process, and append the examples that it reads to the file `examples`."""
    sys.path.insert(0, str(ROOT))
    import device_train
    from mesh_transformer.data.loader import Batch, Loader

    original = Loader.batch

    @functools.wraps(original)
    def batch(self: Loader, first: int, size: int, rows: Iterable[int] | None = None) -> Batch:
        read = list(range(size) if rows is None else rows)
        line = json.dumps({"attempt": attempt, "first": first, "examples": [first + row for row in read]})
        with open(examples, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        return original(self, first, size, rows)

    Loader.batch = batch
    return device_train.main(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
