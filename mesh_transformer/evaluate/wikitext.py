# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""WikiText as its authors cut it into words -> text as people write it, and back to the very same words.

Its words stand apart by spaces (`end .`, `2 @-@ part`, `1 @,@ 000`). A model of running text should be given running
text, and its perplexity be told per word of the original (GPT-2, section 3.1): for that the change has to lose nothing.
Words that are written together are found again by rules, with one exception: what is a word of the corpus as it stands
(`Mr.`, `St.`) is never cut. Where the rules would not give back the words they were given, the words stay apart.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from mesh_transformer.data.errors import DataError, Document
from mesh_transformer.evaluate.perplexity import TextScore

WITHIN = {"@-@": "-", "@,@": ",", "@.@": "."}  # how the authors write what stands within a word
OPENING = set("([$£#")
CLOSING = set(".,;:!?)]%") | {"'"}
QUOTE = '"'
_SUFFIX = re.compile(r"'[a-z]{1,2}")
_HEADING = re.compile(r" = [^=].* = \n")


class Article(NamedTuple):
    """Running text, and the number of words it was made of."""

    document: Document
    n_words: int  # ends of lines included: perplexities of this corpus are told by them


class WikiText:
    """A corpus as its authors distribute it, split into articles."""

    def __init__(self, text: str, where: str = "WikiText") -> None:
        """Raises DataError for text that is not cut into words by single spaces, with a space at both ends of a line."""
        self.lines = text.splitlines(keepends=True)
        for number, line in enumerate(self.lines, 1):
            if line != " \n" and not re.fullmatch(r" (\S+ )+\n", line):
                raise DataError(
                    f"{where}:{number}: {line[:40]!r} is no line of WikiText: words with one space before, between and "
                    "behind them; give wiki.test.tokens (or .raw) as its authors distribute it"
                )
        self._words = {word for line in self.lines for word in line.split(" ")}
        self.where = where

    def articles(self) -> Iterator["Article"]:
        """Every article as running text; what stands before the first heading belongs to the first."""
        start, seen = 0, False
        for i, line in enumerate(self.lines):
            if _HEADING.fullmatch(line):
                if seen:
                    yield self._article(start, i)
                    start = i
                seen = True
        yield self._article(start, len(self.lines))

    def _article(self, first: int, end: int) -> "Article":
        lines = self.lines[first:end]
        document = Document("".join(map(self.join, lines)), f"{self.where}:{first + 1}")
        return Article(document, sum(len(line.split()) + 1 for line in lines))

    def join(self, line: str) -> str:
        """A line of words as running text."""
        groups = _group(line.split())
        chunks: list[str] = []
        for group in groups:
            text = "".join(WITHIN.get(word, word) for word in group)
            chunks += [text] if split_words(text, self._words) == group else group
        return " ".join(chunks) + "\n"

    def split(self, line: str) -> str:
        """The line of words that `join` made this of."""
        words = [word for chunk in line.split() for word in split_words(chunk, self._words)]
        return f" {' '.join(words)} \n" if words else " \n"


def _group(words: Sequence[str]) -> list[list[str]]:
    """Words that are to be written together."""
    groups: list[list[str]] = []
    glue = in_quote = False
    for word in words:
        closes = word in CLOSING or bool(_SUFFIX.fullmatch(word)) or (word == QUOTE and in_quote)
        if groups and (glue or closes or word in WITHIN):
            groups[-1].append(word)
        else:
            groups.append([word])
        opens = word in OPENING or (word == QUOTE and not in_quote)
        in_quote ^= word == QUOTE
        glue = opens or word in WITHIN
    return groups


def split_words(chunk: str, words: Collection[str]) -> list[str]:
    """The words that a run without spaces consists of; one that is itself among `words` stays whole."""
    before: list[str] = []
    behind: list[str] = []
    while chunk not in words:
        if len(chunk) > 1 and (chunk[0] in OPENING or chunk[0] == QUOTE):
            before.append(chunk[0])
            chunk = chunk[1:]
        elif len(chunk) > 1 and (chunk[-1] in CLOSING or chunk[-1] == QUOTE):
            behind.append(chunk[-1])
            chunk = chunk[:-1]
        elif (suffix := re.search(r"'[a-z]{1,2}$", chunk)) and suffix.start():
            behind.append(suffix[0])
            chunk = chunk[: suffix.start()]
        else:
            break
    return [*before, *_split_within(chunk, words), *reversed(behind)]


def _split_within(chunk: str, words: Collection[str]) -> list[str]:
    if chunk in words:
        return [chunk]
    parts = re.split(r"(?<=.)([-,.])(?=.)", chunk)
    return [f"@{part}@" if i % 2 else part for i, part in enumerate(parts)]


def wikitext_results(score: TextScore, n_words: int) -> dict[str, float]:
    """Results of the corpus: perplexity for each word of the original and each token of the model, and per byte."""
    return {
        "word_perplexity": math.exp(min(score.negative_logprob / n_words, 700.0)),
        "words": n_words,
        **score.to_results(),
    }
