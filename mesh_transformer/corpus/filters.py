# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Filters and edits of single documents; most are DataTrove's filters and formatters.

A filter is a function that may change a document's text and returns the reason to drop the document, or "" to keep it.
To add one, add its record to recipe.py and its factory to FILTERS.
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
MAX_ADDRESS_CHARACTERS = 320  # of an e-mail address; 64 of them before the @


def make_filters(recipe: r.Recipe, component: str, classifiers: dict[int, Path]) -> list[tuple[str, FilterFn]]:
    """Return (name, function) of every filter of a component; `classifiers` maps numbers of quality filters to model files."""
    filters: list[tuple[str, FilterFn]] = []
    if min_bytes := recipe.components[component].min_bytes:
        filters.append(("min_bytes", _length(r.LengthFilter(kind="length", min_bytes=min_bytes), recipe, None)))
    for number, config in r.filters_for(recipe, component):
        filters.append((f"{number}-{config.kind}", FILTERS[config.kind](config, recipe, classifiers.get(number))))
    return filters


def _from_filter(block: BaseFilter) -> FilterFn:
    """Wrap a filter of DataTrove. Texts without words are dropped first: some filters would divide by zero."""

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


def _mask_pii(config: r.MaskPIIFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    block = PIIFormatter(remove_emails=False)  # for IP addresses only: their pattern is fast

    def apply(document: Document) -> str:
        text = document.text
        spans: list[str] = []
        position = 0
        for start, end in _around_at_signs(text):
            spans += [text[position:start], block.emails_replacer.replace(text[start:end])]
            position = end
        document.text = block.format("".join([*spans, text[position:]]) if spans else text)
        return ""

    return apply


def _around_at_signs(text: str) -> Iterator[tuple[int, int]]:
    """Yield merged spans around every @: DataTrove's e-mail pattern takes quadratic time on long runs like a-a-a."""
    start = 0
    end = -1
    at = text.find("@")
    while at >= 0:
        if end < at - MAX_ADDRESS_CHARACTERS:
            if end > 0:
                yield start, end
            start = max(at - MAX_ADDRESS_CHARACTERS, 0)
        end = min(at + MAX_ADDRESS_CHARACTERS, len(text))
        at = text.find("@", at + 1)
    if end > 0:
        yield start, end


def _length(config: r.LengthFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    def apply(document: Document) -> str:
        n_bytes = len(document.text.encode())
        if n_bytes < config.min_bytes:
            return f"under {config.min_bytes} bytes"
        return f"over {config.max_bytes} bytes" if config.max_bytes and n_bytes > config.max_bytes else ""

    return apply


def _language(config: r.LanguageFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise install_hint("py3langid") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def apply(document: Document) -> str:
        language, score = identifier.classify(document.text[: config.characters])
        document.metadata["language"] = language
        if config.keep and language not in config.keep:
            return f"language {language}"
        return f"language {language} below {config.min_score}" if score < config.min_score else ""

    return apply


def _quality(config: r.QualityFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    assert model is not None, "classifiers are trained before the filter stage"
    score = load_classifier(model)

    def apply(document: Document) -> str:
        value = score(document.text)
        document.metadata["quality"] = round(value, 4)
        rng = random.Random(xxhash.xxh3_64_intdigest(f"{recipe.corpus.seed}:quality:{document.id}".encode()))
        # NumPy's Pareto distribution, which the paper uses, starts at 0; Python's starts at 1.
        return "" if rng.paretovariate(config.alpha) - 1 > 1 - value else "low quality"

    return apply


def _decontaminate(config: r.DecontaminateFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    index = ContaminationIndex(config, {name: recipe.evaluation[name] for name in config.against})
    return index.decontaminate


def _gopher_quality(config: r.GopherQualityFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    return _from_filter(
        GopherQualityFilter(
            min_doc_words=config.min_words,
            max_doc_words=config.max_words,
            min_stop_words=config.min_stop_words,
            language=_WORDS,
        )
    )


def _c4(config: r.C4Filter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    block = C4QualityFilter(
        min_num_sentences=config.min_sentences, filter_no_terminal_punct=config.needs_end_punctuation, language=_WORDS
    )
    return _from_filter(block)


def _repair(config: r.RepairFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    return _from_formatter(FTFYFormatter())


def _gopher_repetition(config: r.GopherRepetitionFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    return _from_filter(GopherRepetitionFilter(language=_WORDS))


def _fineweb(config: r.FineWebFilter, recipe: r.Recipe, model: Path | None) -> FilterFn:
    return _from_filter(FineWebQualityFilter(language=_WORDS))


_WORDS: Any = WORDS  # DataTrove's parameter is typed as a language name, but also accepts a tokenizer
# Kind -> factory, a function of the filter's configuration, the recipe, and the model file of a quality filter.
FILTERS: dict[str, Callable[[Any, r.Recipe, Path | None], FilterFn]] = {
    "repair": _repair,
    "length": _length,
    "language": _language,
    "gopher-repetition": _gopher_repetition,
    "gopher-quality": _gopher_quality,
    "c4": _c4,
    "fineweb": _fineweb,
    "mask-pii": _mask_pii,
    "quality": _quality,
    "decontaminate": _decontaminate,
}
