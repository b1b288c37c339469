# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What judges or mends one document at a time: most are DataTrove's filters and formatters as they are.

A step is a function that may change a document's text, and returns why the document is dropped, or "" to keep it. A new
one is a record in recipe.py and a row in MAKERS.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.formatters.base import BaseFormatter

from mesh_transformer.corpus import recipe as r
from mesh_transformer.corpus.contamination import ContaminationIndex
from mesh_transformer.corpus.markup import install_hint
from mesh_transformer.corpus.quality import load_classifier
from mesh_transformer.corpus.word_tokenizer import WORDS

FilterFn = Callable[[Document], str]
ADDRESS = 320  # characters of an e-mail address at most, 64 before the @


def make_filters(recipe: r.Recipe, component: str, classifiers: dict[int, Path]) -> list[tuple[str, FilterFn]]:
    """Name and function of every step that a component takes; `classifiers` has the model of each quality step."""
    steps: list[tuple[str, FilterFn]] = []
    if least := recipe.components[component].min_bytes:
        steps.append(("min_bytes", _length(r.Length(kind="length", min_bytes=least), recipe, None)))
    for place, step in r.steps_of(recipe, component):
        steps.append((f"{place}-{step.kind}", FILTERS[step.kind](step, recipe, classifiers.get(place))))
    return steps


def _from_filter(block: BaseFilter) -> FilterFn:
    """A filter of DataTrove. Texts without a word divide by zero in some of them: such have nothing to judge by."""

    def apply(document: Document) -> str:
        if not WORDS.word_tokenize(document.text):
            return "no words"
        result = block.filter(document)
        kept, reason = result if isinstance(result, tuple) else (result, block.name)
        return "" if kept else reason

    return apply


def _from_formatter(block: BaseFormatter) -> FilterFn:
    def apply(document: Document) -> str:
        document.text = block.format(document.text)
        return ""

    return apply


def _mask_pii(step: r.MaskPII, recipe: r.Recipe, model: Path | None) -> FilterFn:
    block = PIIFormatter(remove_emails=False)  # IP addresses, whose pattern is bounded

    def apply(document: Document) -> str:
        text, pieces, done = document.text, [], 0
        for start, end in _around_signs(text):
            pieces += [text[done:start], block.emails_replacer.replace(text[start:end])]
            done = end
        document.text = block.format("".join([*pieces, text[done:]]) if pieces else text)
        return ""

    return apply


def _around_signs(text: str) -> Iterator[tuple[int, int]]:
    """Spans around every @: DataTrove's pattern for e-mail takes the square of a run like a-a-a, which may be a megabyte."""
    start, end, at = 0, -1, text.find("@")
    while at >= 0:
        if end < at - ADDRESS:
            if end > 0:
                yield start, end
            start = max(at - ADDRESS, 0)
        end = min(at + ADDRESS, len(text))
        at = text.find("@", at + 1)
    if end > 0:
        yield start, end


def _length(step: r.Length, recipe: r.Recipe, model: Path | None) -> FilterFn:
    def apply(document: Document) -> str:
        size = len(document.text.encode())
        if size < step.min_bytes:
            return f"under {step.min_bytes} bytes"
        return f"over {step.max_bytes} bytes" if step.max_bytes and size > step.max_bytes else ""

    return apply


def _language(step: r.Language, recipe: r.Recipe, model: Path | None) -> FilterFn:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise install_hint("py3langid") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def apply(document: Document) -> str:
        language, score = identifier.classify(document.text[: step.characters])
        document.metadata["language"] = language
        if step.keep and language not in step.keep:
            return f"language {language}"
        return f"language {language} below {step.min_score}" if score < step.min_score else ""

    return apply


def _quality(step: r.Quality, recipe: r.Recipe, model: Path | None) -> FilterFn:
    assert model is not None, "trained before documents are judged"
    score = load_classifier(model)

    def apply(document: Document) -> str:
        document.metadata["quality"] = round(value := score(document.text), 4)
        draw = random.Random(xxhash.xxh3_64_intdigest(f"{recipe.corpus.seed}:quality:{document.id}".encode()))
        # numpy's and the paper's Pareto begins at 0, Python's at 1
        return "" if draw.paretovariate(step.alpha) - 1 > 1 - value else "low quality"

    return apply


def _decontaminate(step: r.Decontaminate, recipe: r.Recipe, model: Path | None) -> FilterFn:
    index = ContaminationIndex(step, {name: recipe.evaluation[name] for name in step.against})
    return index.clean


def _gopher_quality(step: r.GopherQuality, recipe: r.Recipe, model: Path | None) -> FilterFn:
    return _from_filter(
        GopherQualityFilter(
            min_doc_words=step.min_words,
            max_doc_words=step.max_words,
            min_stop_words=step.min_stop_words,
            language=_WORDS,
        )
    )


def _c4(step: r.C4, recipe: r.Recipe, model: Path | None) -> FilterFn:
    block = C4QualityFilter(
        min_num_sentences=step.min_sentences, filter_no_terminal_punct=step.needs_end_punctuation, language=_WORDS
    )
    return _from_filter(block)


_WORDS: Any = WORDS  # DataTrove's blocks say that they take a language, and take a tokenizer as well
FILTERS: dict[str, Callable[[Any, r.Recipe, Path | None], FilterFn]] = {
    "repair": lambda step, recipe, model: _from_formatter(FTFYFormatter()),
    "length": _length,
    "language": _language,
    "gopher-repetition": lambda step, recipe, model: _from_filter(GopherRepetitionFilter(language=_WORDS)),
    "gopher-quality": _gopher_quality,
    "c4": _c4,
    "fineweb": lambda step, recipe, model: _from_filter(FineWebQualityFilter(language=_WORDS)),
    "mask-pii": _mask_pii,
    "quality": _quality,
    "decontaminate": _decontaminate,
}
