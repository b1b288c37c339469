# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Logits of a Hugging Face model folder as transformers itself computes them, in a process of its own.

A reimplementation reads config.json as the importer does, so that both share a mistake. This is the comparison from outside.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.host_memory import available_memory
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

OVERHEAD_BYTES = 1 << 30  # of PyTorch and transformers themselves
COPIES = 1.25  # of the float32 weights while a model is loaded


def why_not(folder: AnyPath, weight_count: int) -> str:
    """Return why transformers cannot run the model of a folder here, or nothing if it can."""
    if not isinstance(folder, Path):
        return f"{folder} is not a local folder"
    missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    needed = int(4 * weight_count * COPIES) + OVERHEAD_BYTES
    free = available_memory()
    return f"it needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free" if needed > free else ""


def describe() -> str:
    """Return the name and version of the library."""
    return f"transformers {importlib.metadata.version('transformers')}"


def run_library(folder: Path, architecture: str, tokens: np.ndarray, encoder_tokens: np.ndarray | None) -> np.ndarray:
    """Return the float32 logits [B, T, V] of transformers for tokens [B, T].

    `encoder_tokens` [B, S] are the input of an encoder-decoder model's encoder. CheckpointError with the last line that the
    process wrote if transformers cannot load or run the model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "tokens.npz"
        output = Path(temporary) / "logits.npy"
        np.savez(inputs, tokens=tokens, encoder=np.zeros((0, 0)) if encoder_tokens is None else encoder_tokens)
        command = [sys.executable, "-m", __name__, str(folder.absolute()), architecture, str(inputs), str(output)]
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not output.is_file():
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise CheckpointError(f"{folder}: transformers cannot run this model: {reason[0]}")
        return np.load(output)


def main(folder: str, architecture: str, inputs: str, output: str) -> None:
    """Load the model, run it and write its logits."""
    import torch
    import transformers

    model_class: Any = getattr(transformers, architecture)
    model, loaded = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        raise ValueError(f"tensors that the class needs are missing: {sorted(loaded['missing_keys'])[:5]}")
    with np.load(inputs) as file, torch.no_grad():
        ids = {name: torch.tensor(file[name], dtype=torch.long) for name in file}
        if ids["encoder"].numel():
            result = model.eval()(input_ids=ids["encoder"], decoder_input_ids=ids["tokens"], use_cache=False)
        else:
            result = model.eval()(ids["tokens"])
    np.save(output, result.logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
