# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Structured output: restricts text to a regular expression or a JSON schema, with token masks from llguidance."""

import json
from typing import Any

import numpy as np

from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.sample.engine.requests import PromptError
from mesh_transformer.sample.model_defaults import ModelDefaults

MAX_SCHEMA = 1 << 16  # characters


class GrammarCompiler:
    """Compiles grammars for one model. The first call is slow because it indexes the vocabulary."""

    def __init__(self, defaults: ModelDefaults, n_vocab: int):
        """`n_vocab` is the vocabulary size of the model, which may exceed the tokenizer's."""
        self._tokenizer = defaults.tokenizer
        self._end = defaults.eos_token_ids[0]  # token that ends a complete text
        self._n_vocab = n_vocab
        self._ll_tokenizer: Any = None

    def from_regex(self, regex: str) -> "GrammarMatcher":
        """Return a matcher for text that fully matches `regex` (Rust's syntax, no look-around).

        Raises PromptError if the regular expression is invalid.
        """
        matcher_class = self._load().LLMatcher
        return self._compile(matcher_class.grammar_from_regex(regex), "guided_regex")

    def from_schema(self, schema: dict[str, Any] | None) -> "GrammarMatcher":
        """Return a matcher for JSON that conforms to `schema`; None: any JSON object.

        Raises PromptError if the schema is invalid or not supported.
        """
        matcher_class, field = self._load().LLMatcher, "response_format"
        try:
            text = json.dumps({"type": "object"} if schema is None else schema)
            if len(text) > MAX_SCHEMA:
                raise PromptError(
                    f"{field}: the schema has {len(text)} characters; the maximum is {MAX_SCHEMA}; shorten it"
                )
            return self._compile(matcher_class.grammar_from_json_schema(text), field)
        except RecursionError:
            raise PromptError(f"{field}: the schema is nested too deeply; flatten it") from None

    def _load(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise PromptError(
                f"structured output needs llguidance on the server ({error}); run: pip install 'mesh-transformer[serve]'"
            ) from None
        if self._ll_tokenizer is None:
            self._ll_tokenizer = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._end))
            )
        return llguidance

    def _compile(self, grammar: str, field: str) -> "GrammarMatcher":
        library = self._load()
        error = library.LLMatcher.validate_grammar(grammar, self._ll_tokenizer)
        if error and not error.startswith("WARNING"):
            raise PromptError(f"{field}: {' '.join(error.split())[:300]}")
        matcher = library.LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        return GrammarMatcher(matcher, self._end, self._n_vocab)


class GrammarMatcher:
    """The state of one request in its grammar; implements the engine's Constraint.

    Not thread-safe: once the request is submitted, only the engine's thread uses it.
    """

    def __init__(self, matcher: Any, end: int, n_vocab: int):
        self._matcher = matcher
        self._end = end
        self._n_vocab = n_vocab
        self.error = ""  # message of llguidance if matching failed

    def allowed(self) -> np.ndarray:
        """Return a bool mask [V] of the tokens allowed next; only the end token if no token is allowed, or after an error."""
        allowed = np.zeros(self._n_vocab, bool)
        if not self._matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            n = min(len(bits), self._n_vocab)
            allowed[:n] = bits[:n]
        self.error = self._matcher.get_error()
        if not allowed.any():
            allowed[self._end] = True
        return allowed

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self.error = self._matcher.get_error()

    def fork(self) -> "GrammarMatcher":
        """Return an independent copy for another request."""
        return GrammarMatcher(self._matcher.deep_copy(), self._end, self._n_vocab)


class _Vocabulary:
    """Tokenizer with the interface that llguidance requires."""

    def __init__(self, tokenizer: Tokenizer, end: int):
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.bos_token_id = None
        data = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab)]
        # llguidance requires the prefix 0xFF for special tokens: those without bytes, and the token of the byte 0xFF itself.
        self.special_token_ids = [i for i, token in enumerate(data) if not token or token == b"\xff"]
        self.tokens = [b"\xff<%d>" % i if not token or token == b"\xff" else token for i, token in enumerate(data)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
