# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Replay one step of a run exactly and inspect it, for example a loss spike or a skipped step.

examples:
  python scripts/replay_step.py runs/quickstart 300
      replay step 300 of metrics.jsonl from the nearest earlier checkpoint; print its loss and the logged loss, the norms
      of parameters and gradients by layer, and the sequences with the highest loss
  python scripts/replay_step.py runs/quickstart 300 --worst 8 --json
      show eight sequences; print one JSON object

exit status: 0 the loss equals the logged loss or none was logged, 1 it differs or the replay failed, 2 wrong usage
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError
from mesh_transformer.mesh import use_layout
from mesh_transformer.model.transformer import make_model
from mesh_transformer.train.optimizer import global_norm
from mesh_transformer.train.replay import open_replay, read_batch, read_losses, replay
from mesh_transformer.train.run import Run
from mesh_transformer.train.schedule import first_sequence
from mesh_transformer.train.step import dropout_key, make_gradients, model_inputs, norms_by_layer

MAX_CHARACTERS = 600  # printed characters of a sequence


def main(arguments: list[str]) -> int:
    """Replay the step and print its loss, norms and worst sequences."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("step", metavar="STEP", type=int, help="number of the step in metrics.jsonl, from 1")
    parser.add_argument(
        "--worst", type=int, default=3, help="sequences to show, highest loss first; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.step < 1:
        raise ConfigError(f"STEP is {options.step}, but must be at least 1: steps are numbered from 1")
    result = inspect_step(options.run, options.step, options.worst)
    print(json.dumps(result) if options.json else format_result(result))
    return 1 if result["equal"] is False else 0


def inspect_step(run_dir: Path, step: int, worst: int) -> dict[str, Any]:
    """Replay a step; return its loss, norms, and the `worst` sequences with the highest loss."""
    run, changes = open_replay(run_dir, step - 1)
    if step > run.config.train.steps:
        raise ConfigError(f"STEP is {step}, but must be at most {run.config.train.steps}, the last step of {run_dir}")
    from_checkpoint = run.step
    for _ in replay(run, step - 1):
        pass
    batch = read_batch(run, step - 1)
    norms = measure_norms(run, batch)
    sequences = score_sequences(run, batch, step)[:worst]
    (replayed,) = replay(run, step)
    logged = read_losses(run_dir).get(step)
    both_nan = logged is not None and np.isnan(logged) and np.isnan(replayed.loss)
    equal = None if logged is None else bool(both_nan or replayed.loss.tobytes() == logged.tobytes())
    return {
        "run": str(run_dir),
        "step": step,
        "from_checkpoint": from_checkpoint,
        "changed": changes,
        "loss": float(replayed.loss),
        "logged": None if logged is None else float(logged),
        "equal": equal,
        "norms": norms,
        "worst": sequences,
    }


def measure_norms(run: Run, batch: Any) -> list[dict[str, Any]]:
    """Return the norms of parameters and gradients: in total, of each layer, and of each module outside the layers."""
    config = run.config

    def norms_of(tree: Any) -> dict[str, Any]:
        outside = {module: global_norm(arrays) for module, arrays in tree.items() if "/layers/" not in module}
        return {"all": global_norm(tree), "layers": norms_by_layer(tree), "outside": outside}

    def measure(state: Any, sharded: Any) -> dict[str, Any]:
        with use_layout(run.layout):
            grads = make_gradients(config)(state.params, sharded, dropout_key(config, state.step)).grads
            return {"parameters": norms_of(state.params), "gradients": norms_of(grads)}

    measured = jax.tree.map(np.asarray, jax.jit(measure)(run.state, run.shard_batch(batch, len(batch.tokens))))
    params = measured["parameters"]
    grads = measured["gradients"]
    norms = [("all", params["all"], grads["all"])]
    norms += [(module, params["outside"][module], grads["outside"][module]) for module in params["outside"]]
    norms += [(f"layer {i}", *pair) for i, pair in enumerate(zip(params["layers"], grads["layers"], strict=True))]
    return [{"module": module, "parameters": float(p), "gradients": float(g)} for module, p, g in norms]


def score_sequences(run: Run, batch: Any, step: int) -> list[dict[str, Any]]:
    """Return the sequences of a batch with their highest token loss, in decreasing order of mean loss (without dropout)."""
    model = make_model(run.config.model)
    loader = run.data.train

    def token_losses(params: Any, sharded: Any) -> jax.Array:
        with use_layout(run.layout):
            logits, _ = model.apply(params, sharded.tokens, **model_inputs(run.config, sharded))
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, sharded.targets) * sharded.mask

    losses = np.asarray(jax.jit(token_losses)(run.state.params, run.shard_batch(batch, len(batch.tokens))))
    first = first_sequence(run.config.train, step - 1)
    sequences = []
    for i in map(int, np.argsort(-losses.mean(axis=1))):
        dataset, number = loader.locate(first + i)
        position = int(losses[i].argmax())
        sequences.append(
            {
                "sequence": first + i,
                "dataset": loader.datasets[dataset].name,
                "number": number,  # of the sequence in the dataset
                "loss": float(losses[i].mean()),
                "worst_token": {
                    "position": position,
                    "loss": float(losses[i, position]),
                    "text": run.data.tokenizer.decode([int(batch.targets[i, position])]),
                },
                "text": run.data.tokenizer.decode(batch.tokens[i]),
            }
        )
    return sequences


def format_result(result: dict[str, Any]) -> str:
    """Return the loss, norms and worst sequences of a replayed step as lines of text."""
    comparison = {
        True: "equal to the logged loss",
        False: f"NOT equal to the logged loss {result['logged']!r}",
        None: "no loss was logged",
    }[result["equal"]]
    lines = [f"changed since the run: {change}" for change in result["changed"]]
    lines.append(
        f"step {result['step']}, replayed from step {result['from_checkpoint']}: loss {result['loss']!r}, {comparison}"
    )
    width = max(len(norm["module"]) for norm in result["norms"])
    lines.append(f"\n{'norm of':{width}}  parameters   gradients")
    lines += [f"{n['module']:{width}}  {n['parameters']:10.4g}  {n['gradients']:10.4g}" for n in result["norms"]]
    for sequence in result["worst"]:
        token = sequence["worst_token"]
        lines.append(
            f"\n--- sequence {sequence['sequence']} (number {sequence['number']} of {sequence['dataset']}): loss "
            f"{sequence['loss']:.4f}; highest at position {token['position']}, {token['text']!r}: {token['loss']:.2f}"
        )
        text = sequence["text"]
        lines.append(text[:MAX_CHARACTERS] + (" ..." if len(text) > MAX_CHARACTERS else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
