# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""How fast tokens are drawn at GPT-2's size (124M random weights, greedy), next to transformers' generate in float32.

examples:
  python scripts/bench/sample.py
      batches of 1 and 8 prompts, rounds of both programs in turn, medians
  python scripts/bench/sample.py --batch 1 --rounds 9 --json
      one JSON object
  python scripts/bench/sample.py --concurrent 1 8 32
      the time to the first token instead: of so many requests that come at once, and of one that comes while the others
      are being answered; transformers takes those that come at once as one batch, and has no other way

Every token reads all weights once, so memory allows (bytes read a second) / (bytes of the weights) steps a second; without
torch and transformers the ratio is to that.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ModelConfig, SampleConfig
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.model.transformer import make_model
from mesh_transformer.sample.engine.decoder_only import DecoderOnlyEngine
from mesh_transformer.sample.engine.engine import EngineOptions
from mesh_transformer.sample.engine.generation import ChunkSizer
from mesh_transformer.sample.engine.requests import RequestParams
from mesh_transformer.serve.engine_thread import EVENT_INTERVAL

TORCH = "transformers"


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes; default: 1 8")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens of a prompt; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="tokens drawn; default: %(default)s")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["saved", "int8"],
        choices=["saved", "bfloat16", "int8"],
        help="ours; default: saved int8",
    )
    parser.add_argument("--cache", default="model", help="type of keys and values; default: that of the model, float32")
    parser.add_argument(
        "--concurrent", type=int, nargs="+", help="requests at once: measure the time to the first token"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all programs in turn; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    config = ModelConfig(preset="gpt2", **PRESETS["gpt2"])
    params = jax.jit(make_model(config).init)(jax.random.key(0))
    engines = {
        f"ours, {weights}": DecoderOnlyEngine(
            config,
            params,
            EngineOptions(
                weight_dtype=weights,
                kv_cache_dtype=options.cache,
                slots=max(options.concurrent or options.batch),
                prefix_cache_bytes=0,
            ),
        )
        for weights in options.weights
    }
    if options.concurrent:
        rows = _measure_requests(engines, options)
        print(json.dumps(rows) if options.json else _format_requests(rows))
        return 0
    rng = np.random.default_rng(0)
    prompts = {size: rng.integers(0, config.n_vocab, (size, options.prompt_len)) for size in options.batch}
    programs: dict[str, Callable[[np.ndarray], int]] = {
        name: functools.partial(_draw_ours, engine, max_tokens=options.tokens) for name, engine in engines.items()
    }
    torch_draw = _make_torch(options.tokens)
    if torch_draw:
        programs[TORCH] = torch_draw
    rates = _measure(programs, prompts, options.tokens, options.rounds)
    bandwidth = _measure_read_bandwidth()
    limits = {
        (name, size): size * bandwidth / sum(leaf.nbytes for leaf in jax.tree.leaves(engine.programs.weights))
        for name, engine in engines.items()
        for size in options.batch
    }
    result = {
        "tokens_per_s": {f"{name} batch {size}": round(rate, 1) for (name, size), rate in rates.items()},
        "read_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": {
            f"{name} batch {size}": round(rates[name, size] / limits[name, size], 2) for name, size in limits
        },
        "against": TORCH if torch_draw else "memory's limit",
        "ratio": {
            f"{name} batch {size}": round(
                rates[name, size] / (rates[TORCH, size] if torch_draw else limits[name, size]), 2
            )
            for name, size in limits
        },
    }
    print(json.dumps(result) if options.json else _format(result, rates, limits))
    return 0


def _draw_ours(engine: DecoderOnlyEngine, tokens: np.ndarray, max_tokens: int) -> int:
    done = engine.generate([row.tolist() for row in tokens], SampleConfig(temperature=0.0), max_tokens=max_tokens)
    return sum(len(completion.tokens) for samples in done for completion in samples)


def _measure_requests(engines: dict[str, DecoderOnlyEngine], options: Any) -> list[dict[str, Any]]:
    """For each number of requests the medians over rounds of all programs in turn, seconds; see `_answer`."""
    first, whole = _make_torch(1), _make_torch(options.tokens)
    rng, found = np.random.default_rng(0), {}
    for turn in range(options.rounds + 1):
        for size in options.concurrent:
            tokens = rng.integers(0, 50_257, (size, options.prompt_len))
            measured = {name: _answer(engine, tokens, options.tokens) for name, engine in engines.items()}
            if first and whole:
                seconds = [_time(draw, tokens) for draw in (first, whole)]
                measured[TORCH] = {"first": seconds[0], "slowest first": seconds[0], "all": seconds[1]}
            for name, values in measured.items():
                for key, value in values.items() if turn else ():  # the first compiles
                    found.setdefault((name, size), {}).setdefault(key, []).append(value)
    return [
        {"program": name, "requests": size, "tokens_per_s": size * options.tokens / statistics.median(values["all"])}
        | {key.replace(" ", "_"): statistics.median(each) for key, each in values.items()}
        for (name, size), values in found.items()
    ]


def _answer(engine: DecoderOnlyEngine, tokens: np.ndarray, max_tokens: int) -> dict[str, float]:
    """Seconds to the first token of requests that come at once, median and longest, and to the last token of all.

    Where there are several, also those of one that comes when the others have a quarter of their tokens.
    """

    def submit(prompt: np.ndarray) -> int:
        row = engine.make_request(prompt.tolist(), RequestParams(SampleConfig(temperature=0.0), max_tokens=max_tokens))
        return engine.submit(row).id

    def run(prompts: np.ndarray, late: np.ndarray | None = None) -> tuple[list[float], float, float]:
        start, firsts, drawn, came, waited = time.perf_counter(), {}, 0, None, 0.0
        for prompt in prompts:
            submit(prompt)
        latecomer, pace = -1, ChunkSizer(EVENT_INTERVAL)
        while not engine.idle:
            with pace:  # as a server does
                events = engine.step(pace.steps)
            for event in events:
                now, drawn = time.perf_counter(), drawn + 1
                if event.request == latecomer and came is not None and not waited:
                    waited = now - came
                firsts.setdefault(event.request, now - start)
            if late is not None and came is None and 4 * drawn >= len(prompts) * max_tokens:
                came, latecomer = time.perf_counter(), submit(late)
        return list(firsts.values()), time.perf_counter() - start, waited

    firsts, seconds, _ = run(tokens)
    found = {"first": statistics.median(firsts), "slowest first": max(firsts), "all": seconds}
    if len(tokens) > 1:
        found["late first"] = run(tokens[1:], tokens[0])[2]
    return found


def _time(draw: Callable[[np.ndarray], int], tokens: np.ndarray) -> float:
    start = time.perf_counter()
    draw(tokens)
    return time.perf_counter() - start


def _format_requests(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<16} {'requests':>8} {'first s':>8} {'slowest':>8} {'one late':>8} {'tokens/s':>9} {'ratio':>6}"]
    peers = {row["requests"]: row["tokens_per_s"] for row in rows if row["program"] == TORCH}
    for row in rows:
        late = f"{row['late_first']:8.2f}" if "late_first" in row else f"{'':>8}"
        ratio = f"{row['tokens_per_s'] / peers[row['requests']]:6.2f}" if row["requests"] in peers else ""
        lines.append(
            f"{row['program']:<16} {row['requests']:>8} {row['first']:8.2f} {row['slowest_first']:8.2f} {late} "
            f"{row['tokens_per_s']:9.1f} {ratio}"
        )
    return "\n".join(lines)


def _make_torch(max_tokens: int) -> Callable[[np.ndarray], int] | None:
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        print(
            f"{error.name} is not installed: comparing with the bandwidth of memory (pip install torch transformers)",
            file=sys.stderr,
        )
        return None
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()

    def draw(tokens: np.ndarray) -> int:
        ids = torch.as_tensor(tokens)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].numel()

    return draw


def _measure(
    programs: dict[str, Callable[[np.ndarray], int]], prompts: dict[int, np.ndarray], max_tokens: int, rounds: int
) -> dict[tuple[str, int], float]:
    """Median tokens per second of every program at every batch size, prompts read included."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for size, tokens in prompts.items():
            for name, draw in programs.items():
                start = time.perf_counter()
                drawn = draw(tokens)
                elapsed = time.perf_counter() - start
                assert drawn == size * max_tokens, f"{name} drew {drawn} tokens"
                if turn:  # the first compiles
                    seconds.setdefault((name, size), []).append(elapsed)
    return {(name, size): size * max_tokens / statistics.median(times) for (name, size), times in seconds.items()}


def _measure_read_bandwidth() -> float:
    """Bytes read a second by a matrix of 512 MB times a vector, on all cores."""
    matrix = jax.numpy.ones((1 << 15, 1 << 12), jax.numpy.float32)
    vector = jax.numpy.ones(1 << 12, jax.numpy.float32)
    product = jax.jit(jax.numpy.matmul)
    product(matrix, vector).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        times.append(time.perf_counter() - start)
    return matrix.nbytes / statistics.median(times)


def _format(result: dict[str, Any], rates: dict[tuple[str, int], float], limits: dict[tuple[str, int], float]) -> str:
    lines = [
        f"{'':<16} {'batch':>5} {'tokens/s':>9} {'of what memory allows':>22} {'ratio to ' + result['against']:>22}"
    ]
    for (name, size), rate in rates.items():
        if (name, size) in limits:
            ratio = result["ratio"][f"{name} batch {size}"]
            lines.append(f"{name:<16} {size:>5} {rate:9.1f} {rate / limits[name, size]:22.0%} {ratio:22.2f}")
        else:
            lines.append(f"{name:<16} {size:>5} {rate:9.1f}")
    lines.append(f"memory: {result['read_bandwidth_gb_per_s']} GB/s read by a product with a vector")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
