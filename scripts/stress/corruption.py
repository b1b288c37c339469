# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stress test of checkpoint verification: damage every kind of file and check that the damage is always detected.

examples:
  python scripts/stress/corruption.py --trials 400
      flip bits in, truncate and delete array data, shard indices, zarr.json, manifest.json and COMMIT of a small checkpoint
  python scripts/stress/corruption.py runs/quickstart --trials 40 --json
      the same on copies of the two latest checkpoints of a run

Each trial damages one file of the later of two checkpoints. Restoring that step must then raise an error that names the
file or its array, `verify` must name the file, and `latest_valid` must return the earlier step with a message that names
the damaged file. A trial fails if the damaged step is restored, even with the right values.

exit status: 0 all damage was detected, 1 some was not, 2 wrong usage
"""

import collections
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mesh_transformer.checkpoint.chunk_grid import count_bytes
from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.cli import make_parser, run_command

DAMAGES = ("flip", "truncate", "delete")
KINDS = ("data", "index", "zarr.json", "manifest.json", "COMMIT")


class ByteRange(NamedTuple):
    """Bytes `start` to `stop` of a file of a checkpoint."""

    kind: str  # one of KINDS
    path: Path
    start: int
    stop: int


def main(arguments: list[str]) -> int:
    """Run the stress test and print its result."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="run folder or checkpoint; default: a small checkpoint created for the test",
    )
    parser.add_argument("--trials", type=int, default=300, help="number of damaged files; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="stress-corruption-") as folder:
        root = Path(folder) / "checkpoints"
        if options.path:
            copy_checkpoints(options.path, root)
        else:
            make_checkpoints(root)
        result = run_trials(root, options.trials, random.Random(options.seed))
    print(json.dumps(result) if options.json else format_result(result))
    return 1 if result["missed"] else 0


def format_result(result: dict[str, Any]) -> str:
    """Return a table of the trials, and every trial that failed."""
    lines = [f"{kind:14} {damage:9} {count} of {of}" for (kind, damage, count, of) in result["table"]]
    total = (
        f"{result['detected']} of {result['trials']} damaged files were detected, and the earlier checkpoint was used"
    )
    return "\n".join([*lines, total, *(f"MISSED: {text}" for text in result["missed"])])


def run_trials(root: Path, trials: int, rng: random.Random) -> dict[str, Any]:
    """Damage files of all kinds in all ways, and return the counts of detected damage and a list of missed damage."""
    store = Store(root, keep_last=2)
    earlier, later = store.steps()
    ranges = list_byte_ranges(store, later)
    detected: collections.Counter[tuple[str, str]] = collections.Counter()
    tried: collections.Counter[tuple[str, str]] = collections.Counter()
    missed: list[str] = []
    for trial in range(trials):
        kind = KINDS[trial % len(KINDS)]
        damage = DAMAGES[trial // len(KINDS) % len(DAMAGES)]
        candidates = [each for each in ranges if each.kind == kind]
        target = rng.choices(candidates, [each.stop - each.start for each in candidates])[0]  # weighted by size
        original = target.path.read_bytes()
        description = damage_file(target.path, damage, rng, target.start, target.stop)
        tried[kind, damage] += 1
        problem = check_detection(store, earlier, later, target.path)
        target.path.write_bytes(original)
        if problem:
            missed.append(f"{target.path.relative_to(root)}: {description}: {problem}")
        else:
            detected[kind, damage] += 1
    if store.verify(later):
        missed.append("the checkpoint is still damaged after all files were restored")
    table = [
        (kind, damage, detected[kind, damage], tried[kind, damage])
        for kind in KINDS
        for damage in DAMAGES
        if tried[kind, damage]
    ]
    return {"trials": trials, "detected": detected.total(), "missed": missed, "table": table}


def check_detection(store: Store, earlier: int, later: int, path: Path) -> str:
    """Return a description of how the store failed to detect the damaged file `path`, "" if it detected the damage."""
    arrays = Path(str(store.folder(later))) / "arrays"
    names = [str(path)]
    if path.is_relative_to(arrays):
        names.append(path.parent.relative_to(arrays).as_posix())
    try:
        restore(store, later)
    except ValueError as error:
        if not any(name in str(error) for name in names):
            return f"the error names neither the file nor its array: {error}"
    else:
        return "restored without an error"
    problems = store.verify(later)
    if not any(str(path) in problem for problem in problems):
        return f"verify does not name the file: {problems}"
    messages: list[str] = []
    if store.latest_valid(messages.append) != earlier:
        return "latest_valid is not the earlier step"
    if not any(str(path) in message for message in messages):
        return f"the messages of latest_valid do not name the file: {messages}"
    return ""


def restore(store: Store, step: int) -> dict[str, jax.Array]:
    """Return every array of a checkpoint, on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    records = store.read_manifest(step).arrays
    like = {
        name: jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype), sharding=sharding)
        for name, record in records.items()
    }
    return store.restore(step, like)


def list_files(folder: Path) -> list[Path]:
    """Return every file of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def list_byte_ranges(store: Store, step: int) -> list[ByteRange]:
    """Return the byte ranges that make up a checkpoint."""
    folder = Path(str(store.folder(step)))
    ranges = []
    for name, record in store.read_manifest(step).arrays.items():
        n_chunks = count_bytes(record.shard, record.dtype) // max(count_bytes(record.chunk, record.dtype), 1)
        index_bytes = 16 * n_chunks + 4  # two uint64 per chunk, and a CRC-32C
        for key, file in record.files.items():
            path = folder / "arrays" / name / key
            if key == "zarr.json":
                ranges.append(ByteRange(key, path, 0, file.size))
            else:
                ranges.append(ByteRange("index", path, file.size - index_bytes, file.size))
                ranges.append(ByteRange("data", path, 0, file.size - index_bytes))
    for name in ("manifest.json", "COMMIT"):
        ranges.append(ByteRange(name, folder / name, 0, (folder / name).stat().st_size))
    return [each for each in ranges if each.stop > each.start]


def damage_file(path: Path, damage: str, rng: random.Random, start: int = 0, stop: int | None = None) -> str:
    """Flip a bit in bytes `start` to `stop` of a file, truncate it at one of them, or delete it; return a description."""
    size = path.stat().st_size
    if damage == "delete" or not size:
        path.unlink()
        return "deleted"
    offset = rng.randrange(start, size if stop is None else stop)
    if damage == "truncate":
        os.truncate(path, offset)
        return f"truncated to {offset} of {size} bytes"
    bit = rng.randrange(8)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
    return f"flipped bit {bit} of byte {offset} of {size}"


def make_checkpoints(root: Path) -> None:
    """Save two steps of a small state: an array of several chunks, small arrays, zeros and a scalar."""
    store = Store(root, keep_last=2)
    for step in (1, 2):
        arrays = {
            "params/w": jnp.sin(jnp.arange(2_400_000, dtype=jnp.float32) * step).reshape(2400, 1000),
            "params/b": jnp.full((64,), step, jnp.bfloat16),
            "opt_state/mu/w": jnp.zeros((100, 64)),
            "step": jnp.int32(step),
        }
        axes = {name: ("embed", "ff")[: array.ndim] for name, array in arrays.items()}
        store.save(step, arrays, axes=axes, meta={"data_fingerprint": "0123456789abcdef"})
    store.wait()


def copy_checkpoints(path: str, root: Path) -> None:
    """Copy the checkpoint at `path` and the previous one into `root`; raise ValueError without a previous checkpoint."""
    store, step = find_checkpoint(path)
    earlier = [other for other in store.steps() if other < step]
    if not earlier:
        raise ValueError(
            f"{path}: step {step} has no earlier checkpoint, which the test requires; train with checkpoint.keep_last=2 or more"
        )
    for each in (step, earlier[-1]):
        shutil.copytree(str(store.folder(each)), root / f"step_{each}")


if __name__ == "__main__":
    sys.exit(run_command(main))
