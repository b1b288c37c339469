# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare weight and KV-cache data types of a trained model: perplexity on held-out text, bytes, and tokens per second.

For each combination, the sampling engine scores the same windows of held-out text as prompts, so that the data type of the
KV cache takes effect, and then decodes greedily. The ratio is relative to the perplexity with the saved weights.

examples:
  python scripts/bench/quantization.py runs/quickstart
      all combinations, 64 windows
  python scripts/bench/quantization.py runs/gpt2 --text book.txt --windows 16 --json
      an imported model, on another text

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

DTYPES = (  # weights, KV cache
    ("saved", "model"),
    ("bfloat16", "model"),
    ("int8", "model"),
    ("saved", "bfloat16"),
    ("saved", "int8"),
    ("int8", "int8"),
)
BATCH_SIZE = 4  # windows scored at once


def main(arguments: list[str]) -> int:
    """Score and generate with every combination, and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint in it")
    parser.add_argument("--text", type=Path, help="text file to score; default: the run's held-out text")
    parser.add_argument(
        "--windows", type=int, default=64, help="number of windows of seq_len - 1 tokens to score; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="tokens to generate when measuring the speed; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    windows: list[list[int]] = []
    rows: list[dict[str, Any]] = []
    for weight_dtype, cache_dtype in DTYPES:
        overrides = [f'serve.weight_dtype="{weight_dtype}"', f'serve.kv_cache_dtype="{cache_dtype}"']
        model = load_model(options.run, overrides)
        windows = windows or find_windows(model, options.text, options.windows)
        dtypes: dict[str, Any] = {"weight_dtype": weight_dtype, "kv_cache_dtype": cache_dtype}
        row = dtypes | measure(model, windows, options.max_tokens)
        rows.append(row | {"ratio": row["perplexity"] / (rows[0] if rows else row)["perplexity"]})
    print(json.dumps(rows) if options.json else format_rows(rows))
    return 0


def find_windows(model: LoadedModel, text: Path | None, count: int) -> list[list[int]]:
    """Return up to `count` sequences of seq_len - 1 tokens, since one token is generated after each."""
    length = model.config.model.seq_len - 1
    if text is not None:
        tokens = model.tokenizer.encode(text.read_text(encoding="utf-8"))
        return [tokens[i : i + length] for i in range(0, max(len(tokens) - length, 1), length)][:count]
    loaders = open_data(model.config).validation
    if not loaders:
        raise ValueError(
            "the run's configuration has no validation set and holds out no documents; pass the text to score as --text FILE"
        )
    batches = itertools.chain.from_iterable(loader.batches(None) for loader in loaders.values())
    sequences = itertools.chain.from_iterable(batch.tokens.tolist() for batch in batches)
    return [tokens[:length] for tokens in itertools.islice(sequences, count)]


def measure(model: LoadedModel, windows: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Return perplexity of the windows, bytes of the weights and of a token's KV cache, and tokens per second of one request."""
    engine = require_decoder_only(model.engine, "this benchmark")
    greedy = SampleConfig(temperature=0.0)
    logprobs: list[float] = []
    for first in range(0, len(windows), BATCH_SIZE):
        for window in windows[first : first + BATCH_SIZE]:
            engine.submit(engine.make_request(window, RequestParams(greedy, max_tokens=1, score_prompt=True)))
        while not engine.idle:
            for event in engine.step():
                logprobs += [score.logprob for score in event.prompt_scores or ()]
    n_tokens = max(min(max_tokens, engine.config.seq_len - 8), 1)
    seconds = []
    for _ in range(4):  # the first one compiles
        start = time.perf_counter()
        engine.generate([windows[0][:8]], greedy, max_tokens=n_tokens)
        seconds.append(time.perf_counter() - start)
    caches = engine.programs.make_caches(1, engine.config.seq_len)
    return {
        "perplexity": math.exp(-statistics.fmean(logprobs)),
        "tokens": len(logprobs),
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(engine.programs.weights)),
        "cache_bytes_per_token": sum(leaf.nbytes for leaf in jax.tree.leaves(caches)) // engine.config.seq_len,
        "tokens_per_s": n_tokens / statistics.median(seconds[1:]),
    }


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        f"{'weights':<9} {'KV cache':<9} {'weights MB':>10} {'cache B/token':>13} {'tokens/s':>9} {'perplexity':>11} {'ratio':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['weight_dtype']:<9} {row['kv_cache_dtype']:<9} {row['weight_bytes'] / 1e6:10.1f} "
            f"{row['cache_bytes_per_token']:13,} "
            f"{row['tokens_per_s']:9.1f} {row['perplexity']:11.5f} {row['ratio']:8.5f}"
        )
    return "\n".join([*lines, f"{rows[0]['tokens']:,} tokens of held-out text"])


if __name__ == "__main__":
    sys.exit(run_command(main))
