# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint of any supported format: native, Hugging Face, GGUF, or mesh-transformer-jax v1."""

import importlib.util
import json
from typing import Any, NamedTuple

from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config.renamed import translate_stored
from mesh_transformer.convert.gptj.reader import open_gptj
from mesh_transformer.convert.huggingface.reader import is_huggingface, open_huggingface, read_config, read_model
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray, make_model_config
from mesh_transformer.convert.sources import require_existing
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

NATIVE = "native"


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose values have not been read."""

    kind: str  # "native", "huggingface", "gguf" or "gptj-v1"
    path: AnyPath
    plan: ImportPlan
    meta: dict[str, Any]  # metadata of a native checkpoint; tokenizer, special IDs and text files of a GGUF file
    external_config: dict[str, Any]  # content of an external checkpoint's configuration file; otherwise empty


def open_native(path: AnyPath) -> OpenCheckpoint:
    """Open a native checkpoint, or the latest checkpoint of a run folder."""
    store, step = find_checkpoint(path)
    folder = store.folder(step)
    meta = store.read_meta(step)
    stored = meta.get("config", {}).get("model")
    if not isinstance(stored, dict):
        raise CheckpointError(
            f"{folder}: the metadata (meta in manifest.json) has no config.model, the configuration of the model; save the "
            "checkpoint with it"
        )
    model = translate_stored(stored, prefix=("model",))
    arrays = {name: PlannedArray(array, array.record.axes) for name, array in store.open_arrays(step).items()}
    plan = ImportPlan(make_model_config(model, folder), model, arrays, step)
    return OpenCheckpoint("native", folder, plan, meta, {})


def detect_format(path: AnyPath) -> str:
    """Return the format of the model at `path`: "gguf", "gptj-v1", "huggingface" or "native"."""
    if holds_gguf(path):
        return "gguf"
    if path.is_dir() and _find_shards(path):
        return "gptj-v1"
    return "huggingface" if is_huggingface(path) else NATIVE


def open_checkpoint(path: AnyPath, source_config: AnyPath | None = None) -> OpenCheckpoint:
    """Open the checkpoint at `path`, detecting its format. Raise CheckpointError if there is none.

    `source_config` is the JSON configuration of a mesh-transformer-jax checkpoint; default: the file next to the shards.
    """
    require_existing(path)
    match detect_format(path):
        case "gguf":
            return _open_gguf(path)
        case "gptj-v1":
            shards = _find_shards(path)
            assert shards is not None
            return _open_shards(shards, source_config or _find_source_config(shards))
        case "huggingface":
            return OpenCheckpoint("huggingface", path, open_huggingface(path), {}, dict(read_config(path)[0].table))
        case _:
            return open_native(path)


def read_model_section(path: AnyPath) -> dict[str, Any]:
    """Return the [model] section of a checkpoint of any format, from its configuration or header alone.

    The files with the weights of a Hugging Face folder may be missing: config.json suffices. Raises CheckpointError if
    the model is not supported.
    """
    require_existing(path)
    match detect_format(path):
        case "gguf":
            require_gguf(path)
            from mesh_transformer.convert.gguf.container import read_gguf
            from mesh_transformer.convert.gguf.reader import read_gguf_model
            from mesh_transformer.convert.gguf.tensors import open_tensors

            file = read_gguf(path)
            return read_gguf_model(file.metadata, open_tensors(file.tensors, file.path), file.path)[1]
        case "huggingface":
            return read_model(*read_config(path))
        case _:
            return open_checkpoint(path).plan.model


def _find_shards(path: AnyPath) -> AnyPath | None:
    """Return the folder with shard_0, which is `path` or a folder step_N in it."""
    return next((folder for folder in (path, *sorted(path.glob("step_*"))) if (folder / "shard_0").is_dir()), None)


def _find_source_config(shards: AnyPath) -> AnyPath:
    """Return the only configuration of mesh-transformer-jax next to the shards or in the two folders above them."""
    folders = (shards, shards.parent, shards.parent.parent)
    configs = [file for folder in folders for file in sorted(folder.glob("*.json")) if _is_gptj_config(file)]
    if len(configs) != 1:
        raise CheckpointError(
            f"{shards}: a mesh-transformer-jax checkpoint needs its JSON configuration, but {len(configs)} were found next to "
            f"the shards ({', '.join(map(str, configs)) or 'none'}); convert it with scripts/reshard_checkpoint.py --source-config "
            "FILE.json"
        )
    return configs[0]


def _is_gptj_config(file: AnyPath) -> bool:
    try:
        table = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(table, dict) and {"layers", "d_model", "n_heads", "n_vocab"} <= table.keys()


def _open_shards(shards: AnyPath, source_config: AnyPath) -> OpenCheckpoint:
    try:
        config = json.loads(source_config.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source_config}: cannot be read as JSON: {error}; pass the configuration of the checkpoint with --source-config"
        ) from None
    return OpenCheckpoint("gptj-v1", shards, open_gptj(shards, config, str(source_config)), {}, config)


def holds_gguf(path: AnyPath) -> bool:
    """Return whether a path is a GGUF file, or a folder with a GGUF file that is not a Hugging Face model folder."""
    if path.is_file():
        return path.name.endswith(".gguf")
    return path.is_dir() and not is_huggingface(path) and any(path.glob("*.gguf"))


def require_gguf(path: object) -> None:
    """Raise CheckpointError unless the package that reads and writes GGUF files is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path}: GGUF files need the package gguf: pip install 'mesh-transformer[gguf]'")


def _open_gguf(path: AnyPath) -> OpenCheckpoint:
    require_gguf(path)
    from mesh_transformer.convert.gguf.reader import open_gguf

    opened = open_gguf(path)
    return OpenCheckpoint("gguf", opened.path, opened.plan, opened.meta, opened.config)
