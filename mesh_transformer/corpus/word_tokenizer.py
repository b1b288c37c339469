# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Word and sentence tokenizer for DataTrove's blocks, by two regular expressions: no model, no download."""

import re

from datatrove.utils.word_tokenizers import WordTokenizer

_WORD = re.compile(r"\w+(?:[-'\u2019./]\w+)*|[^\w\s]+")
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+[\"'\u201d\u2019)\]]*\s+")


class PatternTokenizer(WordTokenizer):
    """Splits text into words (letters and digits, also joined as in "e-mail" and "don't") and runs of other characters."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return words and symbols in order."""
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences without the spaces between them."""
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return start and end offset of every sentence."""
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        spans = list(zip([0, *ends], [*ends, len(text)], strict=True))
        return [(start, end) for start, end in spans if text[start:end].strip()]


WORDS = PatternTokenizer()
