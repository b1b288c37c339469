# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Inspect a checkpoint, verify it, or compare two.

examples:
  python scripts/checkpoint.py inspect runs/quickstart
      step, parameters, arrays, configuration and metrics of the latest checkpoint of a run
  python scripts/checkpoint.py verify runs/quickstart/checkpoints/step_1000
      read every byte; print one line per problem, and exit with 1 if there is any
  python scripts/checkpoint.py diff runs/a runs/b --json
      compare names, shapes, dtypes and values, a slice at a time
  python scripts/checkpoint.py inspect s3://bucket/run
      paths can be s3://bucket/path or gs://bucket/path (pip install 'mesh-transformer[remote]')

exit status: 0 success (diff: also if they differ), 1 failed or damaged, 2 usage error
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from mesh_transformer.checkpoint.manifest import ArrayRecord
from mesh_transformer.checkpoint.store import Store
from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError
from mesh_transformer.convert.model_cache import find_model

BLOCK_BYTES = 32_000_000  # bytes of each checkpoint that are compared at once
SUMMARY = (  # configuration fields that inspect prints
    "preset",
    "n_layers",
    "d_model",
    "n_heads",
    "n_vocab",
    "seq_len",
    "batch_size",
    "steps",
    "name",
    "learning_rate",
)


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("action", choices=("inspect", "verify", "diff"), help="operation, as in the examples")
    parser.add_argument(
        "path", metavar="PATH", nargs="+", help="run folder, folder of checkpoints, or folder step_<N>; two for diff"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    expected = 2 if options.action == "diff" else 1
    if len(options.path) != expected:
        arguments_needed = "2 PATH arguments" if expected == 2 else "1 PATH argument"
        raise ConfigError(
            f"{options.action} takes {arguments_needed}, got {len(options.path)}: {' '.join(options.path)}; see --help"
        )
    found = [find_model(path) for path in options.path]
    if options.action == "verify":
        store, step = found[0]
        problems = store.verify(step)
        result = {"path": str(store.folder(step)), "problems": problems}
        print(json.dumps(result) if options.json else "\n".join(problems or [f"{result['path']}: intact"]))
        return 1 if problems else 0
    result = describe(*found[0]) if options.action == "inspect" else compare(*found[0], *found[1])
    format_result = format_description if options.action == "inspect" else format_comparison
    print(json.dumps(result) if options.json else format_result(result))
    return 0


def describe(store: Store, step: int) -> dict[str, Any]:
    """Return everything in a checkpoint except the values, as JSON-compatible data."""
    manifest = store.read_manifest(step)
    arrays = {
        name: {
            "shape": record.shape,
            "axes": record.axes,
            "dtype": record.dtype,
            "bytes": record.nbytes,
            "digest": digest_array(record),
        }
        for name, record in manifest.arrays.items()
    }
    return {
        "path": str(store.folder(step)),
        "step": step,
        "created": manifest.created,
        "parameters": sum(
            math.prod(record.shape) for name, record in manifest.arrays.items() if name.startswith("params/")
        ),
        "bytes": sum(record.nbytes for record in manifest.arrays.values()),
        "files": sum(len(record.files) for record in manifest.arrays.values()) + 2,
        "versions": manifest.versions,
        "arrays": arrays,
        "meta": manifest.meta,
    }


def digest_array(record: ArrayRecord) -> str:
    """Return one digest of an array's files; it is equal for equal values with equal shard shapes."""
    files = "".join(f"{key} {file.digest}\n" for key, file in sorted(record.files.items()))
    return xxhash.xxh3_128_hexdigest(files.encode())


def format_description(result: Mapping[str, Any]) -> str:
    """Return the text that `inspect` prints."""
    lines = [
        f"{result['path']}",
        f"step {result['step']}, saved {result['created']}",
        f"{result['parameters']:,} parameters, {result['bytes']:,} bytes in {result['files']:,} files",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
    ]
    table = [("array", "shape", "axes", "dtype", "bytes", "digest")]
    for name, array in result["arrays"].items():
        shape = "x".join(map(str, array["shape"])) or "scalar"
        table.append(
            (name, shape, " ".join(array["axes"]), array["dtype"], f"{array['bytes']:,}", array["digest"][:12])
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join([*map(str.ljust, row[:4], widths), row[4].rjust(widths[4]), row[5]]) for row in table]
    meta = result["meta"]
    config = meta.get("config")
    metrics = meta.get("metrics")
    parent = meta.get("parent")
    data = meta.get("data_fingerprint")
    if isinstance(parent, dict):
        lines.append("initialized from: " + ", ".join(f"{key} {value}" for key, value in parent.items()))
    if data:
        lines.append(f"data fingerprint: {data}")
    for section, table in config.items() if isinstance(config, dict) else ():
        shown = {key: value for key, value in table.items() if key in SUMMARY} if isinstance(table, dict) else {}
        lines += [f"{section}: " + ", ".join(f"{key} = {value}" for key, value in shown.items())] if shown else []
    if isinstance(metrics, dict) and metrics:
        lines.append("metrics: " + ", ".join(f"{key} {value}" for key, value in metrics.items()))
    return "\n".join(
        line if line.isprintable() else ascii(line) for line in lines
    )  # escape control codes in untrusted text


def compare(store: Store, step: int, other_store: Store, other_step: int) -> dict[str, Any]:
    """Return the names that only one checkpoint has, and the differences of the shapes, dtypes and values of common arrays."""
    left, right = store.open_arrays(step), other_store.open_arrays(other_step)
    arrays: dict[str, Any] = {}
    for name in sorted(left.keys() & right.keys()):
        kinds = [f"{side.record.dtype}{list(side.shape)}" for side in (left[name], right[name])]
        arrays[name] = {"equal": False, "left": kinds[0], "right": kinds[1]} if kinds[0] != kinds[1] else {}
        if (
            left[name].shape == right[name].shape
        ):  # arrays of different dtypes are compared as float64, which is exact for both
            common_dtype = np.float64 if arrays[name] else None
            blocks = (
                tuple(np.asarray(side.read(index), common_dtype) for side in (left[name], right[name]))
                for index in _blocks(left[name].record)
            )
            arrays[name] = _compare_blocks(blocks) | arrays[name]
    only = {"left_only": sorted(left.keys() - right.keys()), "right_only": sorted(right.keys() - left.keys())}
    same = not any(only.values()) and all(array["equal"] for array in arrays.values())
    paths = {"left": str(store.folder(step)), "right": str(other_store.folder(other_step))}
    return {**paths, "equal": same, **only, "arrays": arrays}


def format_comparison(result: Mapping[str, Any]) -> str:
    """Return the text that `diff` prints: one line per difference."""
    lines = [f"left   {result['left']}", f"right  {result['right']}"]
    lines += [f"only left   {name}" for name in result["left_only"]]
    lines += [f"only right  {name}" for name in result["right_only"]]
    for name, array in result["arrays"].items():
        words = [f"{array['left']} and {array['right']}"] if "left" in array else []
        if not array["equal"] and "size" in array:
            words += [f"{array['different']:,} of {array['size']:,} values"]
            words += [f"max |difference| {array['max_difference']:.6g}"]
            words += [f"{array['not_a_number']} NaN on one side"] if array["not_a_number"] else []
        if words:
            lines.append(f"differs     {name}: {', '.join(words)}")
    equal = sum(array["equal"] for array in result["arrays"].values())
    return "\n".join([*lines, f"{equal} of {len(result['arrays'])} common arrays are identical"])


def _compare_blocks(blocks: Iterator[tuple[np.ndarray, ...]]) -> dict[str, Any]:
    size = different = not_a_number = 0
    largest = 0.0
    for left, right in blocks:
        bits = f"u{left.itemsize}"
        unequal = np.atleast_1d(left).view(bits) != np.atleast_1d(right).view(bits)
        size += left.size
        different += int(np.count_nonzero(unequal))
        if unequal.any():
            values = [np.atleast_1d(side)[unequal].astype(np.float64) for side in (left, right)]
            with np.errstate(invalid="ignore"):  # inf - inf
                distance = np.abs(values[0] - values[1])
            not_a_number += int(np.count_nonzero(np.isnan(distance)))
            largest = max(largest, float(np.nan_to_num(distance, nan=0.0, posinf=np.inf).max()))
    values = {"size": size, "different": different, "max_difference": largest, "not_a_number": not_a_number}
    return {"equal": not different, **values}


def _blocks(record: ArrayRecord) -> Iterator[tuple[slice, ...]]:
    """Yield slices of at most BLOCK_BYTES that cover an array, aligned with its shards where possible."""
    shape = [min(part, dim) for part, dim in zip(record.shard, record.shape, strict=True)]
    size = max(record.nbytes // max(math.prod(record.shape), 1), 1)
    for dim in range(len(shape)):
        rest = math.prod(shape[dim + 1 :]) * math.prod(shape[:dim]) * size
        shape[dim] = max(min(shape[dim], BLOCK_BYTES // max(rest, 1)), min(1, shape[dim]))
    if 0 in shape:
        return
    starts = [range(0, dim, part) for dim, part in zip(record.shape, shape, strict=True)]
    for corner in np.ndindex(*map(len, starts)):
        low = [start[i] for start, i in zip(starts, corner, strict=True)]
        yield tuple(slice(a, min(a + part, dim)) for a, part, dim in zip(low, shape, record.shape, strict=True))


if __name__ == "__main__":
    sys.exit(run_command(main))
