# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare training speed with PyTorch's on the same model, data and steps, on the CPU in float32.

Both programs train GPT-2 on the same random tokens; PyTorch runs transformers' GPT2LMHeadModel, eager, with fused AdamW.
Rounds of the programs alternate, and the ratio is the median over pairs of rounds. Without PyTorch, the speed is compared
with a lower bound: the time of the step's matmuls at the speed of a large matmul.

examples:
  python scripts/bench/train.py
      both shapes, 30 rounds of half a second each
  python scripts/bench/train.py --rounds 60 --json
      more rounds, one JSON object per shape
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import Config, parse_config
from mesh_transformer.data.loader import Batch
from mesh_transformer.mesh import init_devices, use_layout
from mesh_transformer.train.flops import count_flops, measure_matmul_peak
from mesh_transformer.train.state import make_init_state
from mesh_transformer.train.step import make_train_step


class Shape(NamedTuple):
    """Sizes of a GPT-2 model and its batch."""

    n_layers: int
    d_model: int
    n_heads: int
    n_vocab: int
    batch_size: int
    seq_len: int


SHAPES = {
    "4 layers, d 128, 12 x 64": Shape(4, 128, 4, 65, 12, 64),
    "4 layers, d 256, 16 x 256": Shape(4, 256, 4, 256, 16, 256),
}
LEARNING_RATE = 1e-3


def main(arguments: list[str]) -> int:
    """Run the rounds and print the table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds of each program; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round in seconds; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object per shape instead of the table")
    options = parser.parse_args(arguments)
    if not options.json:
        print(f"{'shape':<28}{'tokens/s':>12}{'peer tokens/s':>15}{'peer':>10}{'ratio':>8}{'losses after 5 steps':>26}")
    ratios = []
    for name, shape in SHAPES.items():
        row = compare(shape, options.rounds, options.seconds)
        ratios.append(row["ratio"])
        print(json.dumps({"shape": name, **row}) if options.json else format_row(name, row), flush=True)
    print("ratio " + " ".join(f"{ratio:.2f}" for ratio in ratios))
    return 0


def format_row(name: str, row: dict[str, Any]) -> str:
    """Return a line of the table."""
    losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
    return (
        f"{name:<28}{row['tokens_per_s']:>12,.0f}{row['peer_tokens_per_s']:>15,.0f}{row['peer']:>10}"
        f"{row['ratio']:>8.2f}{losses:>26}"
    )


def compare(shape: Shape, rounds: int, seconds: float) -> dict[str, Any]:
    """Return tokens per second of both programs, and the median ratio over pairs of rounds."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.n_vocab, (shape.batch_size, shape.seq_len + 1), dtype=np.int32)
    step, weights = make_native_step(shape, tokens)
    peer_name, peer_step = make_peer_step(shape, tokens, weights)
    losses = ([step() for _ in range(5)][-1], [peer_step() for _ in range(5)][-1])
    tokens_per_step = shape.batch_size * shape.seq_len
    rates = []
    for _ in range(rounds):
        rate = tokens_per_step * _steps_per_second(step, seconds)
        peer_rate = tokens_per_step * _steps_per_second(peer_step, seconds)
        rates.append((rate, peer_rate))
    return {
        "tokens_per_s": statistics.median(rate for rate, _ in rates),
        "peer": peer_name,
        "peer_tokens_per_s": statistics.median(peer_rate for _, peer_rate in rates),
        "ratio": statistics.median(rate / peer_rate for rate, peer_rate in rates),
        "losses": losses,
    }


def make_native_step(shape: Shape, tokens: np.ndarray) -> tuple[Callable[[], float], Any]:
    """Return a function that takes a training step and returns its loss, and the initial parameters."""
    config = make_config(shape)
    layout = init_devices(config.mesh)
    state = jax.jit(make_init_state(config))(jax.random.key(0))
    weights = jax.tree.map(np.asarray, state.params)
    ones = np.ones((shape.batch_size, shape.seq_len), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, ones, ones.astype(np.float32))
    batch = jax.tree.map(jax.device_put, batch)
    with use_layout(layout):
        train_step = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch).compile()

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, batch)
        return float(metrics["loss"])

    return step, weights


def make_config(shape: Shape) -> Config:
    """Return the configuration of a GPT-2 of this shape, trained with AdamW."""
    model = dict(shape._asdict(), scan_unroll=shape.n_layers)
    del model["batch_size"]
    rate = dict(learning_rate=LEARNING_RATE, end_learning_rate=LEARNING_RATE, schedule="constant", clip_norm=1.0)
    table = {
        "model": model,
        "data": {"train": {"random": {"path": "none"}}},
        "optimizer": dict(rate, beta2=0.95, weight_decay=0.1),
        "train": {"steps": 10**6, "batch_size": shape.batch_size},
    }
    return parse_config(table, where="bench")


def make_peer_step(shape: Shape, tokens: np.ndarray, weights: Any) -> tuple[str, Callable[[], float]]:
    """Return PyTorch's training step from the same weights, or the matmul limit if PyTorch is not installed."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return "matmul", _make_matmul_limit(shape)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=shape.n_layers,
            n_embd=shape.d_model,
            n_head=shape.n_heads,
            vocab_size=shape.n_vocab,
            n_positions=shape.seq_len,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    _copy_weights(model, weights, shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))

    def step() -> float:
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return "PyTorch", step


def _copy_weights(model: Any, weights: Any, shape: Shape) -> None:
    """Copy the initial weights into transformers' GPT-2, so that both programs take the same steps."""
    import torch

    arrays = {f"{module}/{name}": array for module, entry in weights.items() for name, array in entry.items()}
    block = "transformer/layers/block_0"
    d_model = shape.d_model
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.from_numpy(arrays["transformer/w_tokens"]))
        model.transformer.wpe.weight.copy_(torch.from_numpy(arrays["transformer/w_positions"]))
        for i, layer in enumerate(model.transformer.h):
            qkv = [arrays[f"{block}/attention/w_{name}"][i].reshape(d_model, d_model) for name in "qkv"]
            out = arrays[f"{block}/attention/w_o"][i].reshape(d_model, d_model)
            layer.attn.c_attn.weight.copy_(torch.from_numpy(np.concatenate(qkv, axis=1)))
            layer.attn.c_attn.bias.zero_()
            layer.attn.c_proj.weight.copy_(torch.from_numpy(out))
            layer.mlp.c_fc.weight.copy_(torch.from_numpy(arrays[f"{block}/feed_forward/w_in"][i]))
            layer.mlp.c_proj.weight.copy_(torch.from_numpy(arrays[f"{block}/feed_forward/w_out"][i]))


def _make_matmul_limit(shape: Shape) -> Callable[[], float]:
    """Return a function that sleeps for as long as the matmuls of a step take at the speed of a large matmul."""
    config = make_config(shape)
    state = jax.eval_shape(make_init_state(config), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((shape.batch_size, shape.seq_len), np.int32)
    batch = Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, np.float32))
    seconds = count_flops(make_train_step(config), state, batch) / measure_matmul_peak("float32")

    def step() -> float:
        time.sleep(seconds)
        return float("nan")

    return step


def _steps_per_second(step: Callable[[], float], seconds: float) -> float:
    """Return the steps per second of one round, after one step that is not timed."""
    step()
    count = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_command(main))
