# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""One sample as the wire shows it: events of the engine -> pieces of text, with the numbers of the tokens they consist of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mesh_transformer.data.tokenizers import StreamDecoder, Tokenizer
from mesh_transformer.sample.engine.requests import Event, Score
from mesh_transformer.sample.text_generation import StopStrings, TextStreamer


class Delta(NamedTuple):
    """What is new of a sample; pieces put one behind the other are the whole."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish: str | None


class TokenLogprob(NamedTuple):
    """One token of a sample, or with echo of its prompt."""

    start: int  # in the answer's text
    id: int
    logprob: float | None
    top: list[tuple[int, float]] | None


LogprobFormatter = Callable[[Tokenizer, Sequence[TokenLogprob], int], dict[str, list[Any]]]


class SampleStream:
    """One sample on its way."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        prompt_tokens: Sequence[int],
        *,
        stops: Sequence[str],
        n_top: int | None,
        echo: bool,
        empty: bool = False,
        show: LogprobFormatter | None = None,
    ):
        """`prompt` is `prompt_tokens` as text. `n_top` likeliest tokens are shown, by `show`, none at all if it is None.

        With `echo` the prompt comes first. `empty`: the one token that is drawn all the same is not shown.
        """
        self._tokenizer, self._n_top, self._empty, self._show = tokenizer, n_top, empty, show or format_logprobs
        self._prompt_tokens = list(prompt_tokens) if echo else []
        self._prompt = prompt if echo else ""
        self.row = TextStreamer(prompt, StreamDecoder(tokenizer, continues=bool(prompt)), StopStrings(stops))
        self._pending: list[TokenLogprob] = []  # not shown yet, for their text is not
        self.done = self._begun = False

    @property
    def score(self) -> float:
        """Mean log-probability of a token."""
        return sum(self.row.logprobs) / max(len(self.row.logprobs), 1)

    def push(self, events: Sequence[Event]) -> Delta:
        """Take what was drawn; nothing counts behind the sample's end."""
        text = ""
        for event in events:
            if self.done:
                break
            if not self._begun:
                self._begun, text = True, self._prompt
                self._note_prompt(event.prompt_scores)
            if self._empty:
                self.row.finish, self.done = "length", True
                break
            start = len(self._prompt) + self.row.decoded
            if self._n_top is not None:
                self._pending.append(TokenLogprob(start, event.token, event.logprob, event.top))
            text += self.row.push(event)
            self.done = self.row.finish != "interrupted"
        return Delta(text, self._release(), self.row.finish if self.done else None)

    def _note_prompt(self, scores: list[Score] | None) -> None:
        if self._n_top is None or not self._prompt_tokens:
            return
        decoder, start = StreamDecoder(self._tokenizer), 0
        found = [None, *(scores or [])]
        for token, score in zip(self._prompt_tokens, found, strict=True):
            self._pending.append(TokenLogprob(start, token, score and score.logprob, score and score.top))
            start += len(decoder.push([token]))

    def _release(self) -> dict[str, list[Any]] | None:
        """The tokens whose first character is shown by now, at the end all but those of a stop string or end of text."""
        if self._n_top is None:
            return None
        length = len(self._prompt) + len(self.row.text) if self._begun else 0
        cut = self.row.finish != "length"
        shown = [token for token in self._pending if token.start < length or not cut]
        self._pending = [] if self.done else self._pending[len(shown) :]
        return self._show(self._tokenizer, shown, self._n_top)


def format_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], n_top: int) -> dict[str, list[Any]]:
    """The form of /v1/completions: what is known of the tokens, a list for each kind of it."""

    def name_top(top: list[tuple[int, float]] | None) -> dict[str, float] | None:
        if top is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in top[:n_top]:
            named.setdefault(token_text(tokenizer, token), logprob)  # of equal names the likelier
        return named

    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [name_top(token.top) for token in tokens],
        "text_offset": [token.start for token in tokens],
    }


def format_chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], n_top: int) -> dict[str, list[Any]]:
    """The form of chats: one list, an entry for each token, with its bytes."""

    def show(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.decode_bytes([token])
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(data) or None}

    return {
        "content": [
            {**show(token.id, token.logprob), "top_logprobs": [show(*pair) for pair in (token.top or [])[:n_top]]}
            for token in tokens
        ]
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; "bytes:\\xe2\\x80" where it is none by itself, "<|endoftext|>" for the end, "<|7|>" for other marks."""
    data = tokenizer.decode_bytes([token])
    if not data:
        return "<|endoftext|>" if token == tokenizer.end_of_text else f"<|{token}|>"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def join_deltas(pieces: Sequence[Delta]) -> Delta:
    """All of a sample in one."""
    logprobs = None
    if pieces[0].logprobs is not None:
        logprobs = {name: [x for piece in pieces for x in (piece.logprobs or {})[name]] for name in pieces[0].logprobs}
    return Delta("".join(piece.text for piece in pieces), logprobs, pieces[-1].finish)
