# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Defaults that come with a model: how its texts begin and end, and how it samples.

A converted checkpoint stores the text files of its Hugging Face folder (`carried` in the metadata) and the special ids of
config.json (`special_ids`). From them, as in `transformers.generate`:

* a prompt is encoded as the tokenizer's files say, for Llama with <s> in front;
* a generated text ends at any of `eos_token_id` of generation_config.json, else of config.json, else at the tokenizer's end
  of text; a chat message also ends at the tokenizer's `eos_token`;
* generation_config.json sets the defaults of temperature, top_k, top_p, min_p, repetition_penalty and the number of tokens.

A model that was trained here has no such files: a prompt is the text alone, and a text ends at the end of text.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from mesh_transformer.config import Config, ConfigError, ModelConfig, SampleConfig
from mesh_transformer.data.span_corruption import SentinelTokenizer
from mesh_transformer.data.tokenizer_files import CONFIG, SPECIAL_TOKENS_MAP, name_special_tokens, token_ids
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.data.vocabularies import merge_additions

GENERATION_CONFIG = "generation_config.json"
# Fields of generation_config.json -> fields of SampleConfig.
SUPPORTED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
GENERATE_DEFAULTS = {"temperature": 1.0, "top_k": 50}  # of transformers.generate with do_sample = true
# Fields that change the output of transformers.generate and have no counterpart here, with the values that turn them off.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


class DecoderTokens(NamedTuple):
    """Special tokens of an encoder-decoder model."""

    start_token: int  # first token of the decoder's input
    end_token: int | None  # to append to the encoder's tokens; None: encoding a prompt does


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """The tokenizer of a model, how the model's texts begin and end, and its sampling defaults."""

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]  # end a generated text
    chat_eos_token_ids: tuple[int, ...]  # end a message: also the tokenizer's own
    prefix_token_id: int  # precedes the first token whose likelihood is computed: the tokenizer's BOS, else its EOS
    first_token_id: int  # begins a text with an empty prompt
    decoder: DecoderTokens | None = None  # of an encoder-decoder model
    from_files: bool = False  # the model has files of its own, whose special tokens are used
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of SampleConfig that the files set
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those that the user sets (sample.NAME)
    notes: tuple[str, ...] = ()  # settings in the files that have no effect

    @property
    def request_defaults(self) -> dict[str, Any]:
        """Fields of SampleConfig that the files or the user set, which apply to requests without them."""
        return {**self.sampling, **self.overrides}

    def encode(self, prompt: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of a prompt, at least one.

        Args:
          prompt: The text; an empty one begins a document.
          add_special_tokens: Add the tokens that the model's files add to a text, such as <s> in front.
          parse_special: Special tokens written in the prompt become their ids; otherwise they are text.
        """
        ids = self.tokenizer.encode(
            prompt, add_special_tokens=add_special_tokens and self.from_files, parse_special=parse_special
        )
        return ids or [self.first_token_id]

    def describe(self) -> list[str]:
        """Return lines to print where a model is loaded; none for a model without sampling defaults."""
        lines = []
        if self.sampling:
            values = ", ".join(f"{name}={value}" for name, value in self.sampling.items())
            lines.append(f"sampling defaults of this model ({GENERATION_CONFIG}): {values}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def make_defaults(tokenizer: Tokenizer) -> ModelDefaults:
    """Return the defaults of a model that was trained here: its texts end, and empty prompts begin, with end_of_text.

    `tokenizer` is a SentinelTokenizer for an encoder-decoder model.
    """
    end = tokenizer.end_of_text
    decoder = DecoderTokens(tokenizer.decoder_start, end) if isinstance(tokenizer, SentinelTokenizer) else None
    return ModelDefaults(
        tokenizer=tokenizer,
        eos_token_ids=(end,),
        chat_eos_token_ids=(end,),
        prefix_token_id=end,
        first_token_id=end,
        decoder=decoder,
    )


def read_defaults(meta: Mapping[str, Any], tokenizer: Tokenizer, model: ModelConfig, where: str) -> ModelDefaults:
    """Return the defaults of a model from its metadata: `carried`, `special_ids` and `config`.

    A run that started from a converted model has its files too. Its texts also end with end_of_text, which ends its
    documents, and its [sample] section has precedence over generation_config.json.

    Raises ConfigError for a file that is no JSON object, or an id that is no integer; `where` begins the message.
    """
    if model.n_encoder_layers is not None and not isinstance(tokenizer, SentinelTokenizer):
        tokenizer = SentinelTokenizer(tokenizer, model.n_vocab)
    if "carried" not in meta and "special_ids" not in meta:
        return make_defaults(tokenizer)
    carried: Mapping[str, str] = meta.get("carried") or {}
    config: Mapping[str, Any] = meta.get("special_ids") or {}
    generation = _read_json(carried, GENERATION_CONFIG, where)
    tokenizer_files = {name: _read_json(carried, name, where) for name in (CONFIG, SPECIAL_TOKENS_MAP)}
    record = tokenizer.to_json()
    ids = token_ids(merge_additions(record["tokenizer"], record)) if "tokenizer" in record else {}
    own = {name: ids[token] for name, token in name_special_tokens(tokenizer_files).items() if token in ids}

    def read_ids(key: str) -> tuple[int, ...]:
        in_generation = _to_ids(generation.get(key), f"{where}: {GENERATION_CONFIG}: {key}", model.n_vocab)
        in_config = _to_ids(config.get(key), f"{where}: config.json: {key}", model.n_vocab)
        return in_generation or in_config

    def first_of(*ids: int | None) -> int:
        return next(i for i in (*ids, tokenizer.end_of_text) if i is not None)

    config_bos = next(iter(read_ids("bos_token_id")), None)
    bos = own.get("bos_token", None if CONFIG in carried else config_bos)
    eos = first_of(own.get("eos_token"))
    is_run = "sample" in meta.get("config", {})
    ends = read_ids("eos_token_id") or (eos,)
    ends = tuple(dict.fromkeys((*ends, tokenizer.end_of_text))) if is_run else ends
    config_ends = _to_ids(config.get("eos_token_id"), f"{where}: config.json: eos_token_id", model.n_vocab)
    sampling, notes = ({}, ()) if is_run else read_sampling(generation, model.seq_len)
    return ModelDefaults(
        tokenizer=tokenizer,
        eos_token_ids=ends,
        chat_eos_token_ids=tuple(dict.fromkeys((*ends, eos, *config_ends, tokenizer.end_of_text))),
        prefix_token_id=first_of(bos, eos),
        first_token_id=first_of(tokenizer.begin_of_text, config_bos, bos, eos),
        decoder=_find_decoder_tokens(tokenizer, () if is_run else read_ids("decoder_start_token_id")),
        from_files=True,
        sampling=sampling,
        notes=notes,
    )


def read_sampling(generation: Mapping[str, Any], seq_len: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return fields of SampleConfig that a generation_config.json sets, and notes on fields that cannot be used.

    Without `do_sample` the values in the file are used; true adds the defaults of transformers.generate, and false means
    greedy decoding.
    """
    given = {name: value for name, value in generation.items() if value is not None}
    do_sample = given.get("do_sample")
    if do_sample is True:
        given = GENERATE_DEFAULTS | given
    sampling: dict[str, Any] = {}
    notes = []
    for name, field in SUPPORTED.items():
        if name not in given or (do_sample is False and name in ("top_k", "top_p", "min_p")):
            continue
        try:
            sampling[field] = getattr(SampleConfig(**{field: _to_number(given[name])}), field)
        except ValidationError as error:
            notes.append(_note(name, given[name], error.errors()[0]["msg"].lower()))
    if do_sample is False:
        sampling["temperature"] = 0.0
    notes += [
        _note(name, given[name], "not supported")
        for name, off in UNSUPPORTED.items()
        if name in given and given[name] not in off
    ]
    max_length = given.get("max_length")
    if "max_new_tokens" not in given and max_length is not None and max_length != seq_len:
        notes.append(_note("max_length", max_length, "prompt and output have at most seq_len tokens"))
    return sampling, tuple(notes)


def apply_defaults(defaults: ModelDefaults, config: Config, overrides: Iterable[str]) -> tuple[ModelDefaults, Config]:
    """Return the defaults with the `overrides` that `config` was parsed with, and the config with the model's defaults.

    An override ("sample.NAME=VALUE") has precedence over the model's files, and these over the defaults of [sample].
    """
    keys = (override.partition("=")[0].strip() for override in overrides)
    names = [key.removeprefix("sample.") for key in keys if key.startswith("sample.")]
    changed = {name: getattr(config.sample, name) for name in names if name != "prompts"}
    sample = dataclasses.replace(config.sample, **{**defaults.sampling, **changed})
    return dataclasses.replace(defaults, overrides=changed), dataclasses.replace(config, sample=sample)


def _find_decoder_tokens(tokenizer: Tokenizer, start: tuple[int, ...]) -> DecoderTokens | None:
    if not isinstance(tokenizer, SentinelTokenizer):
        return None
    end = tokenizer.end_of_text
    is_added = tokenizer.encode("", add_special_tokens=True)[-1:] == [end]
    return DecoderTokens(start[0] if start else tokenizer.decoder_start, None if is_added else end)


def _note(name: str, value: Any, reason: str) -> str:
    return f"{GENERATION_CONFIG}: {name}={json.dumps(value)[:80]} has no effect ({reason})"


def _to_number(value: Any) -> Any:
    """Return an integer for a float such as 50.0, which JSON does not distinguish from 50."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _to_ids(value: Any, name: str, n_vocab: int) -> tuple[int, ...]:
    """Return the ids in a value that is one id, a list or null; without those that the model has no row for."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if bad := [i for i in ids if not isinstance(i, int) or isinstance(i, bool)]:
        raise ConfigError(f"{name}={value!r}: {bad[0]!r} is not a token id; give an integer or a list of them")
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < n_vocab))


def _read_json(files: Mapping[str, str], name: str, where: str) -> dict[str, Any]:
    try:
        table = json.loads(files.get(name, "{}"))
    except ValueError as error:
        raise ConfigError(
            f"{where}: {name} is not valid JSON: {error}; correct it and convert the model again"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {name} is not a JSON object; correct it and convert the model again")
    return table
