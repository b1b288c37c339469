# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of the engine, a row for each sample, and what comes back, an event for each token."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.sample.engine.device_state import BatchParams
from mesh_transformer.sample.engine.programs import MAX_TOP_LOGPROBS
from mesh_transformer.sample.sampling import stack_options

STOP_TOKENS = 8  # most that one row can have


class PromptError(ValueError):
    """A prompt the model cannot continue, or a wish it cannot grant; the message says why and what would fit."""


@runtime_checkable
class Constraint(Protocol):
    """What a row may draw next, given what it drew."""

    def allowed(self) -> np.ndarray:
        """bool [V]; at least one token."""
        ...

    def accept(self, token: int) -> None:
        """The row drew this token."""
        ...


class Score(NamedTuple):
    """How probable a token of a prompt was behind those before it."""

    logprob: float
    top: list[tuple[int, float]]  # the likeliest tokens at its place


class Event(NamedTuple):
    """One token that was drawn."""

    request: int
    token: int
    logprob: float  # natural log, in the model's own distribution
    finish: Literal["stop", "length"] | None  # why this is the row's last token, if it is
    top: list[tuple[int, float]] | None = None  # likeliest tokens and their log-probabilities, where the row asked
    prompt_scores: list[Score] | None = None  # of the prompt's tokens but the first, with the first event, where asked


@dataclasses.dataclass(eq=False)
class Request:
    """One sample of one prompt, from the moment it is asked for to its last token."""

    id: int
    prompt: np.ndarray  # int32 [T]
    options: SampleConfig
    max_tokens: int
    seed: int = 0
    sample: int = 0  # folded into the seed's key, so that samples of a prompt differ
    stop_tokens: Sequence[int] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    n_top: int = 0
    score_prompt: bool = False
    constraint: Constraint | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)  # drawn so far
    cancelled: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.tokens)

    def check(self, config: ModelConfig, name: str) -> None:
        """Raise PromptError where the model cannot do what is asked; `name` is what the person calls the prompt."""
        length, longest = len(self.prompt), config.seq_len
        room = config.max_new_tokens(length)
        if not length:
            raise PromptError(f"{name} is empty; begin with the end-of-text token")
        named = {name: self.prompt.tolist(), "logit_bias": self.logit_bias, "stop_tokens": self.stop_tokens}
        for what, tokens in named.items():
            if outside := [token for token in tokens if not 0 <= token < config.n_vocab]:
                raise PromptError(
                    f"{what} has the token {outside[0]}, but the model's vocabulary is 0..{config.n_vocab - 1}"
                )
        if self.max_tokens < 1:
            raise PromptError(f"max_tokens={self.max_tokens}: ask for at least one")
        if length >= longest:
            raise PromptError(
                f"{name} has {length} tokens, but the model reads at most seq_len={longest} with the answer; shorten it"
            )
        if self.max_tokens > room:
            raise PromptError(
                f"{name} has {length} tokens and max_tokens={self.max_tokens} more exceed the model's seq_len={longest}; "
                f"ask for at most max_tokens={room}, or shorten it"
            )
        if not 0 <= self.n_top <= MAX_TOP_LOGPROBS:
            raise PromptError(f"{self.n_top} likeliest tokens were asked for; there can be {MAX_TOP_LOGPROBS}")
        if len(self.stop_tokens) > STOP_TOKENS:
            raise PromptError(f"{len(self.stop_tokens)} stop tokens; there can be {STOP_TOKENS}")


def stack_requests(rows: Sequence[Request], n_vocab: int) -> BatchParams:
    """What `rows` ask for, as arrays."""
    prompt, bias = np.zeros((len(rows), n_vocab), bool), np.zeros((len(rows), n_vocab), np.float32)
    stop_tokens = np.full((len(rows), STOP_TOKENS), -1, np.int32)
    for i, row in enumerate(rows):
        prompt[i, row.prompt] = True
        bias[i, list(row.logit_bias)] = list(row.logit_bias.values())
        stop_tokens[i, : len(row.stop_tokens)] = row.stop_tokens
    return BatchParams(
        keys=_make_keys(np.array([(row.seed, row.sample) for row in rows], np.uint32)),
        options=stack_options([row.options for row in rows]),
        prompt=jnp.asarray(prompt),
        bias=jnp.asarray(bias),
        limit=jnp.asarray([len(row.prompt) + row.max_tokens - 1 for row in rows], jnp.int32),
        stop_tokens=jnp.asarray(stop_tokens),
    )


def stack_allowed(rows: Sequence[Request | None], n_vocab: int) -> Any:
    """bool [B, V], what each row may draw; None if none is constrained. Rows that are not, and empty seats, may draw anything."""
    if not any(row and row.constraint for row in rows):
        return None
    allowed = np.ones((len(rows), n_vocab), bool)
    for i, row in enumerate(rows):
        if row and row.constraint:
            allowed[i] = row.constraint.allowed()
            assert allowed[i].any(), "a constraint must leave a token"
    return jnp.asarray(allowed)


@jax.jit
def _make_keys(pairs: Any) -> Any:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(pair[0]), pair[1]))(pairs)
