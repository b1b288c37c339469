# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Texts of invented words for tests."""

import random

WORDS = [
    a + b
    for a in ("ba", "ko", "mi", "tu", "re", "sal", "von", "pir")
    for b in ("n", "ta", "do", "lex", "m", "ris", "gu", "ne")
]


def prose(seed: int, words: int = 120) -> str:
    """Return sentences of invented words; texts of different seeds share almost nothing."""
    rng = random.Random(seed)
    sentences = []
    while words > 0:
        length = min(rng.randint(6, 12), words)
        words -= length
        sentences.append(" ".join(rng.choice(WORDS) for _ in range(length)).capitalize() + ".")
    return "\n".join(sentences) + "\n"
