# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Defaults of a model: the special tokens that begin and end its texts, and its sampling options.

A converted checkpoint stores the text files of its Hugging Face folder (`carried` in the metadata) and the special ids of
config.json (`special_ids`). They determine, as in `transformers.generate`:

* the special tokens of an encoded prompt, such as <s> at the start for Llama;
* the tokens that end a generated text: `eos_token_id` of generation_config.json, else of config.json, else the tokenizer's
  end-of-text token; a chat message also ends at the tokenizer's `eos_token`;
* the defaults of temperature, top_k, top_p, min_p, repetition_penalty and the number of tokens (generation_config.json).

A model that this program trained from scratch has no such files: a prompt gets no special tokens, and a text ends at the
end-of-text token.
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
# Fields that change the output of transformers.generate and are not supported here -> values that disable them.
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
    end_token: int | None  # appended to the encoder's tokens; None: the tokenizer appends it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """The tokenizer of a model, the special tokens that begin and end its texts, and its sampling defaults."""

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]  # tokens that end a generated text
    chat_eos_token_ids: tuple[int, ...]  # tokens that end a chat message, including the tokenizer's eos_token
    prefix_token_id: int  # precedes a text whose likelihood is computed: the tokenizer's BOS, else its EOS
    first_token_id: int  # begins a text with an empty prompt
    decoder: DecoderTokens | None = None  # of an encoder-decoder model
    from_files: bool = False  # True if the model's files determine the defaults and the special tokens of prompts
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of SampleConfig that the files set
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields that the user sets (sample.NAME)
    notes: tuple[str, ...] = ()  # messages about fields of generation_config.json that have no effect

    @property
    def request_defaults(self) -> dict[str, Any]:
        """Fields of SampleConfig that the files or the user set, the defaults of requests."""
        return {**self.sampling, **self.overrides}

    def encode(self, prompt: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Return the token ids of a prompt, with at least one id.

        Args:
          prompt: The text. If it is empty, `first_token_id` is returned.
          add_special_tokens: Add the tokens that the model's files add to a text, such as <s> in front.
          parse_special: Special tokens written in the prompt become their ids; otherwise they are text.
        """
        ids = self.tokenizer.encode(
            prompt, add_special_tokens=add_special_tokens and self.from_files, parse_special=parse_special
        )
        return ids or [self.first_token_id]

    def describe(self) -> list[str]:
        """Return lines to print when the model is loaded: its sampling defaults and notes, if any."""
        lines = []
        if self.sampling:
            values = ", ".join(f"{name}={value}" for name, value in self.sampling.items())
            lines.append(f"sampling defaults of this model ({GENERATION_CONFIG}): {values}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def make_defaults(tokenizer: Tokenizer) -> ModelDefaults:
    """Return the defaults of a model that this program trained: end_of_text ends its texts and begins empty prompts.

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

    A run that started from a converted model also has the files of that model. Its texts also end at end_of_text,
    because its training documents ended there. Its [sample] section replaces generation_config.json.

    Raises ConfigError for a file that is not a JSON object, or an id that is not an integer; the message begins with
    `where`.
    """
    if model.n_encoder_layers is not None and not isinstance(tokenizer, SentinelTokenizer):
        tokenizer = SentinelTokenizer(tokenizer, model.n_vocab)
    if "carried" not in meta and "special_ids" not in meta:
        return make_defaults(tokenizer)
    carried: Mapping[str, str] = meta.get("carried") or {}
    special_ids: Mapping[str, Any] = meta.get("special_ids") or {}
    generation = _read_json(carried, GENERATION_CONFIG, where)
    tokenizer_files = {name: _read_json(carried, name, where) for name in (CONFIG, SPECIAL_TOKENS_MAP)}
    record = tokenizer.to_json()
    ids = token_ids(merge_additions(record["tokenizer"], record)) if "tokenizer" in record else {}
    named_ids = {name: ids[token] for name, token in name_special_tokens(tokenizer_files).items() if token in ids}

    def read_ids(key: str) -> tuple[int, ...]:
        in_generation = _to_ids(generation.get(key), f"{where}: {GENERATION_CONFIG}: {key}", model.n_vocab)
        in_config = _to_ids(special_ids.get(key), f"{where}: config.json: {key}", model.n_vocab)
        return in_generation or in_config

    def first_of(*ids: int | None) -> int:
        return next(i for i in (*ids, tokenizer.end_of_text) if i is not None)

    config_bos = next(iter(read_ids("bos_token_id")), None)
    bos = named_ids.get("bos_token", None if CONFIG in carried else config_bos)
    eos = first_of(named_ids.get("eos_token"))
    is_run = "sample" in meta.get("config", {})
    ends = read_ids("eos_token_id") or (eos,)
    ends = tuple(dict.fromkeys((*ends, tokenizer.end_of_text))) if is_run else ends
    config_ends = _to_ids(special_ids.get("eos_token_id"), f"{where}: config.json: eos_token_id", model.n_vocab)
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
    """Return the fields of SampleConfig that a generation_config.json sets, and notes about fields that have no effect.

    Without `do_sample` only the values in the file are used. `do_sample` = true adds the defaults of transformers.generate,
    and false selects greedy decoding.
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
        for name, disabled in UNSUPPORTED.items()
        if name in given and given[name] not in disabled
    ]
    max_length = given.get("max_length")
    if "max_new_tokens" not in given and max_length is not None and max_length != seq_len:
        notes.append(_note("max_length", max_length, f"prompt and output have at most seq_len={seq_len} tokens"))
    return sampling, tuple(notes)


def apply_defaults(defaults: ModelDefaults, config: Config, overrides: Iterable[str]) -> tuple[ModelDefaults, Config]:
    """Return `defaults` with the `overrides` that `config` contains, and `config` with the model's defaults.

    An override ("sample.NAME=VALUE") has precedence over the model's files, and the files over the defaults of [sample].
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
    """Return the ids in `value`, which is an id, a list of ids or null, without ids outside the model's vocabulary."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if bad := [i for i in ids if not isinstance(i, int) or isinstance(i, bool)]:
        raise ConfigError(
            f"{name}={json.dumps(value)[:80]}: {json.dumps(bad[0])[:80]} is not a token id; the value must be an integer or a "
            "list of integers; correct it and convert the model again"
        )
    return tuple(dict.fromkeys(i for i in ids if 0 <= i < n_vocab))


def _read_json(files: Mapping[str, str], name: str, where: str) -> dict[str, Any]:
    try:
        table = json.loads(files.get(name, "{}"))
    except ValueError as error:
        raise ConfigError(
            f"{where}: {name} is not valid JSON: {error}; correct it and convert the model again"
        ) from None
    if not isinstance(table, dict):
        raise ConfigError(
            f"{where}: {name} contains {json.dumps(table)[:80]}, not a JSON object; correct it and convert the model again"
        )
    return table
