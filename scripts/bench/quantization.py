# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What narrower weights and caches cost and bring: perplexity of held-out text, bytes, tokens per second, of one trained run.

Every kind reads the same windows of the run's held-out text through the sampling engine, as prompts whose tokens are
scored, so that what is in the cache counts; then draws greedily. The ratio is to the weights as they were saved.

examples:
  python scripts/bench/quantization.py runs/quickstart
      all kinds, 64 windows
  python scripts/bench/quantization.py runs/gpt2 --text book.txt --windows 16 --json
      of a model that was brought from elsewhere, on a text of yours

exit status: 0 done, 1 failed, 2 wrong usage
"""

import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import SampleConfig
from mesh_transformer.data.dataset import open_data
from mesh_transformer.sample.engine.decoder_only import require_decoder_only
from mesh_transformer.sample.engine.requests import RequestParams
from mesh_transformer.sample.loading import LoadedModel, load_model

KINDS = (
    ("saved", "model"),
    ("bfloat16", "model"),
    ("int8", "model"),
    ("saved", "bfloat16"),
    ("saved", "int8"),
    ("int8", "int8"),
)
ROWS = 4  # windows read at once


def main(arguments: list[str]) -> int:
    """Score and draw with every kind, print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint in it")
    parser.add_argument("--text", type=Path, help="a file of text; default: what the run held out from training")
    parser.add_argument("--windows", type=int, default=64, help="of the model's seq_len tokens; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="drawn to measure speed; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    windows: list[list[int]] = []
    rows: list[dict[str, Any]] = []
    for weights, cache in KINDS:
        trained = load_model(options.run, [f'serve.weight_dtype="{weights}"', f'serve.kv_cache_dtype="{cache}"'])
        windows = windows or find_windows(trained, options.text, options.windows)
        row: dict[str, Any] = {"weights": weights, "cache": cache} | measure(trained, windows, options.tokens)
        rows.append(row | {"ratio": row["perplexity"] / (rows[0] if rows else row)["perplexity"]})
    print(json.dumps(rows) if options.json else format_rows(rows))
    return 0


def find_windows(trained: LoadedModel, text: Path | None, count: int) -> list[list[int]]:
    """Sequences of tokens, one shorter than the model can read."""
    length = trained.config.model.seq_len - 1
    if text is not None:
        tokens = trained.tokenizer.encode(text.read_text(encoding="utf-8"))
        return [tokens[i : i + length] for i in range(0, max(len(tokens) - length, 1), length)][:count]
    sets = open_data(trained.config).validation
    if not sets:
        raise ValueError("the run held no text out from training: give --text FILE")
    batches = itertools.chain.from_iterable(held.batches(None) for held in sets.values())
    sequences = itertools.chain.from_iterable(batch.tokens.tolist() for batch in batches)
    return [tokens[:length] for tokens in itertools.islice(sequences, count)]


def measure(trained: LoadedModel, windows: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Perplexity of the windows' tokens, bytes of the weights and of a token in the cache, tokens per second of one row."""
    engine = require_decoder_only(trained.engine, "this benchmark")
    greedy, scores = SampleConfig(temperature=0.0), []
    for first in range(0, len(windows), ROWS):
        for window in windows[first : first + ROWS]:
            engine.submit(engine.make_request(window, RequestParams(greedy, max_tokens=1, score_prompt=True)))
        while not engine.idle:
            for event in engine.step():
                scores += [score.logprob for score in event.prompt_scores or ()]
    draw = max(min(max_tokens, engine.config.seq_len - 8), 1)
    seconds = []
    for _ in range(4):  # the first compiles
        started = time.perf_counter()
        engine.generate([windows[0][:8]], greedy, max_tokens=draw)
        seconds.append(time.perf_counter() - started)
    caches = engine.programs.make_caches(1, engine.config.seq_len)
    return {
        "perplexity": math.exp(-statistics.fmean(scores)),
        "tokens": len(scores),
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(engine.programs.weights)),
        "cache_bytes_per_token": sum(leaf.nbytes for leaf in jax.tree.leaves(caches)) // engine.config.seq_len,
        "tokens_per_s": draw / statistics.median(seconds[1:]),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"{'weights':<9} {'cache':<9} {'weights MB':>10} {'cache B/token':>13} {'tokens/s':>9} {'perplexity':>11} {'ratio':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['weights']:<9} {row['cache']:<9} {row['weight_bytes'] / 1e6:10.1f} {row['cache_bytes_per_token']:13,} "
            f"{row['tokens_per_s']:9.1f} {row['perplexity']:11.5f} {row['ratio']:8.5f}"
        )
    return "\n".join([*lines, f"{rows[0]['tokens']:,} tokens of held-out text"])


if __name__ == "__main__":
    sys.exit(run_command(main))
