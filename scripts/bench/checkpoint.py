# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare saving and restoring with raw files of the same bytes, and with Orbax's default checkpointer if it is installed.

A state sharded over eight simulated CPU devices is saved in alternation by each method: raw (one file per shard that a
device owns, written from host memory and synced), this project's store and Orbax, each synchronous and asynchronous. A
save ends when all bytes are durable on disk, and its files are deleted before the next save. Results are medians over
--repeats. `blocked` is the time during which the program waits; for an asynchronous save it is compared with a plain copy
of the state to host memory. All methods restore the files that they just wrote, from the page cache.

examples:
  python scripts/bench/checkpoint.py
      2 GB on the disk of the working directory; needs 8 GB of memory and 4 GB of disk space
  python scripts/bench/checkpoint.py --gb 0.2 --repeats 1 --json
      a quick run

exit status: 0 done, 1 failed, 2 wrong usage
"""

import contextlib
import gc
import importlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
Method = Callable[[Path, Arrays], "Timing"]


class Timing(NamedTuple):
    """Times of a save and a restore in seconds, and the memory of the save."""

    save: float  # until all bytes are durable on disk
    blocked: float  # during which the program waits
    restore: float
    memory: float  # growth of the process's memory during the save, as a fraction of the state's size


def main(arguments: list[str]) -> int:
    """Create the state, save and restore it with each method in alternation, and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--gb", type=float, default=2.0, help="size of the state; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="saves with each method; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="folder on the disk to measure; default: the current folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    layout = init_devices(MeshConfig(cpu_devices=N_DEVICES, fsdp=4, tensor=2))
    keep_freed_memory(False)  # otherwise the memory of a save cannot be measured
    arrays = make_state(layout, options.gb)
    methods: dict[str, Method] = {"raw": save_raw, "native": save_native, "native async": save_native_async}
    methods |= find_orbax()
    timings: dict[str, list[Timing]] = {name: [] for name in methods}
    copies = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary).absolute()
        for _ in range(options.repeats):
            copies.append(time_host_copy(arrays))
            for name, method in methods.items():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                gc.collect()
                os.sync()
                timings[name].append(method(folder, arrays))
    medians = {name: Timing(*map(statistics.median, zip(*own, strict=True)))._asdict() for name, own in timings.items()}
    report = {
        "bytes": sum(array.nbytes for array in arrays.values()),
        "copy_seconds": statistics.median(copies),
        "repeats": options.repeats,
        "methods": medians,
    }
    print(json.dumps(report) if options.json else format_report(report))
    return 0


def make_state(layout: MeshLayout, gigabytes: float) -> Arrays:
    """Return random float32 arrays of 64 MB sharded over fsdp and tensor, and a small replicated array."""
    shape = (1, 2048, 8192)
    n_arrays = max(round(gigabytes * 1e9 / (4 * math.prod(shape))), 1)
    make_array = jax.jit(lambda key: jax.random.normal(key, shape), out_shardings=layout.sharding(AXES, shape, "w"))
    keys = jax.random.split(jax.random.key(0), n_arrays)
    arrays = {f"params/{i:03}/w": make_array(key) for i, key in enumerate(keys)}
    replicated = layout.sharding(("layers",), (1024,), "b")
    arrays["params/b"] = jax.device_put(np.ones(1024, np.float32), replicated)
    return jax.block_until_ready(arrays)


def time_host_copy(arrays: Arrays) -> float:
    """Return the seconds of a plain copy of all primary shards to host memory."""
    start = time.perf_counter()
    copies = [
        np.array(shard.data) for array in arrays.values() for shard in array.addressable_shards if not shard.replica_id
    ]
    seconds = time.perf_counter() - start
    del copies
    return seconds


def save_raw(folder: Path, arrays: Arrays) -> Timing:
    """Write and read one file per shard."""
    shards = {
        f"{name.replace('/', '.')}.{i}": np.asarray(shard.data)
        for name, array in arrays.items()
        for i, shard in enumerate(array.addressable_shards)
        if not shard.replica_id
    }
    start = time.perf_counter()
    for name, values in shards.items():
        with open(folder / name, "wb", buffering=0) as file:
            file.write(np.ascontiguousarray(values).data)
            os.fsync(file.fileno())
    saved = time.perf_counter() - start
    start = time.perf_counter()
    for name in shards:
        np.fromfile(folder / name, np.float32)
    return Timing(saved, saved, time.perf_counter() - start, 0.0)


def save_native(folder: Path, arrays: Arrays) -> Timing:
    """Save with this project's store, synchronously."""
    return _save_native(folder, arrays, async_save=False)


def save_native_async(folder: Path, arrays: Arrays) -> Timing:
    """Save with this project's store, in the background."""
    return _save_native(folder, arrays, async_save=True)


def _save_native(folder: Path, arrays: Arrays, *, async_save: bool) -> Timing:
    store = Store(folder / "native", async_save=async_save)
    axes = {name: AXES[: array.ndim] for name, array in arrays.items()}

    def save() -> None:
        store.save(1, arrays, axes=axes, meta={})

    return measure(save, store.wait, lambda: store.restore(1, describe(arrays)), arrays)


def find_orbax() -> dict[str, Method]:
    """Return the synchronous and the asynchronous method of Orbax's default checkpointer, none if it is not installed."""
    try:
        orbax = importlib.import_module("orbax.checkpoint")
    except ImportError:
        print(
            "orbax-checkpoint is not installed, so it is not measured; to measure it: pip install orbax-checkpoint",
            file=sys.stderr,
        )
        return {}

    def save_orbax(folder: Path, arrays: Arrays) -> Timing:
        with orbax.StandardCheckpointer() as checkpointer:

            def save() -> None:
                checkpointer.save(folder / "orbax", arrays)
                checkpointer.wait_until_finished()

            return measure(save, lambda: None, lambda: checkpointer.restore(folder / "orbax", describe(arrays)), arrays)

    def save_orbax_async(folder: Path, arrays: Arrays) -> Timing:
        with orbax.StandardCheckpointer() as checkpointer:
            return measure(
                lambda: checkpointer.save(folder / "orbax", arrays),
                checkpointer.wait_until_finished,
                lambda: checkpointer.restore(folder / "orbax", describe(arrays)),
                arrays,
            )

    return {"orbax": save_orbax, "orbax async": save_orbax_async}


def describe(arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of each array."""
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items()}


def measure(
    save: Callable[[], object], wait: Callable[[], object], restore: Callable[[], Mapping[str, Any]], arrays: Arrays
) -> Timing:
    """Measure a save and a restore, and compare two of the restored arrays with the originals."""
    with track_memory() as memory:
        start = time.perf_counter()
        save()
        blocked = time.perf_counter() - start
        wait()
        saved = time.perf_counter() - start
    start = time.perf_counter()
    restored = jax.block_until_ready(restore())
    restore_seconds = time.perf_counter() - start
    for name in (min(arrays), max(arrays)):
        np.testing.assert_array_equal(restored[name], arrays[name])
    size = sum(array.nbytes for array in arrays.values())
    return Timing(saved, blocked, restore_seconds, memory.growth / size)


class MemoryTracker:
    """Largest growth of this process's resident memory."""

    growth: float = 0.0  # bytes


@contextlib.contextmanager
def track_memory() -> Iterator[MemoryTracker]:
    """Sample the memory of this process every 10 ms in a thread."""
    tracker = MemoryTracker()
    done = threading.Event()
    before = _resident_bytes()

    def watch() -> None:
        while not done.wait(0.01):
            tracker.growth = max(tracker.growth, float(_resident_bytes() - before))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield tracker
    finally:
        done.set()
        thread.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def format_report(report: dict[str, Any]) -> str:
    """Return the table; its last line has the ratios."""
    size = report["bytes"]
    copy_seconds = report["copy_seconds"]
    methods = report["methods"]
    lines = [
        f"{size / 1e9:.2f} GB on {N_DEVICES} devices, medians of {report['repeats']}; "
        f"plain copy to host memory {copy_seconds:.2f} s",
        f"{'':<18} {'save s':>7} {'GB/s':>6} {'blocked s':>10} {'x copy':>7} {'restore s':>10} {'GB/s':>6} {'memory':>7}",
    ]
    for name, row in methods.items():
        lines.append(
            f"{name:<18} {row['save']:7.2f} {size / row['save'] / 1e9:6.2f} "
            f"{row['blocked']:10.2f} {row['blocked'] / copy_seconds:7.2f} {row['restore']:10.2f} "
            f"{size / row['restore'] / 1e9:6.2f} {row['memory']:7.2f}"
        )
    native = methods["native"]
    raw = methods["raw"]
    lines.append(f"reading raw files: {size / raw['restore'] / 1e9:.2f} GB/s; restored arrays were compared")
    ratios = (
        f"ratio to raw writing: save {raw['save'] / native['save']:.2f}, restore {raw['save'] / native['restore']:.2f}"
    )
    if orbax := methods.get("orbax"):
        save_ratio = orbax["save"] / native["save"]
        restore_ratio = orbax["restore"] / native["restore"]
        ratios += f"; ratio to Orbax: save {save_ratio:.2f}, restore {restore_ratio:.2f}"
    return "\n".join([*lines, ratios])


if __name__ == "__main__":
    sys.exit(run_command(main))
