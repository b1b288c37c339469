# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Documents -> bits per byte: the Pile's protocol (2101.00027, section 3), or windows that overlap.

A document stands by itself behind one end of text. It is cut into segments of the context's length, and every token is
scored once, given what stands before it in its segment; the first of a segment is given the last of the segment before.
With a stride below the context's length segments overlap: each window scores `stride` new tokens and sees
more than those. The end of the document is not scored. Nats are divided by the UTF-8 bytes of the text, which no tokenizer changes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import xxhash

from mesh_transformer.config import ConfigError
from mesh_transformer.data.errors import DataError, Document
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.evaluate.loglikelihood import LoglikelihoodScorer, ScoringRequest

CHUNK_TOKENS = 1 << 18  # tokens that are held and scored at a time


class TextScore(NamedTuple):
    """What a collection of documents came to."""

    negative_logprob: float  # negative log-likelihood of all tokens
    tokens: int
    n_bytes: int  # of the text in UTF-8
    documents: int
    size: int  # bytes of the whole collection, of which a share may have been scored

    @property
    def bits_per_byte(self) -> float:
        """The measure that models with different tokenizers share."""
        return self.negative_logprob / math.log(2) / self.n_bytes

    @property
    def nats_per_byte(self) -> float:
        """The same in natural units."""
        return self.negative_logprob / self.n_bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.negative_logprob / self.tokens

    @property
    def tokens_per_byte(self) -> float:
        """How finely the tokenizer cuts: L_T / L_B of the Pile's table 7."""
        return self.tokens / self.n_bytes

    def to_results(self) -> dict[str, float]:
        """The numbers as results name them."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "nats_per_byte": self.nats_per_byte,
            "nats_per_token": self.loss,
            "token_perplexity": math.exp(min(self.loss, 700.0)),
            "tokens_per_byte": self.tokens_per_byte,
            "documents": self.documents,
            "bytes": self.n_bytes,
            "tokens": self.tokens,
        }


def sliding_windows(
    tokens: Sequence[int], end_of_text: int, context: int, stride: int | None = None
) -> Iterator[ScoringRequest]:
    """Queries that together score every token of a document once, in order.

    A window reads at most `context` tokens and begins `stride` (default: context) tokens behind the one before.
    """
    stride = context if stride is None else stride
    if not 0 < stride <= context:
        raise ConfigError(f"a stride of {stride} with a context of {context}: it is from 1 to the context's length")
    whole = [end_of_text, *tokens]
    scored = 0
    for first in range(0, len(tokens), stride):
        end = min(first + context, len(tokens))
        yield ScoringRequest(whole[first : end + 1], end - scored)
        scored = end
        if end == len(tokens):
            return


def score_documents(
    scorer: LoglikelihoodScorer,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, Document]],
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    fraction: float = 1.0,
    on_progress: Callable[[int], None] = lambda n_bytes: None,
) -> dict[str, TextScore]:
    """Score documents by the component that stands before each; components in the order in which they come.

    Of each component the first `limit` documents are scored of the `share` that a hash of their names picks. `context`
    is the segments' length (default: the model's seq_len). `report` gets the bytes of text scored so far. Raises
    ConfigError for a context that the model has not, DataError where nothing of a component is left to score.
    """
    context = scorer.config.seq_len if context is None else context
    if not 0 < context <= scorer.config.seq_len:
        raise ConfigError(f"evaluate.context={context}: the model's seq_len is {scorer.config.seq_len}")
    sums: dict[str, _Sum] = {}
    waiting: list[tuple[_Sum, ScoringRequest]] = []
    scored_bytes = told = 0

    def score_waiting() -> None:
        nonlocal told
        before, told = told, scored_bytes
        queries = [query for _, query in waiting]
        found = scorer.score_totals(queries, lambda done, total: on_progress(before + (told - before) * done // total))
        for (total, _), (logprob, _) in zip(waiting, found, strict=True):
            total.nats.append(-logprob)
        waiting.clear()

    for component, document in documents:
        total = sums.setdefault(component, _Sum())
        n_bytes = len(document.text.encode())
        total.size += n_bytes
        if not is_sampled(document.name, fraction) or total.documents == limit:
            continue
        tokens = tokenizer.encode(document.text)
        total.tokens, total.n_bytes, total.documents = (
            total.tokens + len(tokens), total.n_bytes + n_bytes, total.documents + 1
        )  # fmt: skip
        scored_bytes += n_bytes
        waiting += [(total, query) for query in sliding_windows(tokens, tokenizer.end_of_text, context, stride)]
        if sum(query.n_scored for _, query in waiting) >= CHUNK_TOKENS:
            score_waiting()
    score_waiting()
    if empty := [name for name, total in sums.items() if not total.tokens]:
        raise DataError(f"{empty[0]}: no text to score in a share of {fraction}; raise evaluate.sample_fraction")
    if not sums:
        raise DataError("no documents to score")
    return {name: total.finish() for name, total in sums.items()}


@dataclasses.dataclass
class _Sum:
    nats: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    n_bytes: int = 0
    documents: int = 0
    size: int = 0

    def finish(self) -> TextScore:
        return TextScore(math.fsum(self.nats), self.tokens, self.n_bytes, self.documents, self.size)


def is_sampled(name: str, share: float) -> bool:
    """Whether the document of this name belongs to the `share` that is scored, the same at every time and place."""
    return share >= 1.0 or xxhash.xxh3_64_intdigest(name.encode()) < share * 2**64


def weighted_total(scores: Mapping[str, TextScore]) -> dict[str, float]:
    """Bits and nats per byte over all components, weighted by their sizes, as the Pile's total is."""
    size = sum(score.size for score in scores.values())
    bits = math.fsum(score.bits_per_byte * score.size for score in scores.values()) / size
    return {"bits_per_byte": bits, "nats_per_byte": bits * math.log(2), "bytes": size}
