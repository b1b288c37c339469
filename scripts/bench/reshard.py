# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Convert between all checkpoint formats at a realistic size: speed next to cp, peak memory, largest logit difference.

A model with random weights, a GPT-J or for GGUF a Llama, is created as a Hugging Face folder, and reshard_checkpoint.py
converts it between all pairs of formats. Before and after each conversion the source is copied with cp and synced to disk.
The ratio of a round is the time that the faster copy would take for a file of the size of the result, divided by the
conversion's time to write, both synced to disk; the ratio of a pair of formats is the median of its rounds. (A quantized
source becomes a result of two to seven times its size.) A conversion also reads all data twice for verification, which is
reported separately.

examples:
  python scripts/bench/reshard.py
      2.4 GB, a memory limit of 256 MB
  python scripts/bench/reshard.py --layers 4 --max-memory 1G --json
      a small model
  python scripts/bench/reshard.py --quantized fp8 --layers 16
      a model in FP8 with scales of blocks, 0.8 GB, which becomes 1.2 GB of bfloat16
  python scripts/bench/reshard.py --quantized Q8_0 --layers 8
      a GGUF file, 0.4 GB, which becomes 1.5 GB of float32

exit status: 0 done, 1 failed, 2 wrong usage
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ModelConfig
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.reader import find_family, pack_tensors
from mesh_transformer.convert.huggingface.tensor_files import TensorSpec, create_safetensors, write_values
from mesh_transformer.convert.import_plan import PREFIX
from mesh_transformer.convert.lazy_arrays import FLOAT32, FileArray, to_dtype
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params

PROGRAM = Path(__file__).parents[1] / "reshard_checkpoint.py"
FORMATS = ("huggingface", "native", "gptj-v1")
FP8 = "fp8"  # of --quantized
FP8_TYPE = "float8_e4m3fn"
FP8_BLOCK, FP8_STEP = 128, 1e-3  # size of a block, and its scale


def main(arguments: list[str]) -> int:
    """Create the model, convert it between all pairs of formats and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--layers", type=int, default=16, help="number of layers, of 28 million parameters each; default: %(default)s"
    )
    parser.add_argument("--max-memory", default="256M", help="memory limit of each conversion; default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of conversions of each pair of formats; default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder with space for four copies of the model; default: a temporary folder"
    )
    parser.add_argument(
        "--quantized",
        metavar="TYPE",
        help='convert only a quantized model, to native: "fp8", or the type of a GGUF file, such as Q8_0',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        make_model_folder(root / "huggingface", options.layers, options.quantized)
        first = [(FORMATS[0], target) for target in FORMATS[1:]]  # writes the sources of the other pairs
        pairs = [*first, *(pair for pair in itertools.product(FORMATS, FORMATS) if pair not in first)]
        if options.quantized == FP8:
            pairs = first[:1]
        elif options.quantized:
            convert(root, "huggingface", "gguf", options.max_memory, ["--gguf-type", options.quantized])
            pairs = [("gguf", "native")]
        rows = []
        for source, target in pairs:
            rounds = [convert(root, source, target, options.max_memory) for _ in range(options.rounds)]
            rows.append(median_round(rounds))
    if options.json:
        print(json.dumps(rows))
        return 0
    print(
        f"{'from':<12} {'to':<12} {'GB':>5} {'peak MB':>8} {'cp MB/s':>8} {'MB/s':>6} {'verified':>11} {'logits':>9} {'ratio':>6}"
    )
    for row in rows:
        print(
            f"{row['source']:<12} {row['target']:<12} {row['bytes'] / 1e9:5.2f} {row['peak_memory_mb']:8,} "
            f"{row['cp_mb_per_s']:8,.0f} {row['written_mb_per_s']:6,.0f} {row['mb_per_s']:11,.0f} "
            f"{row['max_logit_difference']:9.2g} {row['ratio']:6.2f}"
        )
    print(f"median ratio to cp {np.median([row['ratio'] for row in rows]):.2f}")
    return 0


def make_model_folder(folder: Path, n_layers: int, quantized: str | None = None) -> None:
    """Write a model with narrow layers and random weights as a Hugging Face folder with one safetensors file.

    It is a GPT-J in float32, or a Llama if it will be `quantized` as a GGUF file. With FP8, the matrices of layers have
    scales of blocks, as in DeepSeek V3, and the rest is bfloat16.
    """
    is_fp8 = quantized == FP8
    is_llama = quantized is not None and not is_fp8
    sizes: dict[str, Any] = {"d_ff": 6144} if is_llama else {"rope_dims": 32}
    sizes |= {"n_layers": n_layers, "d_model": 1536, "n_heads": 16}
    config = ModelConfig(**PRESETS["llama-7b" if is_llama else "gptj-6b"] | sizes)
    family, table = find_family(config)
    folder.mkdir()
    native = {
        PREFIX + name: FileArray(folder, 0, info.shape, FLOAT32)
        for name, info in flatten_names(describe_params(config)).items()
    }
    shapes = {name: tensor.shape for name, tensor in pack_tensors(config, native, FAMILIES[family]).items()}
    specs = {name: TensorSpec(shape, to_dtype("bfloat16" if is_fp8 else "float32")) for name, shape in shapes.items()}
    if is_fp8:
        table |= {
            "dtype": "bfloat16",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK] * 2},
        }
        for name in [name for name, shape in shapes.items() if ".h." in name and len(shape) == 2]:
            specs[name] = TensorSpec(shapes[name], to_dtype(FP8_TYPE))
            blocks = tuple(-(-dim // FP8_BLOCK) for dim in shapes[name])
            specs[f"{name}_scale_inv"] = TensorSpec(blocks, to_dtype("float32"))
    (folder / "config.json").write_text(json.dumps(table))
    rng = np.random.default_rng(0)
    for name, target in create_safetensors(folder / "model.safetensors", specs).items():
        scale = 0.7 / math.sqrt(target.shape[-1]) if len(target.shape) == 2 else 0.1
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        values = rng.standard_normal(target.shape, np.float32) * scale + mean
        if name.endswith("_scale_inv"):
            values = np.full(target.shape, FP8_STEP, np.float32)
        elif target.dtype == to_dtype(FP8_TYPE):
            values /= FP8_STEP
        write_values(target, 0, values.astype(target.dtype))


def convert(root: Path, source: str, target: str, max_memory: str, more: Sequence[str] = ()) -> dict[str, Any]:
    """Convert once and return the measurements; the source is copied before and after. A format's first result is kept."""
    result = root / f"{source}-to-{target}"
    command = [sys.executable, str(PROGRAM), str(root / source), str(result), "--format", target, "--verify", "own"]
    command += ["--max-memory", max_memory, "--json", *more]
    if source == "gptj-v1":
        command += ["--source-config", str(root / source / "config.json")]
    seconds_before = copy(root / source, root / "copy")
    os.sync()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"the conversion from {source} to {target} failed with status {done.returncode}: {done.stderr}"
        )
    cp_seconds = min(seconds_before, copy(root / source, root / "copy"))
    report = json.loads(done.stdout)
    if (root / target).exists():
        shutil.rmtree(result)
    else:
        result.rename(root / target)
    size = sum(file.stat().st_size for file in (root / source).rglob("*") if file.is_file())
    cp_rate = size / cp_seconds / 1e6
    rate = report["bytes"] / report["write_seconds"] / 1e6
    row = {
        "source": source,
        "target": target,
        "cp_mb_per_s": cp_rate,
        "written_mb_per_s": rate,
        "ratio": rate / cp_rate,
    }
    return row | {key: report[key] for key in ("bytes", "peak_memory_mb", "mb_per_s", "max_logit_difference")}


def median_round(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round with the median ratio, but the largest memory and logit difference of all rounds."""
    worst = {key: max(row[key] for row in rounds) for key in ("peak_memory_mb", "max_logit_difference")}
    return sorted(rounds, key=lambda row: row["ratio"])[len(rounds) // 2] | worst


def copy(source: Path, destination: Path) -> float:
    """Copy a folder with cp and sync, delete the copy, and return the seconds of copying."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


if __name__ == "__main__":
    sys.exit(run_command(main))
