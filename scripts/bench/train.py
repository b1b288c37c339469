# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Training speed beside PyTorch's on the same model, data and steps; on this machine's CPU, in float32.

Both sides train GPT-2 (transformers' GPT2LMHeadModel, eager, fused AdamW) on the same random tokens, in turns: a round
of our steps, a round of theirs, and the median of the rounds' ratios. Without PyTorch the peer is a matrix product.

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
    """A GPT-2 and a batch for it."""

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
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each side; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object per shape instead of the table")
    options = parser.parse_args(arguments)
    print(
        f"{'shape':<28}{'ours tokens/s':>15}{'peer tokens/s':>15}{'peer':>10}{'ratio':>8}{'losses after 5 steps':>26}"
    )
    ratios = []
    for name, shape in SHAPES.items():
        row = compare(shape, options.rounds, options.seconds)
        ratios.append(row["ratio"])
        if options.json:
            print(json.dumps({"shape": name, **row}))
        else:
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
            print(
                f"{name:<28}{row['ours']:>15,.0f}{row['peer_speed']:>15,.0f}{row['peer']:>10}{row['ratio']:>8.2f}{losses:>26}"
            )
    print("ratio " + " ".join(f"{ratio:.2f}" for ratio in ratios))
    return 0


def compare(shape: Shape, rounds: int, seconds: float) -> dict[str, Any]:
    """Tokens per second of both sides and the median of the paired ratios."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.n_vocab, (shape.batch_size, shape.seq_len + 1), dtype=np.int32)
    ours, weights = make_ours(shape, tokens)
    peer_name, peer = make_peer(shape, tokens, weights)
    first = ([ours() for _ in range(5)][-1], [peer() for _ in range(5)][-1])
    per_step = shape.batch_size * shape.seq_len
    speeds = [(per_step * _rate(ours, seconds), per_step * _rate(peer, seconds)) for _ in range(rounds)]
    return {
        "ours": statistics.median(a for a, _ in speeds),
        "peer": peer_name,
        "peer_speed": statistics.median(b for _, b in speeds),
        "ratio": statistics.median(a / b for a, b in speeds),
        "losses": first,
    }


def make_ours(shape: Shape, tokens: np.ndarray) -> tuple[Callable[[], float], Any]:
    """A function that takes one of our training steps and returns its loss, and the initial parameters."""
    config = make_config(shape)
    layout = init_devices(config.mesh)
    state = jax.jit(make_init_state(config))(jax.random.key(0))
    weights = jax.tree.map(np.asarray, state.params)
    ones = np.ones((shape.batch_size, shape.seq_len), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, ones, ones.astype(np.float32))
    batch = jax.tree.map(jax.device_put, batch)
    with use_layout(layout):
        step = jax.jit(make_train_step(config), donate_argnums=0).lower(state, batch).compile()

    def one() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return one, weights


def make_config(shape: Shape) -> Config:
    """GPT-2 of this shape under plain AdamW."""
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


def make_peer(shape: Shape, tokens: np.ndarray, weights: Any) -> tuple[str, Callable[[], float]]:
    """PyTorch's step from the same weights; without PyTorch, the products alone at the speed of a large one."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return "products", _make_product_limit(shape)
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

    def one() -> float:
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return "PyTorch", one


def _copy_weights(model: Any, weights: Any, shape: Shape) -> None:
    """Our initial weights into transformers' GPT-2, so that both sides take the same steps."""
    import torch

    w = {f"{module}/{name}": array for module, arrays in weights.items() for name, array in arrays.items()}
    block, d = "transformer/layers/block_0", shape.d_model
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.from_numpy(w["transformer/w_tokens"]))
        model.transformer.wpe.weight.copy_(torch.from_numpy(w["transformer/w_positions"]))
        for i, layer in enumerate(model.transformer.h):
            qkv = np.concatenate([w[f"{block}/attention/w_{x}"][i].reshape(d, d) for x in "qkv"], axis=1)
            layer.attn.c_attn.weight.copy_(torch.from_numpy(qkv))
            layer.attn.c_attn.bias.zero_()
            layer.attn.c_proj.weight.copy_(torch.from_numpy(w[f"{block}/attention/w_o"][i].reshape(d, d)))
            layer.mlp.c_fc.weight.copy_(torch.from_numpy(w[f"{block}/feed_forward/w_in"][i]))
            layer.mlp.c_proj.weight.copy_(torch.from_numpy(w[f"{block}/feed_forward/w_out"][i]))


def _make_product_limit(shape: Shape) -> Callable[[], float]:
    """Waits as long as the step's products take at the speed of a large product."""
    config = make_config(shape)
    state = jax.eval_shape(make_init_state(config), jax.random.key(0))
    whole = jax.ShapeDtypeStruct((shape.batch_size, shape.seq_len), np.int32)
    batch = Batch(whole, whole, whole, whole, jax.ShapeDtypeStruct(whole.shape, np.float32))
    seconds = count_flops(make_train_step(config), state, batch) / measure_matmul_peak("float32")

    def one() -> float:
        time.sleep(seconds)
        return float("nan")

    return one


def _rate(step: Callable[[], float], seconds: float) -> float:
    """Steps per second over one round."""
    step()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_command(main))
