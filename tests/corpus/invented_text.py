# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Texts for tests, of words that nobody uses."""

import random

WORDS = [
    a + b
    for a in ("ba", "ko", "mi", "tu", "re", "sal", "von", "pir")
    for b in ("n", "ta", "do", "lex", "m", "ris", "gu", "ne")
]


def prose(seed: int, words: int = 120) -> str:
    """Sentences of invented words; texts of different seeds have next to nothing in common."""
    draw = random.Random(seed)
    sentences = []
    while words > 0:
        length = min(draw.randint(6, 12), words)
        words -= length
        sentences.append(" ".join(draw.choice(WORDS) for _ in range(length)).capitalize() + ".")
    return "\n".join(sentences) + "\n"
