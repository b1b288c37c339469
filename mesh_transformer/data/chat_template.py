# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Messages -> the tokens of a prompt, by the template that a model's tokenizer brings: Jinja, filled in as `transformers` does it.

A template comes with a model's files: a program of somebody else's, so it runs in Jinja's sandbox. It writes marks such
as <|im_start|>, which become special tokens; the same characters in a message stay characters, for else whoever writes
a message could end it and go on in another's name.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import tokenizers as hf

from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.data.vocabularies import make_library

ESCAPE = "\ufdd0"  # Unicode reserves it for use inside programs: breaks marks in messages, and is never encoded
ONLY = "default"  # name of the template that is meant where none is named
_SHOWN = 300  # characters of a template's complaint
# The attributes of a tokenizer that templates know.
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatError(ValueError):
    """Messages that make no prompt; the message says why."""


class NoChatTemplate(ChatError):
    """The model has none."""


class ChatTemplate:
    """The template of one model."""

    def __init__(self, tokenizer: Tokenizer, meta: Mapping[str, Any], *, n_vocab: int):
        """`meta` is the checkpoint's: `carried` has the text of files by their names in the model's folder.

        `n_vocab` is the model's. Without a template, or with one that cannot be used, `render` says so.
        """
        self._table = tokenizer.to_json().get("tokenizer")
        self._carried: Mapping[str, str] = meta.get("carried") or {}
        self._end, self._ids, self._n_vocab = tokenizer.end_of_text, meta.get("special_ids") or {}, n_vocab

    @functools.cached_property
    def source(self) -> str | None:
        """Its source; None without one. A file of its own counts more than what the settings hold, one or several by name."""
        own = self._carried.get("chat_template.jinja")
        found = self._config.get("chat_template") if own is None else own
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get(ONLY)
            if found is None and named:
                raise ChatError(f"of this model's chat templates ({', '.join(map(str, named))}) none is named {ONLY}")
        return found if isinstance(found, str) and found else None

    @functools.cached_property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer: the end of a text, and what the model's files call an end."""
        found: list[Any] = [self._end, self._library.token_to_id(self._special.get("eos_token", ""))]
        for table in (self._ids, self._read("generation_config.json")):
            ids = table.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        return list(dict.fromkeys(i for i in found if isinstance(i, int) and 0 <= i < self._n_vocab))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt in which an answer is to follow, for `encode`: marks in `messages` are broken by ESCAPE.

        Raises ChatError: no template, no messages, or a template that refuses these or fails.
        """
        if not messages:
            raise ChatError("there are no messages")
        compiled = self._compiled
        chat = [{name: self._break_marks(text) for name, text in message.items()} for message in messages]
        try:
            return compiled.render(
                messages=chat, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template refuses these messages: {_shorten(error)}") from None
        except Exception as error:  # what a program of somebody else's may raise is not known
            raise ChatError(f"the chat template fails: {type(error).__name__}: {_shorten(error)}") from None

    def encode(self, prompt: str) -> list[int]:
        """Ids of a rendered prompt; none is added in front of it. Raises ChatError where it is empty or has lone surrogates."""
        library = self._library
        try:
            ids = library.encode(prompt, add_special_tokens=False).ids
        except TypeError:  # what the library makes of lone surrogates
            raise ChatError("the prompt is not Unicode: it has lone surrogates") from None
        guard = library.token_to_id(ESCAPE)
        kept = [i for i in ids if i != guard]
        if not kept:
            raise ChatError("the chat template writes nothing for these messages")
        return kept

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        if self.source is None:
            raise NoChatTemplate("this model has no chat template: it continues texts; ask /v1/completions")
        try:
            return _make_environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise ChatError(f"this model's chat template cannot be read: {_shorten(error)}") from None

    @functools.cached_property
    def _library(self) -> hf.Tokenizer:
        """The vocabulary, which other than FileTokenizer's reads marks."""
        if self._table is None:
            raise ChatError("a chat template needs the tokenizer that it was written for; this model has another")
        library = make_library(self._table, "tokenizer")
        marks = {token.content for token in library.get_added_tokens_decoder().values()}
        # What the files call special but the vocabulary does not; what is no token of it stays text.
        more = [name for name in self._special.values() if name not in marks and library.token_to_id(name) is not None]
        library.add_special_tokens([hf.AddedToken(name, normalized=False, special=True) for name in [*more, ESCAPE]])
        return library

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """Special tokens, and of the others that are never cut those that the template writes; longer ones first."""
        added = self._library.get_added_tokens_decoder().values()
        names = {
            token.content
            for token in added
            if token.special or (token.content in (self.source or "") and token.content.strip())
        }
        whole = sorted(
            (name for name in names if len(name) > 1), key=len, reverse=True
        )  # one character cannot be broken
        return re.compile("|".join(map(re.escape, whole)) or "(?!)")

    def _break_marks(self, text: str) -> str:
        if ESCAPE in text:
            raise ChatError("a message has U+FDD0, which is no character")
        while self._marks.search(text):  # until none is left, for what is left of one may be another
            text = self._marks.sub(lambda found: _break(found[0]), text)
        return text

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return self._read("tokenizer_config.json")

    @functools.cached_property
    def _special(self) -> dict[str, str]:
        """The model's special tokens by the names that templates have for them."""
        found = dict(self._config)
        if "added_tokens_decoder" not in found:  # files that have it need the older one no more
            found |= self._read("special_tokens_map.json")
        named = {
            name: value.get("content") if isinstance(value := found.get(name), dict) else value for name in _TOKENS
        }
        return {name: value for name, value in named.items() if isinstance(value, str)}

    def _read(self, name: str) -> dict[str, Any]:
        try:
            table = json.loads(self._carried.get(name, "{}"))
        except ValueError as error:
            raise ChatError(f"the checkpoint's {name} is not valid JSON: {error}; convert the model again") from None
        return table if isinstance(table, dict) else {}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, with which templates mark answers for training: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """See jinja2."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _make_environment() -> jinja2.Environment:
    """Jinja as templates expect it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own writes for HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _tell_time}
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tell_time(format: str) -> str:
    return datetime.now().strftime(format)


def _break(mark: str) -> str:
    return mark[0] + ESCAPE + mark[1:]


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN]
