# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint of any supported format: native, Hugging Face, or mesh-transformer-jax v1."""

import json
from typing import Any, NamedTuple

from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config.renamed import translate_stored
from mesh_transformer.convert.gptj.reader import open_gptj
from mesh_transformer.convert.huggingface.reader import is_huggingface, open_huggingface, read_config
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray, make_model_config
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath


class OpenCheckpoint(NamedTuple):
    """A checkpoint whose values have not been read."""

    kind: str  # "native", "huggingface" or "gptj-v1"
    path: AnyPath
    plan: ImportPlan
    meta: dict[str, Any]  # metadata of a native checkpoint
    external_config: dict[str, Any]  # configuration file of an external checkpoint


def open_native(path: AnyPath) -> OpenCheckpoint:
    """Open a native checkpoint, or the latest one of a run folder."""
    store, step = find_checkpoint(path)
    folder = store.folder(step)
    meta = store.read_meta(step)
    stored = meta.get("config", {}).get("model")
    if not isinstance(stored, dict):
        raise CheckpointError(f"{folder}: the metadata has no config.model")
    model = translate_stored(stored, prefix=("model",))
    arrays = {name: PlannedArray(array, array.record.axes) for name, array in store.open_arrays(step).items()}
    plan = ImportPlan(make_model_config(model, folder), model, arrays, step)
    return OpenCheckpoint("native", folder, plan, meta, {})


def open_checkpoint(path: AnyPath, source_config: AnyPath | None = None) -> OpenCheckpoint:
    """Open the checkpoint at `path`, detecting its format. Raise CheckpointError if there is none.

    `source_config` is the JSON configuration of a mesh-transformer-jax checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    candidates = [path, *sorted(path.glob("step_*"))]
    shards = next((folder for folder in candidates if (folder / "shard_0").is_dir()), None)
    if shards:
        if source_config is None:
            raise CheckpointError(
                f"{shards}: a mesh-transformer-jax checkpoint; pass its JSON configuration with --source-config"
            )
        try:
            config = json.loads(source_config.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source_config}: not a JSON file: {error}") from None
        return OpenCheckpoint("gptj-v1", shards, open_gptj(shards, config, str(source_config)), {}, config)
    if is_huggingface(path):
        return OpenCheckpoint("huggingface", path, open_huggingface(path), {}, dict(read_config(path)[0].table))
    return open_native(path)
