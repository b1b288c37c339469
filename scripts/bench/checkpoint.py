# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring a state beside raw files of the same bytes, and beside Orbax's default if it is installed.

A state is laid over eight devices made of this CPU and saved again and again, by turns: raw (a file for each slice that a
device owns, written from host memory and synced), ours and Orbax, each at once and beside the program. Everything is
durable on disk when a clock stops, and deleted before the next starts. Medians over --repeats. `blocked` is the time for
which the program waits; of a save beside the program it is compared with a plain copy of the state to host memory.
Reading finds what was just written in the page cache, for all alike.

examples:
  python scripts/bench/checkpoint.py
      2 GB, on the disk of the working directory; takes 8 GB of memory and 4 GB of disk
  python scripts/bench/checkpoint.py --gb 0.2 --repeats 1 --json
      a quick look

exit status: 0 done, 1 failed, 2 wrong usage
"""

import gc
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import MeshConfig
from mesh_transformer.host_memory import keep_freed_memory
from mesh_transformer.mesh import MeshLayout, init_devices

N_DEVICES = 8
AXES = ("layers", "embed", "ff")
Arrays = dict[str, jax.Array]
Row = dict[str, float]


def main(arguments: list[str]) -> int:
    """Make the state, save and restore it by turns, print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the state; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of everything; default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to be measured; default: here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    layout = init_devices(MeshConfig(cpu_devices=N_DEVICES, fsdp=4, tensor=2))
    keep_freed_memory(False)  # else what a save needs could not be seen
    arrays = make_state(layout, options.gb)
    size = sum(array.nbytes for array in arrays.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary).absolute()
        ways = [save_raw, save_ours, save_ours_beside, *find_orbax()]
        rows: dict[str, list[Row]] = {way.__name__: [] for way in ways}
        copies = []
        for _ in range(options.repeats):
            copies.append(copy_plainly(arrays))
            for way in ways:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                gc.collect()
                os.sync()
                rows[way.__name__].append(way(folder, arrays))
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    report = {"bytes": size, "copy_seconds": statistics.median(copies), "repeats": options.repeats, "ways": medians}
    print(json.dumps(report) if options.json else format_report(report))
    return 0


def make_state(layout: MeshLayout, gigabytes: float) -> Arrays:
    """Random float32 arrays of 64 MB, cut over fsdp and tensor, a small one that every device holds, and a scalar."""
    rows, columns = 2048, 8192
    sharding = layout.sharding(AXES, (1, rows, columns), "w")
    keys = jax.random.split(jax.random.key(0), max(round(gigabytes * 1e9 / (4 * rows * columns)), 1))
    draw = jax.jit(lambda key: jax.random.normal(key, (1, rows, columns)), out_shardings=sharding)
    arrays = {f"params/{i:03}/w": draw(key) for i, key in enumerate(keys)}
    everywhere = layout.sharding(("layers",), (1024,), "b")
    arrays["params/b"] = jax.device_put(np.ones(1024, np.float32), everywhere)
    return jax.block_until_ready(arrays)


def copy_plainly(arrays: Arrays) -> float:
    """Seconds of a plain copy of all that the devices own to host memory."""
    started = time.perf_counter()
    copies = [
        np.array(shard.data) for array in arrays.values() for shard in array.addressable_shards if not shard.replica_id
    ]
    seconds = time.perf_counter() - started
    del copies
    return seconds


def save_raw(folder: Path, arrays: Arrays) -> Row:
    """A file for each slice."""
    slices = {
        f"{name.replace('/', '.')}.{i}": np.asarray(shard.data)
        for name, array in arrays.items()
        for i, shard in enumerate(array.addressable_shards)
        if not shard.replica_id
    }
    started = time.perf_counter()
    for name, values in slices.items():
        with open(folder / name, "wb", buffering=0) as file:
            file.write(np.ascontiguousarray(values).data)
            os.fsync(file.fileno())
    saved = time.perf_counter() - started
    started = time.perf_counter()
    for name in slices:
        np.fromfile(folder / name, np.float32)
    return {"save": saved, "blocked": saved, "restore": time.perf_counter() - started, "memory": 0.0}


def save_ours(folder: Path, arrays: Arrays) -> Row:
    """This project's, waited for."""
    return _save_ours(folder, arrays, asynchronous=False)


def save_ours_beside(folder: Path, arrays: Arrays) -> Row:
    """This project's, beside the program."""
    return _save_ours(folder, arrays, asynchronous=True)


def _save_ours(folder: Path, arrays: Arrays, *, asynchronous: bool) -> Row:
    store = Store(folder / "ours", async_save=asynchronous)
    axes = {name: AXES[: array.ndim] for name, array in arrays.items()}

    def save() -> None:
        store.save(1, arrays, axes=axes, meta={})

    return measure(save, store.wait, lambda: store.restore(1, describe(arrays)), arrays)


def find_orbax() -> list[Callable[[Path, Arrays], Row]]:
    """Both ways of Orbax's default, none where it is not installed."""
    try:
        orbax = importlib.import_module("orbax.checkpoint")
    except ImportError:
        print("orbax-checkpoint is not installed: it is left out", file=sys.stderr)
        return []

    def save_orbax(folder: Path, arrays: Arrays) -> Row:
        """Waited for."""
        with orbax.StandardCheckpointer() as checkpointer:

            def save() -> None:
                checkpointer.save(folder / "orbax", arrays)
                checkpointer.wait_until_finished()

            return measure(save, lambda: None, lambda: checkpointer.restore(folder / "orbax", describe(arrays)), arrays)

    def save_orbax_beside(folder: Path, arrays: Arrays) -> Row:
        """Beside the program."""
        with orbax.StandardCheckpointer() as checkpointer:
            return measure(
                lambda: checkpointer.save(folder / "orbax", arrays),
                checkpointer.wait_until_finished,
                lambda: checkpointer.restore(folder / "orbax", describe(arrays)),
                arrays,
            )

    return [save_orbax, save_orbax_beside]


def describe(arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and place of each."""
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items()}


def measure(
    save: Callable[[], object], wait: Callable[[], object], restore: Callable[[], Mapping[str, Any]], arrays: Arrays
) -> Row:
    """Seconds of a save, of the part that blocked, and of a restore whose values are compared; memory as a share of the state."""
    with peak_memory() as memory:
        started = time.perf_counter()
        save()
        blocked = time.perf_counter() - started
        wait()
        saved = time.perf_counter() - started
    started = time.perf_counter()
    restored = jax.block_until_ready(restore())
    seconds = time.perf_counter() - started
    for name in (min(arrays), max(arrays)):
        np.testing.assert_array_equal(restored[name], arrays[name])
    size = sum(array.nbytes for array in arrays.values())
    return {"save": saved, "blocked": blocked, "restore": seconds, "memory": memory["grown"] / size}


@contextmanager
def peak_memory() -> Any:
    """In it, how far this process's memory grows at most, in bytes, under "grown" at the end."""
    found, over = {"grown": 0.0}, threading.Event()
    before = _resident_bytes()

    def watch() -> None:
        while not over.wait(0.01):
            found["grown"] = max(found["grown"], float(_resident_bytes() - before))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_report(report: dict[str, Any]) -> str:
    """The table, and as its last line the ratios."""
    size, copy, ways = report["bytes"], report["copy_seconds"], report["ways"]
    lines = [
        f"{size / 1e9:.2f} GB on {N_DEVICES} devices, medians of {report['repeats']}; plain copy to host memory {copy:.2f} s",
        f"{'':<18} {'save s':>7} {'GB/s':>6} {'blocked s':>10} {'x copy':>7} {'restore s':>10} {'GB/s':>6} {'memory':>7}",
    ]
    for name, row in ways.items():
        lines.append(
            f"{name.removeprefix('save_').replace('_', ', '):<18} {row['save']:7.2f} {size / row['save'] / 1e9:6.2f} "
            f"{row['blocked']:10.2f} {row['blocked'] / copy:7.2f} {row['restore']:10.2f} "
            f"{size / row['restore'] / 1e9:6.2f} {row['memory']:7.2f}"
        )
    ours, raw = ways["save_ours"], ways["save_raw"]
    orbax = ways.get("save_orbax")
    beside = (
        f"; to Orbax: {orbax['save'] / ours['save']:.2f}, {orbax['restore'] / ours['restore']:.2f}" if orbax else ""
    )
    return "\n".join(
        [*lines, f"raw reading {size / raw['restore'] / 1e9:.2f} GB/s; the state was compared after each restore",
         f"ratio to raw writing: saving {raw['save'] / ours['save']:.2f}, restoring {raw['save'] / ours['restore']:.2f}{beside}"]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
