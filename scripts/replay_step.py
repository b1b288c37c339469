# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Take one step of a run again, exactly, and look into it: a loss spike, a skipped step.

examples:
  python scripts/replay_step.py runs/quickstart 300
      state and batch of the step that metrics.jsonl calls 300, from the nearest earlier checkpoint; its loss beside the
      logged one, norms of parameters and gradients by layer, and the texts with the highest loss
  python scripts/replay_step.py runs/quickstart 300 --worst 8 --json
      as one JSON object

exit status: 0 the loss is the logged one or was not logged, 1 it is another or the replay failed, 2 wrong usage
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
from mesh_transformer.train.replay import read_batch, open_replay, read_losses, replay
from mesh_transformer.train.run import Run
from mesh_transformer.train.schedule import first_sequence
from mesh_transformer.train.step import dropout_key, norms_by_layer, make_gradients, model_inputs

TEXT_CHARACTERS = 600  # shown of a sequence


def main(arguments: list[str]) -> int:
    """Parse, replay, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "step", metavar="STEP", type=int, help="as in metrics.jsonl: the step that made STEP steps taken"
    )
    parser.add_argument("--worst", type=int, default=3, help="sequences shown, those with the highest loss first")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.step < 1:
        raise ConfigError(f"STEP {options.step}: the first step is 1")
    result = look_at_step(options.run, options.step, options.worst)
    print(json.dumps(result) if options.json else format_result(result))
    return 1 if result["equal"] is False else 0


def look_at_step(run_dir: Path, step: int, worst: int) -> dict[str, Any]:
    """Everything about one step."""
    run, changes = open_replay(run_dir, step - 1)
    if step > run.config.train.steps:
        raise ConfigError(f"STEP {step}: the run has {run.config.train.steps} steps")
    start = run.step
    for _ in replay(run, step - 1):
        pass
    batch = read_batch(run, step - 1)
    norms = measure_norms(run, batch)
    sequences = score_sequences(run, batch, step)[:worst]
    (taken,) = replay(run, step)
    logged = read_losses(run_dir).get(step)
    both_nan = logged is not None and np.isnan(logged) and np.isnan(taken.loss)
    equal = None if logged is None else bool(both_nan or taken.loss.tobytes() == logged.tobytes())
    return {
        "run": str(run_dir),
        "step": step,
        "from_checkpoint": start,
        "changed": changes,
        "loss": float(taken.loss),
        "logged": None if logged is None else float(logged),
        "equal": equal,
        "norms": norms,
        "worst": sequences,
    }


def measure_norms(run: Run, batch: Any) -> list[dict[str, Any]]:
    """Norms of parameters and gradients: of everything, of each layer, of what lies outside the layers."""
    config = run.config

    def measure(state: Any, placed: Any) -> dict[str, Any]:
        with use_layout(run.layout):
            grads = make_gradients(config)(state.params, placed, dropout_key(config, state.step)).grads
            sides = {"parameters": state.params, "gradients": grads}
            outside = {
                name: {module: global_norm(arrays) for module, arrays in side.items() if "/layers/" not in module}
                for name, side in sides.items()
            }
            return {
                name: {"all": global_norm(side), "layers": norms_by_layer(side), "outside": outside[name]}
                for name, side in sides.items()
            }

    found = jax.tree.map(np.asarray, jax.jit(measure)(run.state, run.shard_batch(batch, len(batch.tokens))))
    params, grads = found["parameters"], found["gradients"]
    rows = [("all", params["all"], grads["all"])]
    rows += [(module, params["outside"][module], grads["outside"][module]) for module in params["outside"]]
    rows += [(f"layer {i}", *norms) for i, norms in enumerate(zip(params["layers"], grads["layers"], strict=True))]
    return [{"where": where, "parameters": float(p), "gradients": float(g)} for where, p, g in rows]


def score_sequences(run: Run, batch: Any, step: int) -> list[dict[str, Any]]:
    """The sequences of a batch, the one with the highest mean loss (without dropout) first, with the worst token of each."""
    model, loader = make_model(run.config.model), run.data.train

    def score(params: Any, placed: Any) -> jax.Array:
        with use_layout(run.layout):
            logits, _ = model.apply(params, placed.tokens, **model_inputs(run.config, placed))
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, placed.targets) * placed.mask

    nats = np.asarray(jax.jit(score)(run.state.params, run.shard_batch(batch, len(batch.tokens))))
    first = first_sequence(run.config.train, step - 1)
    rows = []
    for row in np.argsort(-nats.mean(axis=1)):
        source, number = loader.locate(first + int(row))
        place = int(nats[row].argmax())
        rows.append(
            {
                "sequence": first + int(row),
                "source": loader.datasets[source].name,
                "number": number,
                "loss": float(nats[row].mean()),
                "worst_token": {
                    "place": place,
                    "loss": float(nats[row, place]),
                    "text": run.data.tokenizer.decode([int(batch.targets[row, place])]),
                },
                "text": run.data.tokenizer.decode(batch.tokens[row]),
            }
        )
    return rows


def format_result(result: dict[str, Any]) -> str:
    """A page for a person."""
    word = f"NOT the logged {result['logged']!r}" if result["equal"] is False else "equal to the logged one"
    word = "it was not logged" if result["equal"] is None else word
    lines = [f"changed since: {change}" for change in result["changed"]]
    lines.append(
        f"step {result['step']}, replayed from step {result['from_checkpoint']}: loss {result['loss']!r}, {word}"
    )
    width = max(len(row["where"]) for row in result["norms"])
    lines.append(f"\n{'norm of':{width}}  parameters   gradients")
    lines += [f"{row['where']:{width}}  {row['parameters']:10.4g}  {row['gradients']:10.4g}" for row in result["norms"]]
    for row in result["worst"]:
        token = row["worst_token"]
        lines.append(
            f"\n--- sequence {row['sequence']}: {row['source']}, its number {row['number']}; loss {row['loss']:.4f}; worst token "
            f"{token['text']!r} at {token['place']}: {token['loss']:.2f}"
        )
        lines.append(row["text"][:TEXT_CHARACTERS] + (" ..." if len(row["text"]) > TEXT_CHARACTERS else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
