# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages -> prompt tokens, with the Jinja template of a model's tokenizer, as in `transformers`.

A template comes with a model's files and is untrusted code, so it runs in Jinja's sandbox. It writes special tokens such
as <|im_start|>. The same characters in a message are escaped and stay text; otherwise the author of a message could end
the message and continue in another role.
"""

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import tokenizers as hf

from mesh_transformer.data.tokenizer_files import CONFIG, NAMED_TOKENS, SPECIAL_TOKENS_MAP, name_special_tokens
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.data.vocabularies import ABSENT_FROM_TEXTS, make_library, merge_additions

ESCAPE = ABSENT_FROM_TEXTS  # inserted into special tokens in messages; `encode` removes it
DEFAULT_NAME = "default"  # name of the template that is used if a model has several
_TEMPLATE_FILE = re.compile(r"additional_chat_templates/([^/]+)\.jinja")
_MAX_STEPS = 1_000_000  # iterations and calls in one rendering: about a second
_STEPS_NAME = "_steps"  # name under which a template holds the iterator of its remaining steps
_MAX_ERROR_CHARACTERS = 300  # of a template's error message


class ChatError(ValueError):
    """Chat messages that cannot be rendered to a prompt, or a template that cannot be used."""


class NoChatTemplate(ChatError):
    """The model has no chat template."""


class ChatTemplate:
    """The chat template and special tokens of one model."""

    def __init__(self, tokenizer: Tokenizer, meta: Mapping[str, Any]):
        """Read the template from a checkpoint's metadata, whose `carried` maps file names of the model to their text.

        `render` raises the error of a missing or invalid template.
        """
        record = tokenizer.to_json()
        self._tokenizer_json = merge_additions(record["tokenizer"], record) if "tokenizer" in record else None
        self._class_tokens: Mapping[str, str] = record.get("named_tokens", {})
        self._files: Mapping[str, str] = meta.get("carried") or {}

    @functools.cached_property
    def source(self) -> str | None:
        """Jinja source of the template, or None if the model has none.

        In order of precedence: chat_template.jinja with the named templates in additional_chat_templates/,
        tokenizer_config.json, chat_template.json.
        """
        named = {
            match[1]: text
            for name, text in self._files.items()
            if (match := _TEMPLATE_FILE.fullmatch(name)) is not None
        }
        if "chat_template.jinja" in self._files:
            named[DEFAULT_NAME] = self._files["chat_template.jinja"]
        source = self._config.get("chat_template") or self._read("chat_template.json").get("chat_template")
        if not named and isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        if named:
            source = named.get(DEFAULT_NAME)
        if source is None and named:
            raise ChatError(
                f"this model has the chat templates {', '.join(map(str, named))}, but none with the name {DEFAULT_NAME!r}; rename "
                "one of them in the model's files and convert the model again"
            )
        return source if isinstance(source, str) and source else None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for a response to `messages`, with escaped special tokens; pass it to `encode`.

        Raises ChatError if there is no template, there are no messages, or the template rejects them or fails.
        """
        if not messages:
            raise ChatError("messages is empty; give at least one message")
        compiled = self._compiled
        chat = [{name: self._escape_special_tokens(text) for name, text in message.items()} for message in messages]
        try:
            options = {_STEPS_NAME: iter(range(_MAX_STEPS)), "add_generation_prompt": True}
            return compiled.render(messages=chat, tools=None, documents=None, **options, **self._special)
        except ChatError:
            raise
        except jinja2.TemplateError as error:
            raise ChatError(
                f"the chat template rejects these messages: {_shorten(error)}; check roles and order"
            ) from None
        except Exception as error:  # an untrusted template can raise anything
            raise ChatError(
                f"the chat template fails on these messages: {type(error).__name__}: {_shorten(error)}"
            ) from None

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a rendered prompt. No BOS or EOS is added, because the template writes them.

        Raises ChatError if the prompt is empty or contains lone surrogates.
        """
        library = self._library
        try:
            ids = library.encode(prompt, add_special_tokens=False).ids
        except TypeError:  # raised by `tokenizers` for lone surrogates
            raise ChatError("the prompt contains lone surrogates, which are not valid Unicode; remove them") from None
        escape = library.token_to_id(ESCAPE)
        tokens = [i for i in ids if i != escape]
        if not tokens:
            raise ChatError("the chat template renders these messages to an empty prompt; give messages with text")
        return tokens

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        if self.source is None:
            raise NoChatTemplate("this model has no chat template; use /v1/completions to continue a text")
        try:
            return _make_environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise ChatError(
                f"this model's chat template is not valid Jinja: {_shorten(error)}; correct it and convert the model again"
            ) from None

    @functools.cached_property
    def _library(self) -> hf.Tokenizer:
        """The vocabulary as a `tokenizers` object that, unlike FileTokenizer's, encodes special tokens in a text."""
        if self._tokenizer_json is None:
            raise ChatError(
                "this model has a chat template but no tokenizer.json, which encodes its special tokens; convert the model again "
                "from a folder with a tokenizer.json"
            )
        library = make_library(self._tokenizer_json, "tokenizer")
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        # Tokens that are special only in the model's files. Names that are not in the vocabulary remain text.
        missing = [
            name for name in self._special.values() if name not in known and library.token_to_id(name) is not None
        ]
        library.add_special_tokens([hf.AddedToken(name, normalized=False, special=True) for name in [*missing, ESCAPE]])
        return library

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Pattern of special tokens, and of other added tokens that the template writes; longer tokens first."""
        added = self._library.get_added_tokens_decoder().values()
        names = {
            token.content
            for token in added
            if token.special or (token.content in (self.source or "") and token.content.strip())
        }
        # A token of one character cannot be escaped: ESCAPE is inserted between two characters.
        by_length = sorted((name for name in names - {ESCAPE} if len(name) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, by_length)) or "(?!)")

    def _escape_special_tokens(self, text: str) -> str:
        while self._special_pattern.search(text):  # repeated, because escaping one token may leave another
            text = self._special_pattern.sub(lambda match: _escape(match[0]), text)
        return text

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return self._read(CONFIG)

    @functools.cached_property
    def _special(self) -> dict[str, str]:
        """The model's special tokens by the names that templates use."""
        files = {CONFIG: self._config, SPECIAL_TOKENS_MAP: self._read(SPECIAL_TOKENS_MAP)}
        named = {**self._class_tokens, **name_special_tokens(files)}
        return {name: named[name] for name in NAMED_TOKENS if name in named}

    def _read(self, name: str) -> dict[str, Any]:
        try:
            table = json.loads(self._files.get(name, "{}"))
        except ValueError as error:
            raise ChatError(f"the checkpoint's {name} is not valid JSON: {error}; convert the model again") from None
        return table if isinstance(table, dict) else {}


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}` ... `{% endgeneration %}`, which marks responses for training and has no effect here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that limits a template to _MAX_STEPS loop iterations and calls."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, _STEPS_NAME, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count_step(context)
        return super().call(context, obj, *args, **kwargs)


def _count_step(context: jinja2.runtime.Context) -> None:
    if next(context[_STEPS_NAME], None) is None:
        raise ChatError(
            f"the chat template needs more than {_MAX_STEPS:,} loop iterations and calls, the limit, for these messages; send "
            "fewer or shorter messages, or correct the template and convert the model again"
        )


@jinja2.pass_context
def _count_items(context: jinja2.runtime.Context, items: Any) -> Any:
    """Return the items of a loop after counting a step for each."""
    for _ in items if isinstance(items, Collection) else ():
        _count_step(context)
    return items


def _make_environment() -> jinja2.Environment:
    """Return a Jinja environment with the functions that chat templates expect."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters[_STEPS_NAME] = _count_items
    environment.filters["tojson"] = _to_json  # Jinja's tojson escapes HTML
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _escape(token: str) -> str:
    return token[0] + ESCAPE + token[1:]


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_ERROR_CHARACTERS]
