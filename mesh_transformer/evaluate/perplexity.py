# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of documents: the Pile's protocol (arXiv 2101.00027, section 3), or overlapping windows.

Each document is scored separately, after a prefix token: the BOS token (<s>) if the tokenizer of a converted model adds it,
otherwise the end-of-text token. The document is split into segments of the context length. Every token is scored once, given
the tokens before it in its segment; the first token of a segment is given the last token of the previous segment. With a
stride below the context length, segments overlap: each window scores `stride` new tokens, with the earlier tokens of the
window as context. No end-of-text token is scored after the document. The loss in nats is divided by the number of UTF-8
bytes of the text, which does not depend on the tokenizer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from mesh_transformer.config import ConfigError
from mesh_transformer.data.errors import DataError, Document
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer, ScoringRequest
from mesh_transformer.sample.model_defaults import ModelDefaults

CHUNK_TOKENS = 1 << 18  # tokens that are scored at a time


class TextScore(NamedTuple):
    """Total score of a collection of documents."""

    negative_logprob: float  # of all tokens, in nats
    tokens: int
    n_bytes: int  # of the text in UTF-8
    documents: int
    n_total_bytes: int  # of the full collection in UTF-8, of which only a fraction may have been scored

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per UTF-8 byte, comparable between tokenizers."""
        return self.negative_logprob / math.log(2) / self.n_bytes

    @property
    def loss_per_byte(self) -> float:
        """Loss in nats per UTF-8 byte."""
        return self.negative_logprob / self.n_bytes

    @property
    def loss(self) -> float:
        """Loss in nats per token."""
        return self.negative_logprob / self.tokens

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte: L_T / L_B of the Pile's table 7."""
        return self.tokens / self.n_bytes

    def to_results(self) -> dict[str, float]:
        """Return the metrics by their names in evaluation results."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_byte": self.loss_per_byte,
            "nats_per_token": self.loss,
            "token_perplexity": math.exp(min(self.loss, 700.0)),
            "tokens_per_byte": self.tokens_per_byte,
            "documents": self.documents,
            "bytes": self.n_bytes,
            "tokens": self.tokens,
        }


def sliding_windows(
    tokens: Sequence[int], prefix_token: int, context: int, stride: int | None = None
) -> Iterator[ScoringRequest]:
    """Yield requests that together score every token of a document once, in order; `prefix_token` precedes the first token.

    A window has at most `context` tokens and begins `stride` (default: `context`) tokens after the previous window.
    Raises ConfigError for a stride that is not between 1 and `context`.
    """
    stride = context if stride is None else stride
    if not 0 < stride <= context:
        raise ConfigError(
            f"evaluate.stride={stride}: must be between 1 and the context of {context} tokens (evaluate.context)"
        )
    padded = [prefix_token, *tokens]
    scored = 0
    for first in range(0, len(tokens), stride):
        end = min(first + context, len(tokens))
        yield ScoringRequest(padded[first : end + 1], end - scored)
        scored = end
        if end == len(tokens):
            return


def score_documents(
    scorer: LoglikelihoodScorer,
    defaults: ModelDefaults,
    documents: Iterable[tuple[str, Document]],
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    fraction: float = 1.0,
    on_progress: Callable[[int], None] = lambda n_bytes: None,
) -> dict[str, TextScore]:
    """Return the score of each component, given pairs of component and document.

    A hash of the document's name selects a `fraction` of each component, of which the first `limit` documents are scored.
    `context` is the segment length in tokens (default: the model's seq_len). `on_progress` receives the number of bytes
    scored so far. Raises ConfigError for an invalid context or stride, DataError for a component without text to score.
    """
    context = scorer.config.seq_len if context is None else context
    if not 0 < context <= scorer.config.seq_len:
        raise ConfigError(f"evaluate.context={context}: must be between 1 and model.seq_len={scorer.config.seq_len}")
    sums: dict[str, _Sum] = {}
    waiting: list[tuple[_Sum, ScoringRequest]] = []
    scored_bytes = reported = 0

    def score_waiting() -> None:
        nonlocal reported
        before = reported
        reported = scored_bytes
        requests = [request for _, request in waiting]
        results = scorer.score_totals(
            requests, lambda done, total: on_progress(before + (reported - before) * done // total)
        )
        for (total, _), (logprob, _) in zip(waiting, results, strict=True):
            total.negative_logprobs.append(-logprob)
        waiting.clear()

    for component, document in documents:
        total = sums.setdefault(component, _Sum())
        n_bytes = len(document.text.encode())
        total.n_total_bytes += n_bytes
        if not is_sampled(document.name, fraction) or total.documents == limit:
            continue
        tokens = defaults.tokenizer.encode(document.text)
        total.tokens += len(tokens)
        total.n_bytes += n_bytes
        total.documents += 1
        scored_bytes += n_bytes
        windows = sliding_windows(tokens, defaults.prefix_token_id, context, stride)
        waiting += [(total, request) for request in windows]
        if sum(request.n_scored for _, request in waiting) >= CHUNK_TOKENS:
            score_waiting()
    score_waiting()
    if empty := [name for name, total in sums.items() if not total.tokens]:
        if fraction < 1:
            raise DataError(
                f"component {empty[0]!r}: evaluate.sample_fraction={fraction} selected no document with text; increase it (at "
                "most 1)"
            )
        raise DataError(
            f"component {empty[0]!r}: all its documents are empty; correct its file, or remove the component"
        )
    if not sums:
        raise DataError("the text task has no documents to score; add text: --data NAME=PATH")
    return {name: total.finish() for name, total in sums.items()}


@dataclasses.dataclass
class _Sum:
    """Running totals of a component; fields as in TextScore, with one log-probability per window."""

    negative_logprobs: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    n_bytes: int = 0
    documents: int = 0
    n_total_bytes: int = 0

    def finish(self) -> TextScore:
        negative_logprob = math.fsum(self.negative_logprobs)
        return TextScore(negative_logprob, self.tokens, self.n_bytes, self.documents, self.n_total_bytes)


def is_sampled(name: str, fraction: float) -> bool:
    """Return whether a document is in the sampled fraction, which depends only on the document's name."""
    return fraction >= 1.0 or xxhash.xxh3_64_intdigest(name.encode()) < fraction * 2**64


def weighted_total(scores: Mapping[str, TextScore]) -> dict[str, float]:
    """Return bits and nats per byte over all components, weighted by their sizes in bytes, as in the Pile's total."""
    n_bytes = sum(score.n_total_bytes for score in scores.values())
    bits = math.fsum(score.bits_per_byte * score.n_total_bytes for score in scores.values()) / n_bytes
    return {"bits_per_byte": bits, "nats_per_byte": bits * math.log(2), "bytes": n_bytes}
