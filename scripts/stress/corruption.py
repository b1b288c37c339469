# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Damage a checkpoint in every kind of place and show that none of it is ever restored as if nothing had happened.

examples:
  python scripts/stress/corruption.py --trials 400
      flip, cut and delete in array data, shard indices, zarr.json, manifest.json and COMMIT of a small checkpoint
  python scripts/stress/corruption.py runs/quickstart --trials 40 --json
      the same on a copy of the newest checkpoint of a run

In each trial one file of the newer of two checkpoints is damaged. Restoring that step must then raise an error that
names the file or its array, `verify` must name it, and the newest intact step must be the older one, with a message
that names what is damaged. A trial fails if anything is restored, whatever the values.

exit status: 0 all found, 1 something was not, 2 wrong usage
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

HOW = ("flip", "truncate", "delete")
KINDS = ("data", "index", "zarr.json", "manifest.json", "COMMIT")


class Place(NamedTuple):
    """Bytes `low` to `high` of a file of a checkpoint."""

    kind: str
    path: Path
    low: int
    high: int


def main(arguments: list[str]) -> int:
    """Parse, damage, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "path", metavar="PATH", nargs="?", help="a run folder or a checkpoint; by default one made here"
    )
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="prove-damage-") as folder:
        root = Path(folder) / "checkpoints"
        if options.path:
            copy_checkpoint(options.path, root)
        else:
            make_checkpoints(root)
        result = prove(root, options.trials, random.Random(options.seed))
    print(json.dumps(result) if options.json else format_result(result))
    return 1 if result["missed"] else 0


def format_result(result: dict[str, Any]) -> str:
    """A table, and every trial that failed."""
    lines = [f"{kind:14} {how:9} {count} of {of}" for (kind, how, count, of) in result["table"]]
    total = f"{result['found']} of {result['trials']} damages found, named, and answered with the older checkpoint"
    return "\n".join([*lines, total, *(f"MISSED: {text}" for text in result["missed"])])


def prove(root: Path, trials: int, chance: random.Random) -> dict[str, Any]:
    """Trials spread over kinds of places and of damage; what was found and what was missed."""
    store = Store(root, keep_last=2)
    older, newer = store.steps()
    places = list_places(store, newer)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    tried: collections.Counter[tuple[str, str]] = collections.Counter()
    missed: list[str] = []
    for trial in range(trials):
        kind, how = KINDS[trial % len(KINDS)], HOW[trial // len(KINDS) % len(HOW)]
        fitting = [place for place in places if place.kind == kind]
        place = chance.choices(fitting, [place.high - place.low for place in fitting])[0]  # the larger the more often
        saved = place.path.read_bytes()
        what = damage_file(place.path, how, chance, place.low, place.high)
        tried[kind, how] += 1
        problem = find_fault(store, older, newer, place.path)
        place.path.write_bytes(saved)
        if problem:
            missed.append(f"{place.path.relative_to(root)}: {what}: {problem}")
        else:
            found[kind, how] += 1
    if store.verify(newer):
        missed.append("the checkpoint was not whole again at the end")
    table = [(kind, how, found[kind, how], tried[kind, how]) for kind in KINDS for how in HOW if tried[kind, how]]
    return {"trials": trials, "found": sum(found.values()), "missed": missed, "table": table}


def find_fault(store: Store, older: int, newer: int, path: Path) -> str:
    """What went wrong in answer to a damaged file; empty if everything is as it should be."""
    array = (
        path.parent.relative_to(Path(str(store.folder(newer))) / "arrays").as_posix() if "arrays" in path.parts else ""
    )
    names = [str(path), *([array] if array else [])]
    try:
        restore(store, newer)
    except ValueError as error:
        if not any(name in str(error) for name in names):
            return f"the error names neither file nor array: {error}"
    else:
        return "restored without an error"
    if not any(str(path) in problem for problem in store.verify(newer)):
        return f"verify names {store.verify(newer)}"
    said: list[str] = []
    if store.latest_valid(said.append) != older:
        return "newest_intact is not the older step"
    if not any(str(path) in text for text in said):
        return f"what is said names another file: {said}"
    return ""


def restore(store: Store, step: int) -> dict[str, jax.Array]:
    """Every array of a checkpoint, on one device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    records = store.read_manifest(step).arrays
    like = {
        name: jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype), sharding=place)
        for name, record in records.items()
    }
    return store.restore(step, like)


def list_files(folder: Path) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def list_places(store: Store, step: int) -> list[Place]:
    """Every place of a checkpoint that can be damaged."""
    folder, places = store.folder(step), []
    for name, record in store.read_manifest(step).arrays.items():
        n_chunks = count_bytes(record.shard, record.dtype) // max(count_bytes(record.chunk, record.dtype), 1)
        index_bytes = 16 * n_chunks + 4  # two numbers a chunk, and crc32c
        for key, file in record.files.items():
            path = Path(str(folder)) / "arrays" / name / key
            if key == "zarr.json":
                places.append(Place(key, path, 0, file.size))
            else:
                places.append(Place("index", path, file.size - index_bytes, file.size))
                places.append(Place("data", path, 0, file.size - index_bytes))
    for name in ("manifest.json", "COMMIT"):
        path = Path(str(folder)) / name
        places.append(Place(name, path, 0, path.stat().st_size))
    return [place for place in places if place.high > place.low]


def damage_file(path: Path, how: str, chance: random.Random, low: int = 0, high: int | None = None) -> str:
    """Flip a bit between two places of a file, cut it there, or delete it; what was done."""
    size = path.stat().st_size
    if how == "delete" or not size:
        path.unlink()
        return "deleted"
    place = chance.randrange(low, size if high is None else high)
    if how == "truncate":
        os.truncate(path, place)
        return f"cut to {place} of {size} bytes"
    bit = chance.randrange(8)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} of {size} flipped"


def make_checkpoints(root: Path) -> None:
    """Two steps of a small state: arrays of several chunks, small ones, zeros, a scalar."""
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


def copy_checkpoint(path: str, root: Path) -> None:
    """The newest checkpoint that `path` means, and the one before it."""
    store, step = find_checkpoint(path)
    shutil.copytree(str(store.folder(step)), root / f"step_{step}")
    if len(steps := [other for other in store.steps() if other < step]) == 0:
        raise ValueError(f"{path}: there is no older checkpoint to fall back to")
    shutil.copytree(str(store.folder(steps[-1])), root / f"step_{steps[-1]}")


if __name__ == "__main__":
    sys.exit(run_command(main))
