# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure how long a checkpoint takes to load for sampling, and the peak memory relative to the checkpoint's size.

A GPT-J-shaped model with random bfloat16 weights is created, loaded in a separate process as device_sample.py does, and
generates a few tokens. Peak memory is measured for the whole process, after loading and after generation, which adds
the memory of the compiled programs.

examples:
  python scripts/bench/load_test.py
      a checkpoint of 2.4 GB
  python scripts/bench/load_test.py --layers 4 --json
      a small model

exit status: 0 done, 1 failed, 2 wrong usage
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mesh_transformer.scripts.bench.reshard import PROGRAM, make_model_folder

from mesh_transformer.cli import make_parser, run_command

TOKENS = 4  # generated tokens


def main(arguments: list[str]) -> int:
    """Create the model, load it in another process and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--layers", type=int, default=37, help="number of layers, of 28 million parameters each; default: %(default)s"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder with space for two copies of the model; default: a temporary folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--open", type=Path, metavar="RUN", help="only measure this run, in this process, and print JSON"
    )
    options = parser.parse_args(arguments)
    if options.open:
        print(json.dumps(measure(options.open)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        external = Path(temporary) / "huggingface"
        native = Path(temporary) / "native"
        make_model_folder(external, options.layers, "bfloat16")
        run(PROGRAM, external, native, "--tokenizer", "bytes", "--max-memory", "256M")
        result = json.loads(run(__file__, "--open", native).splitlines()[-1])
    if options.json:
        print(json.dumps(result))
        return 0
    size = result["bytes"]
    print(f"{size:,} bytes of weights, loaded in {result['seconds']:.1f} s")
    for name, key in (("after loading", "loaded_peak"), ("after generation", "generated_peak")):
        print(f"{name:<17} peak memory {result[key]:,} bytes, {result[key] / size:.3f} of the weights")
    return 0


def run(program: str | Path, *arguments: str | Path) -> str:
    """Run a program in another process and return its output."""
    command = [sys.executable, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr}")
    return done.stdout


def measure(path: Path) -> dict[str, Any]:
    """Load a checkpoint and generate a few tokens in this process."""
    from mesh_transformer.checkpoint.store import find_checkpoint
    from mesh_transformer.config import SampleConfig
    from mesh_transformer.convert.conversion import peak_memory
    from mesh_transformer.sample.loading import load_model

    store, step = find_checkpoint(path)
    records = store.read_manifest(step).arrays
    nbytes = sum(record.nbytes for name, record in records.items() if name.startswith("params/"))
    start_peak = peak_memory()
    start = time.perf_counter()
    model = load_model(path)
    seconds = time.perf_counter() - start
    loaded_peak = peak_memory()
    model.engine.generate([[1, 2, 3]], SampleConfig(), max_tokens=TOKENS)
    return {
        "bytes": nbytes,
        "seconds": seconds,
        "start_peak": start_peak,
        "loaded_peak": loaded_peak,
        "generated_peak": peak_memory(),
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
