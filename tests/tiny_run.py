# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The configuration file of a run of a few seconds, for tests."""

import json
from pathlib import Path

MODEL = dict(n_layers=1, d_model=16, n_heads=2, n_vocab=264, seq_len=16)


def write_tiny_run(path: Path, texts: str | Path, run_dir: str | Path, **sections: dict[str, object]) -> Path:
    """Write the configuration of a tiny run on `texts` to `path`, and return the path.

    `sections` has fields to add or to change, by section: model=dict(n_layers=2). The cache is beside the file.
    """
    table: dict[str, dict[str, object]] = {
        "run": dict(dir=str(run_dir)),
        "model": MODEL,
        "data": dict(cache_dir=str(path.parent / "cache")),
        "data.train.texts": dict(path=str(texts)),
        "train": dict(steps=3, batch_size=2, log_every=1),
        "checkpoint": dict(every=2),
    }
    for name, fields in sections.items():
        table[name] = table.get(name, {}) | fields
    lines = [
        line
        for name, fields in table.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items()))
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
