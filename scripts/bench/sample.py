# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure the generation speed of GPT-2 (124M random weights, greedy) next to transformers' generate in float32.

Every decode step reads all weights once, so memory bandwidth limits the speed to (bytes read per second) / (bytes of the
weights) steps per second. Without torch and transformers, speeds are compared with this limit.

examples:
  python scripts/bench/sample.py
      batches of 1 and 8 prompts; medians over rounds in which all programs alternate
  python scripts/bench/sample.py --batch 1 --rounds 9 --json
      one JSON object
  python scripts/bench/sample.py --concurrent 1 8 32
      measure the time to the first token instead: of this many requests submitted at once, and of a late request, submitted
      while the others are decoded; transformers decodes the first requests as one batch and cannot add a late one
"""

import functools
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
GREEDY = SampleConfig(temperature=0.0)
Generate = Callable[[np.ndarray], int]  # prompts [batch, prompt_len] -> number of generated tokens
Case = tuple[str, int]  # program, batch size


class RequestTimes(NamedTuple):
    """Times in seconds of requests that were submitted at once."""

    first_token: float  # median over the requests
    slowest_first_token: float  # maximum over the requests
    total: float  # until the last token of all requests
    late_first_token: float | None  # of a request submitted when the others had a quarter of their tokens


def main(arguments: list[str]) -> int:
    """Measure and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes; default: 1 8")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens per prompt; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate; default: %(default)s")
    parser.add_argument(
        "--weight-dtype",
        nargs="+",
        default=["saved", "int8"],
        choices=["saved", "bfloat16", "int8"],
        help="values of serve.weight_dtype to measure; default: saved int8",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="model",
        help="value of serve.kv_cache_dtype; default: %(default)s, which is float32",
    )
    parser.add_argument(
        "--concurrent", type=int, nargs="+", help="number of concurrent requests; measures the time to first token"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of rounds, in which all programs alternate; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    engines = make_engines(options)
    if options.concurrent:
        rows = measure_requests(engines, options)
        print(json.dumps(rows) if options.json else format_requests(rows))
    else:
        result = measure_speed(engines, options)
        print(json.dumps(result) if options.json else format_speed(result))
    return 0


def make_engines(options: Namespace) -> dict[str, DecoderOnlyEngine]:
    """Return an engine for each weight dtype, by the name of the program in the tables."""
    config = ModelConfig(preset="gpt2", **PRESETS["gpt2"])
    params = jax.jit(make_model(config).init)(jax.random.key(0))
    engines = {}
    for weight_dtype in options.weight_dtype:
        engine_options = EngineOptions(
            weight_dtype=weight_dtype,
            kv_cache_dtype=options.kv_cache_dtype,
            slots=max(options.concurrent or options.batch),
            prefix_cache_bytes=0,
        )
        engines[f"mesh-transformer, {weight_dtype}"] = DecoderOnlyEngine(config, params, engine_options)
    return engines


def measure_speed(engines: dict[str, DecoderOnlyEngine], options: Namespace) -> dict[str, Any]:
    """Return tokens per second by program and batch size, and their ratios to transformers or to the bandwidth limit."""
    rng = np.random.default_rng(0)
    n_vocab = PRESETS["gpt2"]["n_vocab"]
    prompts = {size: rng.integers(0, n_vocab, (size, options.prompt_len)) for size in options.batch}
    programs: dict[str, Generate] = {
        name: functools.partial(_generate, engine, max_tokens=options.max_tokens) for name, engine in engines.items()
    }
    torch_generate = _make_torch(options.max_tokens)
    if torch_generate:
        programs[TORCH] = torch_generate
    rates = _measure_rates(programs, prompts, options.max_tokens, options.rounds)
    bandwidth = _measure_read_bandwidth()
    limits: dict[Case, float] = {}
    for name, engine in engines.items():
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.programs.weights))
        for size in options.batch:
            limits[name, size] = size * bandwidth / weight_bytes
    peers = {(name, size): rates[TORCH, size] if torch_generate else limits[name, size] for name, size in limits}

    def label(values: dict[Case, float], digits: int) -> dict[str, float]:
        return {f"{name} batch {size}": round(value, digits) for (name, size), value in values.items()}

    return {
        "tokens_per_s": label(rates, 1),
        "read_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "bandwidth_fraction": label({case: rates[case] / limit for case, limit in limits.items()}, 2),
        "peer": TORCH if torch_generate else "bandwidth limit",
        "ratio": label({case: rates[case] / peer for case, peer in peers.items()}, 2),
    }


def _generate(engine: DecoderOnlyEngine, prompts: np.ndarray, max_tokens: int) -> int:
    results = engine.generate([prompt.tolist() for prompt in prompts], GREEDY, max_tokens=max_tokens)
    return sum(len(completion.tokens) for samples in results for completion in samples)


def _make_torch(max_tokens: int) -> Generate | None:
    """Return transformers' generate, or None if it is not installed."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        print(
            f"{error.name} is not installed, so the comparison is with the memory bandwidth limit; to compare with transformers: "
            "pip install torch transformers",
            file=sys.stderr,
        )
        return None
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()

    def generate(prompts: np.ndarray) -> int:
        ids = torch.as_tensor(prompts)
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

    return generate


def _measure_rates(
    programs: dict[str, Generate], prompts: dict[int, np.ndarray], max_tokens: int, rounds: int
) -> dict[Case, float]:
    """Return the median tokens per second, prefill included."""
    seconds: dict[Case, list[float]] = {}
    for number in range(rounds + 1):
        for size, tokens in prompts.items():
            for name, generate in programs.items():
                start = time.perf_counter()
                generated = generate(tokens)
                elapsed = time.perf_counter() - start
                if generated != size * max_tokens:
                    raise RuntimeError(
                        f"{name} generated {generated} tokens for {size} prompts, but must generate {size * max_tokens}"
                    )
                if number:  # the first round compiles
                    seconds.setdefault((name, size), []).append(elapsed)
    return {(name, size): size * max_tokens / statistics.median(times) for (name, size), times in seconds.items()}


def _measure_read_bandwidth() -> float:
    """Return the bytes per second that a matrix-vector product of a 512 MB matrix reads, on all cores."""
    matrix = jax.numpy.ones((1 << 15, 1 << 12), jax.numpy.float32)
    vector = jax.numpy.ones(1 << 12, jax.numpy.float32)
    multiply = jax.jit(jax.numpy.matmul)
    multiply(matrix, vector).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        multiply(matrix, vector).block_until_ready()
        times.append(time.perf_counter() - start)
    return matrix.nbytes / statistics.median(times)


def format_speed(result: dict[str, Any]) -> str:
    """Return the table; its last line has the ratios."""
    peer_column = f"ratio to {result['peer']}"
    lines = [
        f"read bandwidth {result['read_bandwidth_gb_per_s']} GB/s, measured with a matrix-vector product",
        f"{'':<34} {'tokens/s':>9} {'of bandwidth limit':>19} {peer_column:>25}",
    ]
    for case, rate in result["tokens_per_s"].items():
        line = f"{case:<34} {rate:9.1f}"
        if case in result["ratio"]:
            line += f" {result['bandwidth_fraction'][case]:19.0%} {result['ratio'][case]:25.2f}"
        lines.append(line)
    ratios = " ".join(f"{ratio:.2f}" for ratio in result["ratio"].values())
    return "\n".join([*lines, f"{peer_column}: {ratios}"])


def measure_requests(engines: dict[str, DecoderOnlyEngine], options: Namespace) -> list[dict[str, Any]]:
    """Return the medians of RequestTimes over rounds in which all programs alternate, for each number of requests."""
    torch_first = _make_torch(1)
    torch_all = _make_torch(options.max_tokens)
    rng = np.random.default_rng(0)
    measured: dict[Case, list[RequestTimes]] = {}
    for number in range(options.rounds + 1):
        for size in options.concurrent:
            prompts = rng.integers(0, PRESETS["gpt2"]["n_vocab"], (size, options.prompt_len))
            times = {name: _time_requests(engine, prompts, options.max_tokens) for name, engine in engines.items()}
            if torch_first and torch_all:
                first = _time(torch_first, prompts)
                times[TORCH] = RequestTimes(first, first, _time(torch_all, prompts), None)
            if number:  # the first round compiles
                for name, value in times.items():
                    measured.setdefault((name, size), []).append(value)
    rows = []
    for (name, size), rounds in measured.items():
        medians = {f"{key}_s": _median([getattr(times, key) for times in rounds]) for key in RequestTimes._fields}
        tokens_per_s = size * options.max_tokens / medians["total_s"]
        rows.append({"program": name, "requests": size, "tokens_per_s": tokens_per_s} | medians)
    return rows


def _median(values: Sequence[Any]) -> Any:
    return None if None in values else statistics.median(values)


def _time(generate: Generate, prompts: np.ndarray) -> float:
    start = time.perf_counter()
    generate(prompts)
    return time.perf_counter() - start


def _time_requests(engine: DecoderOnlyEngine, prompts: np.ndarray, max_tokens: int) -> RequestTimes:
    first_tokens, total, _ = _run_requests(engine, prompts, max_tokens, late=None)
    late = _run_requests(engine, prompts[1:], max_tokens, late=prompts[0])[2] if len(prompts) > 1 else None
    return RequestTimes(statistics.median(first_tokens), max(first_tokens), total, late)


def _run_requests(
    engine: DecoderOnlyEngine, prompts: np.ndarray, max_tokens: int, late: np.ndarray | None
) -> tuple[list[float], float, float | None]:
    """Return the time to the first token of each request, the total time, and the time to `late`'s first token."""

    def submit(prompt: np.ndarray) -> int:
        params = RequestParams(GREEDY, max_tokens=max_tokens)
        return engine.submit(engine.make_request(prompt.tolist(), params)).id

    start = time.perf_counter()
    submitted = {submit(prompt): start for prompt in prompts}
    waits: dict[int, float] = {}  # request -> time to its first token
    n_tokens = 0
    late_id = None
    chunk_sizer = ChunkSizer(EVENT_INTERVAL)
    while not engine.idle:
        with chunk_sizer:  # as a server does
            events = engine.step(chunk_sizer.steps)
        for event in events:
            n_tokens += 1
            waits.setdefault(event.request, time.perf_counter() - submitted[event.request])
        if late is not None and late_id is None and 4 * n_tokens >= len(prompts) * max_tokens:
            now = time.perf_counter()
            late_id = submit(late)
            submitted[late_id] = now
    late_wait = waits.pop(late_id) if late_id is not None else None
    return list(waits.values()), time.perf_counter() - start, late_wait


def format_requests(rows: list[dict[str, Any]]) -> str:
    """Return the table of the times to the first token."""
    lines = [f"{'':<26} {'requests':>8} {'first s':>8} {'slowest':>8} {'one late':>8} {'tokens/s':>9} {'ratio':>6}"]
    peers = {row["requests"]: row["tokens_per_s"] for row in rows if row["program"] == TORCH}
    for row in rows:
        late = f"{row['late_first_token_s']:8.2f}" if row["late_first_token_s"] is not None else f"{'':>8}"
        ratio = f"{row['tokens_per_s'] / peers[row['requests']]:6.2f}" if row["requests"] in peers else ""
        lines.append(
            f"{row['program']:<26} {row['requests']:>8} {row['first_token_s']:8.2f} {row['slowest_first_token_s']:8.2f} "
            f"{late} {row['tokens_per_s']:9.1f} {ratio}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
