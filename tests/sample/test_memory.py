# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint takes little more memory than its weights, which keep their data type."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from mesh_transformer.checkpoint.store import Store
from mesh_transformer.config import ModelConfig
from mesh_transformer.data.tokenizers import ByteTokenizer
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, re, sys
from pathlib import Path
from mesh_transformer.config import SampleConfig
from mesh_transformer.sample.loading import load_model

def read(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

small, large = sys.argv[1:]
load_model(small)  # excludes the memory of imports and compilation
before = read("VmRSS")
model = load_model(large)
loaded = read("VmHWM") - before
[[done]] = model.engine.generate([[1, 2, 3]], SampleConfig(), max_tokens=2)
print(json.dumps({"loaded": loaded, "sampled": read("VmHWM") - before, "tokens": len(done.tokens)}))
"""


def save(folder: Path, **sizes: int) -> int:
    """Write a checkpoint of bfloat16 zeros and return the bytes of its weights."""
    model = dict(n_heads=8, n_vocab=264, seq_len=32, positions="rope-interleaved", **sizes)
    described = flatten_names(describe_params(ModelConfig(**model)))
    store = Store(folder / "checkpoints")
    arrays = {f"params/{name}": jnp.zeros(info.shape, jnp.bfloat16) for name, info in described.items()}
    axes = {f"params/{name}": info.axes for name, info in described.items()}
    store.save(1, arrays, axes=axes, meta={"config": {"model": model}, "tokenizer": ByteTokenizer().to_json()})
    store.wait()
    return sum(array.nbytes for array in arrays.values())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    save(tmp_path / "small", n_layers=1, d_model=64)
    size = save(tmp_path / "large", n_layers=16, d_model=1024)
    assert size > 400_000_000
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == 2
    assert size * 0.9 < found["loaded"] < size * 1.15
    assert found["sampled"] < size * 2, "all weights were converted at once"
