# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Text generation: tokenizes prompts, detokenizes tokens as they arrive, and ends texts at stop strings."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from mesh_transformer.config import ConfigError, SampleConfig
from mesh_transformer.data.stream_decoder import StreamDecoder
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.engine.requests import Event, SpeculativeStats
from mesh_transformer.sample.model_defaults import ModelDefaults

Finish = Literal["stop", "length", "interrupted"]


class TextCompletion(NamedTuple):
    """One sample of one prompt."""

    prompt: str
    text: str  # ends before the stop string
    tokens: list[int]  # all generated tokens, including those of the stop string or the end of text
    logprobs: list[float]  # natural log-probability of each token in the unmodified distribution of the model
    finish: Finish
    speculative: SpeculativeStats | None = None  # None without speculative decoding

    def to_json(self) -> str:
        """Return a JSON object on one line. The field `speculative` is present only with speculative decoding."""
        fields = self._asdict()
        del fields["speculative"]
        if self.speculative:
            fields["speculative"] = dataclasses.asdict(self.speculative)
        return json.dumps(fields, ensure_ascii=False)


class StopStrings:
    """Ends streamed text before the first stop string, and holds back text that may be the start of a stop string.

    If the same character completes several stop strings, the text ends before the longest of them. The result does not depend
    on the division of the text between calls.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ConfigError for an empty stop string."""
        if any(not stop for stop in stops):
            raise ConfigError("got an empty stop string, which would end every text at its start; remove it")
        self._stops = list(stops)
        self._held = ""
        self.complete = False

    def push(self, text: str) -> str:
        """Add text and return the text that can be shown, which is empty after a stop string."""
        if self.complete:
            return ""
        self._held += text
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if ends:
            self.complete = True
            shown = self._held[: min(ends)[1]]
            self._held = ""
            return shown
        n_held = max(
            (n for stop in self._stops for n in range(len(stop)) if n and self._held.endswith(stop[:n])), default=0
        )
        n_shown = len(self._held) - n_held
        shown = self._held[:n_shown]
        self._held = self._held[n_shown:]
        return shown

    def finish(self) -> str:
        """Return the text that was held back but is not part of a stop string."""
        shown = self._held
        self._held = ""
        return shown


@dataclasses.dataclass
class TextStreamer:
    """The text of one sample as its tokens arrive: complete characters, up to the first stop string."""

    prompt: str
    decoder: StreamDecoder
    stops: StopStrings
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: Finish = "interrupted"
    decoded: int = 0  # number of complete characters so far, including held-back characters

    def push(self, event: Event) -> str:
        """Add a token and return the text that can be shown. `finish` is set with the last token."""
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        decoded = self.decoder.push([event.token])
        self.decoded += len(decoded)
        shown = self.stops.push(decoded)
        if self.stops.complete:
            self.finish = "stop"
        elif event.finish:
            self.finish = event.finish
            shown += self.close()
        self.text += shown
        return shown

    def close(self) -> str:
        """Return the text that was held back; called when no more tokens follow."""
        shown = self.stops.push(self.decoder.finish())
        return shown if self.stops.complete else shown + self.stops.finish()


class TextGeneration:
    """Generation of `n` samples of every prompt. Iteration yields (index, new text); see Engine.start for the indices.

    A prompt is a text or token ids. A sample ends at any of `defaults.eos_token_ids`, and has fewer than
    `options.max_tokens` tokens if the sequence reaches seq_len earlier.
    """

    def __init__(
        self,
        engine: Engine,
        defaults: ModelDefaults,
        prompts: Sequence[str | list[int]],
        options: SampleConfig,
        *,
        n: int = 1,
        seed: int = 0,
        stops: Sequence[str] = (),
    ) -> None:
        """Submit the requests. Raises PromptError for a prompt that is too long."""
        tokenizer = defaults.tokenizer
        encode_options = {"add_special_tokens": options.add_special_tokens, "parse_special": options.parse_special}
        ids = [prompt if isinstance(prompt, list) else defaults.encode(prompt, **encode_options) for prompt in prompts]
        texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
        limits = [max(min(options.max_tokens, engine.config.max_new_tokens(len(prompt))), 1) for prompt in ids]
        options_by_prompt = [dataclasses.replace(options, max_tokens=limit) for limit in limits]
        self._streamers = [
            TextStreamer(text, StreamDecoder(tokenizer, continues=bool(text)), StopStrings(stops))
            for text in texts
            for _ in range(n)
        ]
        self._is_speculative = engine.is_speculative
        self._generation = engine.start(ids, options_by_prompt, n=n, seed=seed, stop_tokens=defaults.eos_token_ids)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for event in self._generation.events():
            streamer = self._streamers[event.request]
            shown = streamer.push(event)
            if streamer.stops.complete:
                self._generation.stop(event.request)
            if shown:
                yield event.request, shown

    def interrupt(self) -> list[tuple[int, str]]:
        """End all samples, and return the text that was held back as pairs (index, text)."""
        rest = []
        for index, streamer in enumerate(self._streamers):
            if streamer.finish == "interrupted" and not streamer.stops.complete:
                self._generation.stop(index)
                shown = streamer.close()
                streamer.text += shown
                rest.append((index, shown))
        return rest

    @property
    def n_tokens(self) -> int:
        """Tokens generated so far, over all samples."""
        return sum(len(streamer.tokens) for streamer in self._streamers)

    def completions(self) -> list[TextCompletion]:
        """Return all samples in order, with the text generated so far."""
        return [
            TextCompletion(
                streamer.prompt,
                streamer.text,
                streamer.tokens,
                streamer.logprobs,
                streamer.finish,
                self._generation.speculative_stats(index) if self._is_speculative else None,
            )
            for index, streamer in enumerate(self._streamers)
        ]


def complete_texts(
    engine: Engine,
    defaults: ModelDefaults,
    prompts: Sequence[str | list[int]],
    options: SampleConfig,
    *,
    n: int = 1,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> list[TextCompletion]:
    """Return `n` samples of every prompt; sample i of prompt j has index j n + i. See TextGeneration."""
    generation = TextGeneration(engine, defaults, prompts, options, n=n, seed=seed, stops=stops)
    for _ in generation:
        pass
    return generation.completions()
