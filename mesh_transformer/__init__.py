# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Model-parallel language models in JAX: train, sample and reshard, from one file, on any mesh of devices.

`import mesh_transformer as mt` gives the functions of `mesh_transformer.library`, loaded on first use: importing the package
itself imports neither JAX nor anything else that is slow.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "2.0.0"

if TYPE_CHECKING:
    from mesh_transformer.config import Config, ConfigError, load_config
    from mesh_transformer.library import Encoder, Model, load_model, make_mesh, reshard, train_model

__all__ = [
    "Config",
    "ConfigError",
    "Encoder",
    "Model",
    "load_config",
    "load_model",
    "make_mesh",
    "reshard",
    "train_model",
]

_LIBRARY = ("Encoder", "Model", "load_model", "make_mesh", "reshard", "train_model")
_CONFIG = ("Config", "ConfigError", "load_config")


def __getattr__(name: str) -> Any:
    for module, names in (("mesh_transformer.library", _LIBRARY), ("mesh_transformer.config", _CONFIG)):
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'mesh_transformer' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
