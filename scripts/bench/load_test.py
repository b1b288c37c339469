# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint opened for sampling: seconds, and peak memory of the whole process over the checkpoint's own size.

A GPT-J-shaped model with random bfloat16 weights is made, opened in a process of its own as device_sample.py does, and
asked for a few tokens. Opening is what the second figure is about; the first tokens add what compiled programs need.

examples:
  python scripts/bench/load_test.py
      2.4 GB
  python scripts/bench/load_test.py --layers 4 --json
      a small one

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
from mesh_transformer.scripts.reshard_checkpoint import peak_memory

from mesh_transformer.cli import make_parser, run_command

TOKENS = 4


def main(arguments: list[str]) -> int:
    """Make the model, open it in another process, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=37, help="of 28 million parameters each; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where there is room for two copies; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--open", type=Path, metavar="RUN", help="only open this one, in this process")
    options = parser.parse_args(arguments)
    if options.open:
        print(json.dumps(measure(options.open)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        theirs, ours = Path(temporary) / "theirs", Path(temporary) / "ours"
        make_model_folder(theirs, options.layers, "bfloat16")
        run(PROGRAM, theirs, ours, "--tokenizer", "bytes", "--max-memory", "256M")
        found = json.loads(run(__file__, "--open", ours).splitlines()[-1])
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['bytes']:,} bytes of weights, opened in {found['seconds']:.1f} s")
    for what in ("open", "tokens"):
        print(
            f"{what:<7} peak {found[f'{what}_peak']:,} bytes, {found[f'{what}_peak'] / found['bytes']:.3f} of the size"
        )
    return 0


def run(program: Any, *arguments: Any) -> str:
    """Another process's output."""
    command = [sys.executable, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def measure(path: Path) -> dict[str, Any]:
    """Open a checkpoint and draw a few tokens in this process."""
    from mesh_transformer.checkpoint.store import find_checkpoint
    from mesh_transformer.config import SampleConfig
    from mesh_transformer.sample.loading import load_model

    store, step = find_checkpoint(path)
    records = store.read_manifest(step).arrays
    nbytes = sum(record.nbytes for name, record in records.items() if name.startswith("params/"))
    start, before = time.perf_counter(), peak_memory()
    trained = load_model(path)
    seconds, opened = time.perf_counter() - start, peak_memory()
    trained.engine.generate([[1, 2, 3]], SampleConfig(), max_tokens=TOKENS)
    return {
        "bytes": nbytes, "seconds": seconds, "before_peak": before, "open_peak": opened, "tokens_peak": peak_memory()
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
