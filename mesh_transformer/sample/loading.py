# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Loading of a trained model onto devices, with its configuration and tokenizer, from a run folder or a checkpoint."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mesh_transformer.checkpoint.store import Store, find_checkpoint
from mesh_transformer.config import Config, ConfigError, merge_override, parse_config
from mesh_transformer.config.renamed import translate_stored
from mesh_transformer.convert.model_cache import find_model
from mesh_transformer.convert.readers import NATIVE, detect_format, read_model_section
from mesh_transformer.convert.sources import find_source
from mesh_transformer.data.tokenizers import Tokenizer, tokenizer_from_json
from mesh_transformer.host_memory import keep_freed_memory
from mesh_transformer.mesh import MeshLayout, init_devices
from mesh_transformer.model.params import STACK, ParamInfo, Params, flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.sample.encoder import EncoderPrograms
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.encoder_decoder import EncoderDecoderEngine
from mesh_transformer.sample.engine.engine import Engine, EngineOptions
from mesh_transformer.sample.engine.speculative import (
    Drafter,
    DraftModelDrafter,
    PromptLookupDrafter,
    check_vocabulary,
)
from mesh_transformer.sample.model_defaults import ModelDefaults, apply_defaults, read_defaults
from mesh_transformer.storage.paths import AnyPath

SETTABLE = ("sample.", "serve.", "evaluate.", "mesh.", "model.dtype")
ENCODER_SETTABLE = ("mesh.", "model.dtype", "serve.weight_dtype")
# Required sections that imported checkpoints lack, because another program trained them.
NO_TRAINING = {"data": {"train": {"unknown": {"path": ""}}}, "train": {"steps": 1, "batch_size": 1}}
ONE_DEVICE = {"data": 1}  # default mesh; the mesh in a checkpoint's configuration was used for training


class LoadedModel(NamedTuple):
    """A model that is ready to generate text."""

    engine: Engine
    tokenizer: Tokenizer
    config: Config  # configuration of the training run, with the overrides of load_model
    step: int
    where: str  # folder of the checkpoint
    defaults: ModelDefaults  # from the model's files, with the overrides of load_model
    meta: dict[str, Any]  # metadata of the checkpoint, including files saved with the weights (`carried`: name -> text)


class LoadedEncoder(NamedTuple):
    """An encoder-only model on its devices; the fields are as in LoadedModel."""

    programs: EncoderPrograms
    tokenizer: Tokenizer
    config: Config
    step: int
    where: str


class _Source(NamedTuple):
    """A checkpoint with its metadata, configuration and tokenizer, but without weights."""

    store: Store
    step: int
    meta: dict[str, Any]
    config: Config
    tokenizer: Tokenizer
    where: str


def load_any_model(path: str | AnyPath, overrides: Iterable[str] = ()) -> LoadedModel | LoadedEncoder:
    """Load a model that generates text, or an encoder-only model; arguments and errors are as in `load_model`."""
    overrides = list(overrides)
    source = _open(path, overrides)
    return _load_generator(source, overrides) if source.config.model.causal else _load_encoder(source, overrides)


def load_model(path: str | AnyPath, overrides: Iterable[str] = ()) -> LoadedModel:
    """Load a model that generates text: the latest valid checkpoint of the run folder `path`, `path` itself, or a model of
    another format.

    Only the weights are read, and each device reads only its slices. The mesh is one device unless `overrides` set `mesh.*`.

    Args:
      path: Run folder, folder of checkpoints, checkpoint, or a model that `find_model` converts: a Hugging Face folder or
        name, a GGUF file, or shards of mesh-transformer-jax.
      overrides: "section.field=value" for fields that may differ from training: sampling, serving, evaluation, mesh, dtype.

    Raises:
      CheckpointError: there is no valid checkpoint.
      ConfigError: an override would change the model, the mesh does not fit the devices, the draft model has another
        vocabulary, or the model is an encoder.
    """
    overrides = list(overrides)
    source = _open(path, overrides)
    if not source.config.model.causal:
        raise ConfigError(
            f"{path} is an encoder (model.causal=false, such as BERT), which cannot generate or score text; use "
            "mesh_transformer.load_model in Python for its hidden states, pooled outputs and logits"
        )
    return _load_generator(source, overrides)


def _open(path: str | AnyPath, overrides: Sequence[str]) -> _Source:
    keep_freed_memory(True)  # before threads start, so that malloc uses one arena
    store, step = find_model(path, log=_log)
    where = str(store.folder(step))
    meta = store.read_meta(step)
    config = read_model_config(meta, where, overrides)
    if "tokenizer" not in meta:
        raise ConfigError(f"{where} has no tokenizer; convert the checkpoint again with --tokenizer PATH")
    return _Source(store, step, meta, config, tokenizer_from_json(meta["tokenizer"], where=where), where)


def _load_generator(source: _Source, overrides: Sequence[str]) -> LoadedModel:
    defaults = read_defaults(source.meta, source.tokenizer, source.config.model, source.where)
    defaults, config = apply_defaults(defaults, source.config, overrides)
    layout = init_devices(config.mesh)
    params = _read_params(source.store, source.step, config, layout)
    engine = _make_engine(config, params, layout, defaults)
    return LoadedModel(engine, defaults.tokenizer, config, source.step, source.where, defaults, source.meta)


def _load_encoder(source: _Source, overrides: Sequence[str]) -> LoadedEncoder:
    for override in overrides:
        if not override.strip().startswith(ENCODER_SETTABLE):
            raise ConfigError(
                f"--set {override}: has no effect on an encoder (model.causal=false); only mesh, model.dtype and "
                "serve.weight_dtype can be set"
            )
    config = source.config
    layout = init_devices(config.mesh)
    params = _read_params(source.store, source.step, config, layout)
    programs = EncoderPrograms(config.model, params, layout, weight_dtype=config.serve.weight_dtype)
    return LoadedEncoder(programs, source.tokenizer, config, source.step, source.where)


def load_sampling_config(path: str | AnyPath, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration with which `load_model` would run a model, without reading or downloading its weights.

    Raises CheckpointError or ConfigError as `load_model` does.
    """
    source = find_source(path, config_only=True)
    if source.is_dir() and detect_format(source) == NATIVE:
        store, step = find_checkpoint(source)
        return read_model_config(store.read_meta(step), str(store.folder(step)), overrides)
    return read_model_config({"config": {"model": read_model_section(source)}}, str(source), overrides)


def describe_arrays(
    config: Config, layout: MeshLayout, dtypes: Mapping[str, str], *, stacked: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype (as saved) and sharding of every weight by its name in a checkpoint.

    The sharding of a stack of layers is that of one layer, or that of the whole array if `stacked`.
    """
    described = flatten_names(describe_params(config.model))
    return {
        f"params/{name}": jax.ShapeDtypeStruct(
            info.shape, dtypes.get(f"params/{name}", "float32"), sharding=_sharding(layout, info, name, stacked)
        )
        for name, info in described.items()
    }


def read_model_config(meta: Mapping[str, Any], where: str, overrides: Iterable[str]) -> Config:
    """Return a checkpoint's configuration with `overrides` of sampling, serving, evaluation, mesh and dtype.

    Raises:
      ConfigError: an override of another section, or an invalid value.
    """
    table = {**NO_TRAINING, **translate_stored(meta["config"]), "mesh": dict(ONE_DEVICE)}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(SETTABLE):
            raise ConfigError(
                f"--set {override}: {key} of a trained model cannot be changed; only "
                f"{', '.join(f'{section}*' for section in SETTABLE[:-1])} and model.dtype can be set; remove it"
            )
        merge_override(table, override)
    return parse_config(table, where=where)


def _log(text: str) -> None:
    print(text, file=sys.stderr)


def _read_params(store: Store, step: int, config: Config, layout: MeshLayout) -> Params:
    records = store.read_manifest(step).arrays
    dtypes = {name: record.dtype for name, record in records.items()}
    # The engine needs a separate array for every layer. Reading layers separately avoids a second copy of a stack.
    stacks = [name for name, record in records.items() if record.axes[:1] == (STACK,) and name.startswith("params/")]
    keep_freed_memory(False, one_arena=True)  # buffers of the reader are returned to the operating system
    named = store.restore(step, describe_arrays(config, layout, dtypes), only="params/", unstack=stacks)
    keep_freed_memory(jax.default_backend() == "cpu")
    params: Params = {}
    for name, array in named.items():
        module, _, leaf = name.removeprefix("params/").rpartition("/")
        params.setdefault(module, {})[leaf] = array
    return params


def _make_engine(config: Config, params: Params, layout: MeshLayout, defaults: ModelDefaults) -> Engine:
    """Return an engine for the model with the options of `config.serve`."""
    serve = config.serve
    options = EngineOptions(slots=serve.slots, weight_dtype=serve.weight_dtype, kv_cache_dtype=serve.kv_cache_dtype)
    if defaults.decoder is None:
        drafter = _make_drafter(config, layout)
        return DecoderOnlyEngine(config.model, params, options, layout=layout, drafter=drafter)
    return EncoderDecoderEngine(
        config.model,
        params,
        options,
        start_token=defaults.decoder.start_token,
        end_token=defaults.decoder.end_token,
        layout=layout,
    )


def _make_drafter(config: Config, layout: MeshLayout) -> Drafter | None:
    """Return the source of draft tokens that `serve.speculative` selects."""
    serve = config.serve
    match serve.speculative:
        case "none":
            return None
        case "prompt-lookup":
            return PromptLookupDrafter(num_draft_tokens=serve.num_speculative_tokens)
        case "draft-model":
            return _load_draft_model(config, layout)


def _load_draft_model(config: Config, layout: MeshLayout) -> Drafter:
    """Load `serve.draft_model` onto the devices of the model."""
    serve = config.serve
    store, step = find_model(serve.draft_model, log=_log)
    where = str(store.folder(step))
    draft_config = read_model_config(store.read_meta(step), where, ())
    try:
        if draft_config.model.n_encoder_layers is not None:
            raise ConfigError("an encoder-decoder model cannot draft tokens; use a decoder-only model")
        check_vocabulary(draft_config.model, config.model.n_vocab)
        params = _read_params(store, step, draft_config, layout)
        return DraftModelDrafter(
            draft_config.model, params, num_draft_tokens=serve.num_speculative_tokens, layout=layout
        )
    except ConfigError as error:
        raise ConfigError(f"serve.draft_model={serve.draft_model!r}: {error}") from None


def _sharding(layout: MeshLayout, info: ParamInfo, name: str, stacked: bool) -> Any:
    n_skipped = 0 if stacked else int(info.axes[:1] == (STACK,))
    return layout.sharding(info.axes[n_skipped:], info.shape[n_skipped:], name)
