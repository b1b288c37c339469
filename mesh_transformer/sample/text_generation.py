# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: prompts become tokens, tokens become whole characters, and stop strings end a text exactly."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.data.tokenizers import StreamDecoder, Tokenizer
from mesh_transformer.sample.engine.engine import DecoderOnlyEngine
from mesh_transformer.sample.engine.requests import Event

Finish = Literal["stop", "length", "interrupted"]


class TextCompletion(NamedTuple):
    """One sample of one prompt."""

    prompt: str
    text: str  # ends before the stop string
    tokens: list[int]  # all that were drawn, those of the stop string or the end of text included
    logprobs: list[float]  # of each token in the model's own distribution, natural log
    finish: Finish

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self._asdict(), ensure_ascii=False)


class StopStrings:
    """Lets text through until one of the `stops` is complete, and holds back what could still become one.

    The first stop string to be complete counts (of several, the longest), whatever pieces the text arrives in.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("a stop string is empty; it would end every text before it begins")
        self._stops = list(stops)
        self._held = ""
        self.complete = False

    def push(self, text: str) -> str:
        """What may be shown now; nothing more once a stop string is complete."""
        if self.complete:
            return ""
        self._held += text
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            self.complete = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max(
            (n for stop in self._stops for n in range(len(stop)) if n and self._held.endswith(stop[:n])), default=0
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back in vain."""
        shown, self._held = self._held, ""
        return shown


@dataclasses.dataclass
class TextRow:
    """One sample's text as its tokens arrive: whole characters, up to the first stop string."""

    prompt: str
    decoder: StreamDecoder
    stops: StopStrings
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: Finish = "interrupted"
    decoded: int = 0  # whole characters so far, held back or not

    def push(self, event: Event) -> str:
        """Take one token; what may be shown now. Once `finish` says why, there is no more to come."""
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        piece = self.decoder.push([event.token])
        self.decoded += len(piece)
        shown = self.stops.push(piece)
        if self.stops.complete:
            self.finish = "stop"
        elif event.finish:
            self.finish = event.finish
            shown += self.close()
        self.text += shown
        return shown

    def close(self) -> str:
        """What was held back, where no more tokens come."""
        shown = self.stops.push(self.decoder.finish())
        return shown if self.stops.complete else shown + self.stops.finish()


class TextGeneration:
    """`n` continuations of every prompt on their way; iterating gives (row, new characters), rows as the engine's.

    Without room for `options.max_tokens` behind a prompt there are as many as fit. An empty prompt begins a document.
    Raises PromptError for a prompt that is too long.
    """

    def __init__(
        self,
        engine: DecoderOnlyEngine,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        options: SampleConfig,
        *,
        n: int = 1,
        seed: int = 0,
        stops: Sequence[str] = (),
    ) -> None:
        ids = [tokenizer.encode(prompt) or [tokenizer.end_of_text] for prompt in prompts]
        rooms = [max(min(options.max_tokens, engine.config.max_new_tokens(len(prompt))), 1) for prompt in ids]
        each = [dataclasses.replace(options, max_tokens=room) for room in rooms]
        self._rows = [
            TextRow(prompt, StreamDecoder(tokenizer, continues=bool(prompt)), StopStrings(stops))
            for prompt in prompts
            for _ in range(n)
        ]
        self._generation = engine.start(ids, each, n=n, seed=seed, stop_tokens=[tokenizer.end_of_text])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for event in self._generation.events():
            row = self._rows[event.request]
            shown = row.push(event)
            if row.stops.complete:
                self._generation.stop(event.request)
            if shown:
                yield event.request, shown

    def interrupt(self) -> list[tuple[int, str]]:
        """End every row here; returns (row, characters) that were held back."""
        rest = []
        for number, row in enumerate(self._rows):
            if row.finish == "interrupted" and not row.stops.complete:
                self._generation.stop(number)
                shown = row.close()
                row.text += shown
                rest.append((number, shown))
        return rest

    @property
    def n_tokens(self) -> int:
        """Tokens drawn so far, over all rows."""
        return sum(len(row.tokens) for row in self._rows)

    def completions(self) -> list[TextCompletion]:
        """All rows as far as they are, in order."""
        return [TextCompletion(row.prompt, row.text, row.tokens, row.logprobs, row.finish) for row in self._rows]


def complete_texts(
    engine: DecoderOnlyEngine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SampleConfig,
    *,
    n: int = 1,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> list[TextCompletion]:
    """`n` continuations of every prompt, sample i of prompt j at j n + i; see TextGeneration."""
    generation = TextGeneration(engine, tokenizer, prompts, options, n=n, seed=seed, stops=stops)
    for _ in generation:
        pass
    return generation.completions()
