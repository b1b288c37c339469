# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every kind of checkpoint to every other at a real size: speed beside cp of the same bytes, peak memory, largest logit difference.

A GPT-J-shaped model with random weights is made as a Hugging Face folder and converted from kind to kind by
reshard_checkpoint.py. Before and after each conversion the source is copied with cp and synced to disk; a round's ratio
is the faster copy's time over the conversion's, both with everything durable on disk, and a pair's the median of its
rounds. A conversion also reads everything twice more, to prove it, which is counted separately.

examples:
  python scripts/bench/reshard.py
      2.4 GB, a ceiling of 256 MB
  python scripts/bench/reshard.py --layers 4 --max-memory 1G --json
      a small one

exit status: 0 done, 1 failed, 2 wrong usage
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ModelConfig
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.convert.huggingface.reader import find_family
from mesh_transformer.convert.huggingface.tensor_files import TensorSpec, create_safetensors, write_values
from mesh_transformer.convert.huggingface.tensor_map import FAMILIES
from mesh_transformer.convert.lazy_arrays import to_dtype

PROGRAM = Path(__file__).parent / "reshard_checkpoint.py"
KINDS = ("huggingface", "native", "gptj-v1")


def main(arguments: list[str]) -> int:
    """Make the model, convert it nine times, print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=16, help="of 28 million parameters each; default: %(default)s")
    parser.add_argument("--max-memory", default="256M", help="of each conversion; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of each pair; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where there is room for four copies; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        make_model_folder(root / "huggingface", options.layers)
        rest = [(a, b) for a in KINDS for b in KINDS if a != KINDS[0] or a == b]
        pairs = [*((KINDS[0], kind) for kind in KINDS[1:]), *rest]  # these make the sources of the others
        rows = [middle([convert(root, *pair, options.max_memory) for _ in range(options.rounds)]) for pair in pairs]
    if options.json:
        print(json.dumps(rows))
        return 0
    print(
        f"{'from':<12} {'to':<12} {'GB':>5} {'peak MB':>8} {'cp MB/s':>8} {'MB/s':>6} {'with proof':>11} {'logits':>9} {'ratio':>6}"
    )
    for row in rows:
        print(
            f"{row['pair'][0]:<12} {row['pair'][1]:<12} {row['bytes'] / 1e9:5.2f} {row['peak_memory_mb']:8,} "
            f"{row['cp_mb_per_s']:8,.0f} {row['written_mb_per_s']:6,.0f} {row['mb_per_s']:11,.0f} "
            f"{row['max_logit_difference']:9.2g} {row['ratio']:6.2f}"
        )
    print(f"median ratio to cp {np.median([row['ratio'] for row in rows]):.2f}")
    return 0


def make_model_folder(folder: Path, n_layers: int, dtype: str = "float32") -> None:
    """A GPT-J with narrow layers and random weights in one safetensors file."""
    small: dict[str, Any] = dict(n_layers=n_layers, d_model=1536, n_heads=16, rope_dims=32)
    config = ModelConfig(**PRESETS["gptj-6b"] | small)
    kind, table = find_family(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    shapes: dict[str, tuple[int, ...]] = {}
    d, ff, vocab = config.d_model, config.ff_dim, config.n_vocab
    sizes = {"embed": d, "(heads head_dim)": d, "(kv_heads head_dim)": d, "ff": ff, "vocab": vocab}
    for mapping in FAMILIES[kind].mappings.values():
        shape = tuple(
            sizes[word]
            for word in mapping.pattern.replace("(heads head_dim)", "embed")
            .replace("(kv_heads head_dim)", "embed")
            .split()
        )
        layers = range(n_layers) if "{i}" in mapping.name else [0]
        shapes |= {
            mapping.name.replace("{i}", str(i)): shape for i in layers if not mapping.name.endswith(("_proj.bias",))
        }
    planned = {name: TensorSpec(shape, to_dtype(dtype)) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    for name, target in create_safetensors(folder / "model.safetensors", planned).items():
        values = rng.standard_normal(target.shape, np.float32) * (
            0.7 / math.sqrt(target.shape[-1]) if len(target.shape) == 2 else 0.1
        )
        write_values(target, 0, values + (1.0 if ".ln_" in name and name.endswith("weight") else 0.0))


def convert(root: Path, source: str, kind: str, max_memory: str) -> dict[str, Any]:
    """One conversion between two copies of its source; the result stays if it is the first of its kind."""
    result = root / f"{source}-to-{kind}"
    old = ["--source-config", str(root / source / "config.json")] if source == "gptj-v1" else []
    command = [
        sys.executable,
        str(PROGRAM),
        str(root / source),
        str(result),
        "--format",
        kind,
        "--max-memory",
        max_memory,
    ]
    copies = [copy(root / source, root / "copy")]
    os.sync()
    done = subprocess.run([*command, *old, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source} to {kind}: {done.stderr}")
    copies.append(copy(root / source, root / "copy"))
    report = json.loads(done.stdout)
    if (root / kind).exists():
        shutil.rmtree(result)
    else:
        result.rename(root / kind)
    written = report["bytes"] / report["write_seconds"] / 1e6
    size = sum(file.stat().st_size for file in (root / source).rglob("*") if file.is_file())
    cp = size / min(copies) / 1e6
    keep = ("bytes", "peak_memory_mb", "mb_per_s", "max_logit_difference")
    return {"pair": (source, kind), "cp_mb_per_s": cp, "written_mb_per_s": written, "ratio": written / cp} | {
        key: report[key] for key in keep
    }


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median ratio, with the largest memory and difference of all."""
    worst = {key: max(row[key] for row in rounds) for key in ("peak_memory_mb", "max_logit_difference")}
    return sorted(rounds, key=lambda row: row["ratio"])[len(rounds) // 2] | worst


def copy(source: Path, destination: Path) -> float:
    """Seconds of cp and sync."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


if __name__ == "__main__":
    sys.exit(run_command(main))
