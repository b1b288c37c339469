# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Output stream of one sample: converts engine events to text deltas with the log-probabilities of their tokens."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mesh_transformer.data.stream_decoder import StreamDecoder
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.sample.engine.requests import Event, Score
from mesh_transformer.sample.text_generation import StopStrings, TextStreamer


class Delta(NamedTuple):
    """New output of a sample; the concatenated deltas are its full output."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


class TokenLogprob(NamedTuple):
    """A token of a sample, or of its prompt with `echo`."""

    start: int  # character offset in the output text
    id: int
    logprob: float | None
    top: list[tuple[int, float]] | None


LogprobFormatter = Callable[[Tokenizer, Sequence[TokenLogprob], int], dict[str, list[Any]]]


def format_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], n_top: int) -> dict[str, list[Any]]:
    """Return log-probabilities in the format of /v1/completions: one list per field."""

    def format_top(top: list[tuple[int, float]] | None) -> dict[str, float] | None:
        if top is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in top[:n_top]:
            named.setdefault(token_text(tokenizer, token), logprob)  # of tokens with equal text, keep the most probable
        return named

    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [format_top(token.top) for token in tokens],
        "text_offset": [token.start for token in tokens],
    }


def format_chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], n_top: int) -> dict[str, list[Any]]:
    """Return log-probabilities in the format of chat completions: one list with an entry per token."""

    def format_token(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.decode_bytes([token])
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(data) or None}

    content = []
    for token in tokens:
        top = [format_token(*pair) for pair in (token.top or [])[:n_top]]
        content.append({**format_token(token.id, token.logprob), "top_logprobs": top})
    return {"content": content}


class OutputOptions(NamedTuple):
    """Options of the output of every sample, as requested by the client."""

    stops: Sequence[str] = ()
    top_logprobs: int | None = None  # number of most probable tokens per token; None: no log-probabilities
    echo: bool = False  # the output begins with the prompt
    empty: bool = False  # max_tokens=0: the engine generates one token, which is discarded
    format_logprobs: LogprobFormatter = format_logprobs


class SampleStream:
    """The output of one sample while it is generated."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, prompt_tokens: Sequence[int], options: OutputOptions):
        """`prompt` is the text of `prompt_tokens`."""
        self._tokenizer = tokenizer
        self._options = options
        self._prompt_tokens = list(prompt_tokens) if options.echo else []
        self._prompt = prompt if options.echo else ""
        decoder = StreamDecoder(tokenizer, continues=bool(prompt))
        self.streamer = TextStreamer(prompt, decoder, StopStrings(options.stops))
        self._pending: list[TokenLogprob] = []  # tokens whose text is not in a delta yet
        self._started = False
        self.done = False

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of a generated token."""
        return sum(self.streamer.logprobs) / max(len(self.streamer.logprobs), 1)

    def push(self, events: Sequence[Event]) -> Delta:
        """Add generated tokens and return the new output; tokens after the sample's end are ignored."""
        text = ""
        for event in events:
            if self.done:
                break
            if not self._started:
                self._started = True
                text = self._prompt
                self._add_prompt(event.prompt_scores)
            if self._options.empty:
                self.streamer.finish = "length"
                self.done = True
                break
            start = len(self._prompt) + self.streamer.decoded
            if self._options.top_logprobs is not None:
                self._pending.append(TokenLogprob(start, event.token, event.logprob, event.top))
            text += self.streamer.push(event)
            self.done = self.streamer.finish != "interrupted"
        return Delta(text, self._take_logprobs(), self.streamer.finish if self.done else None)

    def _add_prompt(self, scores: list[Score] | None) -> None:
        if self._options.top_logprobs is None or not self._prompt_tokens:
            return
        decoder, start = StreamDecoder(self._tokenizer), 0
        by_token: list[Score | None] = [None, *(scores or [])]  # the first token has no score
        for token, score in zip(self._prompt_tokens, by_token, strict=True):
            logprob, top = (score.logprob, score.top) if score else (None, None)
            self._pending.append(TokenLogprob(start, token, logprob, top))
            start += len(decoder.push([token]))

    def _take_logprobs(self) -> dict[str, list[Any]] | None:
        """Return the tokens whose first character is in the output, and at the token limit all remaining tokens."""
        if self._options.top_logprobs is None:
            return None
        length = len(self._prompt) + len(self.streamer.text) if self._started else 0
        at_limit = self.streamer.finish == "length"
        ready = [token for token in self._pending if token.start < length or at_limit]
        self._pending = [] if self.done else self._pending[len(ready) :]
        return self._options.format_logprobs(self._tokenizer, ready, self._options.top_logprobs)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text, or "bytes:\\xe2\\x80" for incomplete UTF-8, "<|endoftext|>", or "<|7|>" for special token 7."""
    data = tokenizer.decode_bytes([token])
    if not data:
        return "<|endoftext|>" if token == tokenizer.end_of_text else f"<|{token}|>"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def join_deltas(deltas: Sequence[Delta]) -> Delta:
    """Concatenate all deltas of a sample."""
    logprobs = None
    if (first := deltas[0].logprobs) is not None:
        logprobs = {name: [x for delta in deltas for x in (delta.logprobs or {})[name]] for name in first}
    return Delta("".join(delta.text for delta in deltas), logprobs, deltas[-1].finish_reason)
