# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Logits of a Hugging Face model folder, computed by transformers in a separate process.

The NumPy reimplementations read config.json with the importer's code, so a mistake in that code affects both sides of a
comparison. transformers shares no code with the importer.
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

OVERHEAD_BYTES = 1 << 30  # memory of PyTorch and transformers without a model
COPIES = 1.25  # memory to load a model, as a multiple of its float32 weights


def unavailable_reason(folder: AnyPath, weight_count: int) -> str:
    """Return the reason why transformers cannot run the model of a folder on this machine; "" if there is none."""
    if not isinstance(folder, Path):
        return f"{folder} is not a local folder"
    missing = [name for name in ("transformers", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    needed = int(4 * weight_count * COPIES) + OVERHEAD_BYTES
    free = available_memory()
    if needed <= free:
        return ""
    return f"the model needs about {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free"


def library_version() -> str:
    """Return "transformers" and its installed version."""
    return f"transformers {importlib.metadata.version('transformers')}"


def run_library(folder: Path, architecture: str, tokens: np.ndarray, encoder_tokens: np.ndarray | None) -> np.ndarray:
    """Return the float32 logits [B, T, V] of transformers for tokens [B, T].

    `encoder_tokens` [B, S] are the input of an encoder-decoder model's encoder. Raises CheckpointError, with the last line
    that the process wrote, if transformers cannot load or run the model.
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


def attention_of(architecture: str) -> str:
    """Return the `attn_implementation` for a model class: "eager", which computes every score, or "sdpa" for Falcon.

    In transformers 5, "eager" adds the ALiBi bias of Falcon twice.
    """
    return "sdpa" if architecture.startswith("Falcon") else "eager"


def compute_logits(model: Any, tokens: np.ndarray, encoder_tokens: np.ndarray | None) -> np.ndarray:
    """Return the float32 logits [B, T, V] of a model of transformers; `encoder_tokens` is the input of its encoder, if any."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        if encoder_tokens is None:
            return model(ids, use_cache=False).logits.float().numpy()
        encoder_ids = torch.tensor(encoder_tokens, dtype=torch.long)
        return model(input_ids=encoder_ids, decoder_input_ids=ids, use_cache=False).logits.float().numpy()


def main(folder: str, architecture: str, inputs: str, output: str) -> None:
    """Load the model, run it and write its logits."""
    import torch
    import transformers

    model_class: Any = getattr(transformers, architecture)
    model, loaded = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention_of(architecture), output_loading_info=True
    )
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        missing, mismatched = sorted(loaded["missing_keys"])[:5], sorted(map(str, loaded["mismatched_keys"]))[:5]
        raise ValueError(f"tensors of {architecture} that are missing: {missing}; of another shape: {mismatched}")
    with np.load(inputs) as file:
        encoder_tokens = file["encoder"] if file["encoder"].size else None
        np.save(output, compute_logits(model.eval(), file["tokens"], encoder_tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
