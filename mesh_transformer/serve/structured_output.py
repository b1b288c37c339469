# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Texts that must match a regular expression or a JSON schema, by llguidance's masks over the vocabulary."""

import json
from typing import Any

import numpy as np

from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.sample.engine.requests import PromptError

MOST_SCHEMA = 1 << 16  # characters


class GrammarCompiler:
    """Makes constraints for one tokenizer; the first takes the time to read the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int):
        """`n_vocab` is the model's, which may have rows without tokens."""
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        self._library: Any = None

    def from_regex(self, regex: str) -> "GrammarMatcher":
        """The whole text matches `regex` (Rust's syntax, no look-around). PromptError if it is none."""
        matcher = self._load().LLMatcher
        return self._make(matcher.grammar_from_regex(regex), "guided_regex")

    def from_schema(self, schema: dict[str, Any] | None) -> "GrammarMatcher":
        """The text is JSON that `schema` admits; any object for None. PromptError if it cannot be followed."""
        matcher, what = self._load().LLMatcher, "response_format"
        try:
            text = json.dumps({"type": "object"} if schema is None else schema)
            if len(text) > MOST_SCHEMA:
                raise PromptError(f"{what}: a schema of {len(text)} characters; there can be {MOST_SCHEMA}")
            return self._make(matcher.grammar_from_json_schema(text), what)
        except RecursionError:
            raise PromptError(f"{what}: the schema is nested too deeply") from None

    def _load(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise PromptError(f"constraints need llguidance: pip install 'mesh-transformer[serve]' ({error})") from None
        if self._library is None:
            self._library = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer)))
        return llguidance

    def _make(self, grammar: str, what: str) -> "GrammarMatcher":
        library = self._load()
        if (wrong := library.LLMatcher.validate_grammar(grammar, self._library)) and not wrong.startswith("WARNING"):
            raise PromptError(f"{what}: {' '.join(wrong.split())[:300]}")
        return GrammarMatcher(
            library.LLMatcher(self._library, grammar, log_level=0), self._tokenizer.end_of_text, self._n_vocab
        )


class GrammarMatcher:
    """One row's place in its grammar; a Constraint of the engine.

    The matcher is not for two threads at once: once a row is seated, only the engine's thread touches it.
    """

    def __init__(self, matcher: Any, end_of_text: int, n_vocab: int):
        self._matcher, self._end, self._n_vocab = matcher, end_of_text, n_vocab
        self.error = ""  # why the grammar could not be followed to its end, if it could not

    def allowed(self) -> np.ndarray:
        """bool [V]; the end of the text alone where nothing else can follow, or the grammar asks too much work."""
        allowed = np.zeros(self._n_vocab, bool)
        if not self._matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            size = min(len(bits), self._n_vocab)
            allowed[:size] = bits[:size]
        self.error = self._matcher.get_error()
        if not allowed.any():
            allowed[self._end] = True
        return allowed

    def accept(self, token: int) -> None:
        """See Constraint."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self.error = self._matcher.get_error()

    def fork(self) -> "GrammarMatcher":
        """The same place for another row."""
        return GrammarMatcher(self._matcher.deep_copy(), self._end, self._n_vocab)


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text, None
        found = [tokenizer.decode_bytes([i]) for i in range(tokenizer.n_vocab)]
        # Tokens without bytes, and the lone byte 0xFF, which the library takes for the mark of a special token.
        self.special_token_ids = [i for i, data in enumerate(found) if not data or data == b"\xff"]
        self.tokens = [b"\xff<%d>" % i if not data or data == b"\xff" else data for i, data in enumerate(found)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
