# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""WikiText detokenization: convert the corpus from separate words to running text, and back without loss.

In the corpus, words are separated by spaces (`end .`, `2 @-@ part`, `1 @,@ 000`). Models are trained on running
text and therefore evaluated on running text, but their perplexity is reported per word of the corpus (GPT-2, section 3.1),
so the conversion must be reversible. Joined words are split by rules, except that a string that is a word of the corpus
(`Mr.`, `St.`) is never split. If the rules would not recover the original words, the words stay separate.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from mesh_transformer.data.errors import DataError, Document
from mesh_transformer.evaluate.perplexity import TextScore

WITHIN = {"@-@": "-", "@,@": ",", "@.@": "."}  # the corpus's notation for punctuation inside a word
OPENING = set("([$£#")  # written without a space after it
CLOSING = set(".,;:!?)]%") | {"'"}  # written without a space before it
QUOTE = '"'
_SUFFIX = re.compile(r"'[a-z]{1,2}")
_HEADING = re.compile(r" = [^=].* = \n")


class Article(NamedTuple):
    """An article as running text, and its number of words in the corpus."""

    document: Document
    n_words: int  # including line ends, as in published perplexities


class WikiText:
    """The corpus in its published form, split into articles."""

    def __init__(self, text: str, where: str = "WikiText") -> None:
        """Raises DataError for a line that does not have a single space before, between and after its words."""
        self.lines = text.splitlines(keepends=True)
        for number, line in enumerate(self.lines, 1):
            if line != " \n" and not re.fullmatch(r" (\S+ )+\n", line):
                raise DataError(
                    f"{where}:{number}: {line[:40]!r} is not a WikiText line, which has one space before, between and after its "
                    "words; use the published wiki.test.tokens (or .raw)"
                )
        self._words = {word for line in self.lines for word in line.split(" ")}
        self.where = where

    def articles(self) -> Iterator["Article"]:
        """Yield every article as running text; text before the first heading belongs to the first article."""
        start = 0
        has_heading = False
        for i, line in enumerate(self.lines):
            if _HEADING.fullmatch(line):
                if has_heading:
                    yield self._article(start, i)
                    start = i
                has_heading = True
        yield self._article(start, len(self.lines))

    def _article(self, first: int, end: int) -> "Article":
        lines = self.lines[first:end]
        document = Document("".join(map(self.join, lines)), f"{self.where}:{first + 1}")
        return Article(document, sum(len(line.split()) + 1 for line in lines))

    def join(self, line: str) -> str:
        """Return a line of words as running text."""
        groups = _group(line.split())
        chunks: list[str] = []
        for group in groups:
            text = "".join(WITHIN.get(word, word) for word in group)
            chunks += [text] if split_words(text, self._words) == group else group
        return " ".join(chunks) + "\n"

    def split(self, line: str) -> str:
        """Return a line of running text as the line of separate words that `join` converted."""
        words = [word for chunk in line.split() for word in split_words(chunk, self._words)]
        return f" {' '.join(words)} \n" if words else " \n"


def _group(words: Sequence[str]) -> list[list[str]]:
    """Return groups of words that are written without spaces."""
    groups: list[list[str]] = []
    joins_next = in_quote = False
    for word in words:
        closes = word in CLOSING or bool(_SUFFIX.fullmatch(word)) or (word == QUOTE and in_quote)
        if groups and (joins_next or closes or word in WITHIN):
            groups[-1].append(word)
        else:
            groups.append([word])
        opens = word in OPENING or (word == QUOTE and not in_quote)
        in_quote ^= word == QUOTE
        joins_next = opens or word in WITHIN
    return groups


def split_words(chunk: str, words: Collection[str]) -> list[str]:
    """Split a string without spaces into words; a string in `words` is not split."""
    before: list[str] = []
    after: list[str] = []
    while chunk not in words:
        if len(chunk) > 1 and (chunk[0] in OPENING or chunk[0] == QUOTE):
            before.append(chunk[0])
            chunk = chunk[1:]
        elif len(chunk) > 1 and (chunk[-1] in CLOSING or chunk[-1] == QUOTE):
            after.append(chunk[-1])
            chunk = chunk[:-1]
        elif (suffix := re.search(r"'[a-z]{1,2}$", chunk)) and suffix.start():
            after.append(suffix[0])
            chunk = chunk[: suffix.start()]
        else:
            break
    return [*before, *_split_within(chunk, words), *reversed(after)]


def _split_within(chunk: str, words: Collection[str]) -> list[str]:
    if chunk in words:
        return [chunk]
    parts = re.split(r"(?<=.)([-,.])(?=.)", chunk)
    return [f"@{part}@" if i % 2 else part for i, part in enumerate(parts)]


def wikitext_results(score: TextScore, n_words: int) -> dict[str, float]:
    """Return the results of the corpus: perplexity per word of the corpus and per token of the model, and bits per byte."""
    return {
        "word_perplexity": math.exp(min(score.negative_logprob / n_words, 700.0)),
        "words": n_words,
        **score.to_results(),
    }
