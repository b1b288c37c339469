# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A trained model ready to sample, from a run folder or a checkpoint, which carries its configuration and tokenizer."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from mesh_transformer.checkpoint.store import find_checkpoint
from mesh_transformer.config import Config, ConfigError, merge_override, parse_config
from mesh_transformer.config.renamed import translate_stored
from mesh_transformer.data.span_corruption import SentinelTokenizer
from mesh_transformer.data.tokenizers import Tokenizer, tokenizer_from_json
from mesh_transformer.mesh import MeshLayout, init_devices, keep_freed_memory
from mesh_transformer.model.params import STACK, ParamInfo, Params, flatten_names
from mesh_transformer.model.transformer import describe_params
from mesh_transformer.sample.engine.encoder_decoder import EncoderDecoderEngine
from mesh_transformer.sample.engine.engine import DecoderOnlyEngine
from mesh_transformer.storage.paths import AnyPath

SETTABLE = ("sample.", "serve.", "evaluate.", "mesh.", "model.dtype")
# Sections that a model brought from elsewhere has not, for it was not trained by a run of ours.
NO_TRAINING = {"data": {"train": {"unknown": {"path": ""}}}, "train": {"steps": 1, "batch_size": 1}}
ONE_DEVICE = {"data": 1}  # a checkpoint's mesh is that of its training; sampling starts from one device


class LoadedModel(NamedTuple):
    """What sampling needs of a run."""

    engine: DecoderOnlyEngine  # of a model with an encoder a RewritingEngine
    tokenizer: Tokenizer
    config: Config  # that of the training, with sections mesh and sample as they are now
    step: int
    where: str  # folder of the checkpoint


def load_model(path: str | AnyPath, overrides: Iterable[str] = ()) -> LoadedModel:
    """The newest intact checkpoint in `path`, or `path` itself, on the devices of `mesh.*` in `overrides` (default: one).

    Only weights are read, each device its own slices. Raises ConfigError or CheckpointError: no such run, damage, an
    override that would change the model, a mesh that does not fit.
    """
    keep_freed_memory(True)  # before there are threads: one arena
    store, step = find_checkpoint(path, report=lambda text: print(text, file=sys.stderr))
    where = f"{store.root}/step_{step}"
    meta = store.read_meta(step)
    config = read_model_config(meta, where, overrides)
    if "tokenizer" not in meta:
        raise ConfigError(f"{where} carries no tokenizer; convert it again with --tokenizer PATH")
    layout = init_devices(config.mesh)
    records = store.read_manifest(step).arrays
    dtypes = {name: record.dtype for name, record in records.items()}
    # The engine wants every layer by itself: so read, no second copy of a stack is ever in memory.
    stacks = [name for name, record in records.items() if record.axes[:1] == (STACK,) and name.startswith("params/")]
    keep_freed_memory(False, one_arena=True)  # a weight is mapped by itself, and what reading it took goes back
    named = store.restore(step, describe_arrays(config, layout, dtypes), only="params/", rows=stacks)
    keep_freed_memory(jax.default_backend() == "cpu")
    serve = config.serve
    tokenizer = tokenizer_from_json(meta["tokenizer"], where=where)
    how: dict[str, Any] = dict(layout=layout, slots=serve.slots, weights=serve.weight_dtype, cache=serve.kv_cache_dtype)
    if config.model.n_encoder_layers is None:
        return LoadedModel(DecoderOnlyEngine(config.model, _to_params(named), **how), tokenizer, config, step, where)
    tokenizer = SentinelTokenizer(tokenizer, config.model.n_vocab)
    how |= dict(start=tokenizer.decoder_start, end=tokenizer.end_of_text)
    return LoadedModel(EncoderDecoderEngine(config.model, _to_params(named), **how), tokenizer, config, step, where)


def read_meta(trained: LoadedModel) -> dict[str, Any]:
    """What the checkpoint says of itself, files that came along with its weights included (`carried`, texts by their names)."""
    store, step = find_checkpoint(trained.where)
    return store.read_meta(step)


def describe_arrays(
    config: Config, layout: MeshLayout, dtypes: Mapping[str, str], *, whole: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype (as saved: a bfloat16 checkpoint stays one) and place of every weight under its name in a checkpoint.

    The place is that of one layer where an array is a stack of them, unless it is to be read `whole`.
    """
    described = flatten_names(describe_params(config.model))
    return {
        f"params/{name}": jax.ShapeDtypeStruct(
            info.shape, dtypes.get(f"params/{name}", "float32"), sharding=_place(layout, info, name, whole)
        )
        for name, info in described.items()
    }


def _place(layout: MeshLayout, info: ParamInfo, name: str, whole: bool) -> Any:
    stacked = 0 if whole else info.axes[:1] == (STACK,)
    return layout.sharding(info.axes[stacked:], info.shape[stacked:], name)


def read_model_config(meta: Mapping[str, Any], where: str, overrides: Iterable[str]) -> Config:
    """The configuration that a checkpoint carries, with what sampling and evaluation may set; ConfigError for the rest."""
    table = {**NO_TRAINING, **translate_stored(meta["config"]), "mesh": dict(ONE_DEVICE)}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(SETTABLE):
            raise ConfigError(
                f"--set {override}: a checkpoint's {key} is fixed; what can be set is {', '.join(SETTABLE[:-1])} and model.dtype"
            )
        merge_override(table, override)
    return parse_config(table, where=where)


def _to_params(named: dict[str, jax.Array]) -> Params:
    params: Params = {}
    for name, array in named.items():
        module, _, leaf = name.removeprefix("params/").rpartition("/")
        params.setdefault(module, {})[leaf] = array
    return params
