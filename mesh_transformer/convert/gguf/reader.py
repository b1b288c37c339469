# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Plan the import of a GGUF model: translate its metadata to config.json and its tensors to a Hugging Face family."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.gguf.architectures import ARCHITECTURES, make_family, read_config
from mesh_transformer.convert.gguf.container import read_gguf
from mesh_transformer.convert.gguf.tensors import open_tensors, subtract_one, undo_rope_order
from mesh_transformer.convert.gguf.tokenizer import read_tokenizer
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.reader import find_array, read_model
from mesh_transformer.convert.import_plan import ImportPlan, PlannedArray, assemble, check_all_used, make_model_config
from mesh_transformer.convert.lazy_arrays import LazyArray
from mesh_transformer.storage.paths import AnyPath


class OpenGGUF(NamedTuple):
    """A GGUF model whose weights have not been read."""

    path: AnyPath  # of the first file
    plan: ImportPlan
    config: dict[str, Any]  # content of config.json, translated from the metadata
    meta: dict[str, Any]  # metadata for a native checkpoint: tokenizer, special IDs and text files


def open_gguf(path: AnyPath) -> OpenGGUF:
    """Plan the import of a GGUF file, a folder with one, or one of a set of split files.

    Raises CheckpointError if the file is damaged, or its architecture, metadata or tensor types are not supported.
    """
    file = read_gguf(path)
    tensors = open_tensors(file.tensors, file.path)
    config, model = read_gguf_model(file.metadata, tensors, file.path)
    name = file.metadata["general.architecture"]
    native = make_model_config(model, file.path)
    arrays = assemble_native(native, name, config["model_type"], tensors, file.path)
    meta = read_tokenizer(file.metadata, file.path)
    return OpenGGUF(file.path, ImportPlan(native, model, arrays, 0), config, meta)


def read_gguf_model(
    metadata: Mapping[str, Any], tensors: Mapping[str, LazyArray], where: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and the [model] section of a GGUF model. Raise CheckpointError if the model is not supported."""
    config = read_config(metadata, tensors, where)
    family = make_family(config["model_type"], metadata["general.architecture"])
    return config, read_model(HFConfig(config, where), family)


def assemble_native(
    config: ModelConfig, name: str, kind: str, tensors: Mapping[str, LazyArray], where: object
) -> dict[str, PlannedArray]:
    """Return the native arrays of a model of architecture `name`. Raise CheckpointError if its tensors do not match."""
    family = make_family(kind, name)
    original = undo_changes(tensors, name, config)
    used: set[str] = set(ARCHITECTURES[name].constants)
    arrays = assemble(config, lambda spec: find_array(original, family, config, spec, used), where)
    check_all_used(set(tensors), used, lambda _: False, where)
    return arrays


def undo_changes(tensors: Mapping[str, LazyArray], name: str, config: ModelConfig) -> dict[str, LazyArray]:
    """Return the tensors of an architecture without the changes that llama.cpp's converter makes."""
    architecture = ARCHITECTURES[name]
    original = dict(tensors)
    for tensor, array in tensors.items():
        module = tensor.rpartition(".")[0]
        if architecture.pairs and module.endswith(("attn_q", "attn_k")):
            original[tensor] = undo_rope_order(array, config.n_heads if module.endswith("attn_q") else config.kv_heads)
        elif architecture.norm_offset and module.endswith("norm"):
            original[tensor] = subtract_one(array)
    return original
