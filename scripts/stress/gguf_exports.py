# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Check GGUF exports with llama.cpp: the files must load, and the greedy tokens must equal those of the native model.

A small model with random weights of each architecture is exported with float16 matrices, and llama.cpp continues prompts
of random tokens. The native model then computes the logits of the whole sequence: at each position llama.cpp's token must
have the largest logit. --record writes llama.cpp's tokens, with which the test suite compares the native model on machines
without llama.cpp. This program requires llama-cpp-python (pip install llama-cpp-python).

examples:
  python scripts/stress/gguf_exports.py
      a small model of each architecture
  python scripts/stress/gguf_exports.py runs/smollm2 --type Q4_K --text "The capital of France is"
      a checkpoint or model of any format; its tokenizer must give the same tokens as llama.cpp's

exit status: 0 all tokens are equal, 1 some differ, 2 wrong usage
"""

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError, ModelConfig
from mesh_transformer.convert.conversion import ConversionOptions, convert
from mesh_transformer.convert.gguf.writer import plan_gguf, write_gguf
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import HFConfig
from mesh_transformer.convert.huggingface.reader import read_model
from mesh_transformer.convert.import_plan import PREFIX, ImportPlan, PlannedArray, make_model_config
from mesh_transformer.convert.lazy_arrays import InMemory
from mesh_transformer.convert.logit_check import run_native
from mesh_transformer.convert.progress import no_progress
from mesh_transformer.convert.readers import open_checkpoint
from mesh_transformer.data.tokenizers import ByteTokenizer, tokenizer_from_json
from mesh_transformer.model.params import flatten_names
from mesh_transformer.model.shapes import describe_params
from mesh_transformer.storage.resume_log import open_staging_log

N_PROMPT, N_NEW = 12, 20  # tokens of a random prompt, and tokens to generate
MIN_MARGIN = 1e-2  # best minus second logit, relative to the largest; a smaller margin could be rounding
LLAMA = dict(
    num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=260, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
TABLES: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"model_type": "llama", "tie_word_embeddings": False},
    "llama3": LLAMA | {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mixtral": LLAMA
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "gemma2": LLAMA
    | {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 4},
    "gpt2": dict(model_type="gpt2", n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=260),
    "gpt_neox": dict(
        model_type="gpt_neox", num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        vocab_size=260, max_position_embeddings=64, rotary_pct=0.5,
    ),
}  # fmt: skip


class Answer(NamedTuple):
    """The tokens with which llama.cpp continues a prompt."""

    prompt: list[int]
    tokens: list[int]


def main(arguments: list[str]) -> int:
    """Export, generate with llama.cpp, compare, and print a line for each model."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "source", metavar="SRC", nargs="?", help="model or checkpoint of any format; default: small random models"
    )
    parser.add_argument("--type", default="F16", help="data type of the matrices; default: %(default)s")
    parser.add_argument("--text", action="append", help="text to continue with the model SRC; repeatable")
    parser.add_argument("--record", type=Path, help="JSON file to write with the tokens of llama.cpp")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError("this program requires llama.cpp, which is not installed: pip install llama-cpp-python")
    answers: dict[str, list[Answer]] = {}
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name, path in export_all(options.source, options.type, Path(temporary)).items():
            start = time.perf_counter()
            texts = options.text if options.source else None
            prompts = [encode(path, text) for text in texts] if texts else [make_prompt(name)]
            answers[name] = [
                ask_llama_cpp(path, prompt, texts[i] if texts else None) for i, prompt in enumerate(prompts)
            ]
            wrong, margin = compare(path, answers[name])
            failed = failed or wrong > 0
            print(
                f"{name:10} {wrong} of {N_NEW * len(prompts)} tokens differ, smallest margin {margin:.3f}, "
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )
    if options.record:
        found = {name: [answer._asdict() for answer in each] for name, each in answers.items()}
        options.record.write_text(json.dumps(found, indent=None) + "\n")
    return int(failed)


def export_all(source: str | None, gguf_type: str, folder: Path) -> dict[str, Path]:
    """Write GGUF files below `folder` and return their paths by name."""
    if source is None:
        return {name: export_tiny(name, gguf_type, folder / name) for name in TABLES}
    convert(ConversionOptions(source=source, destination=folder / "model", format="gguf", gguf_type=gguf_type))
    return {"model": next((folder / "model").glob("*.gguf"))}


def export_tiny(name: str, gguf_type: str, folder: Path) -> Path:
    """Write the small model of an architecture to a GGUF file in a new folder and return its path."""
    path = folder / f"{name}.gguf"
    model = plan_gguf(make_tiny(name), gguf_type)
    with open_staging_log(folder, {"name": name}) as log:
        write_gguf(path, model, {"tokenizer": ByteTokenizer().to_json()}, log, no_progress)
    return path


def make_tiny(name: str) -> ImportPlan:
    """Return the small model of an architecture, with random weights that depend only on its name."""
    table = TABLES[name]
    model = read_model(HFConfig(table, name), FAMILIES[table["model_type"]])
    config = make_model_config(model, name)
    random = np.random.default_rng(sum(name.encode()))
    arrays = {
        PREFIX + weight: PlannedArray(InMemory(draw(random, weight, info.shape, config)), info.axes)
        for weight, info in sorted(flatten_names(describe_params(config)).items())
    }
    return ImportPlan(config, model, arrays, 0)


def draw(random: np.random.Generator, name: str, shape: Sequence[int], config: ModelConfig) -> np.ndarray:
    """Return random float32 values of a weight, large enough that the best token depends on all of the context."""
    values = random.standard_normal(shape)
    if name.endswith("scale"):
        return (0.1 * values + (0 if config.norm == "gemma-rmsnorm" else 1)).astype(np.float32)
    scale = 0.25
    if "w_tokens" in name:  # small, so that a tied head does not only repeat the last token
        scale = 0.1 if config.embedding_scale == "none" else 0.1 * config.d_model**-0.5
    return (scale * values).astype(np.float32)


def make_prompt(name: str) -> list[int]:
    """Return the random prompt of a small model."""
    return np.random.default_rng(len(name)).integers(0, 256, N_PROMPT).tolist()


def encode(path: Path, text: str) -> list[int]:
    """Return the tokens of a text by the tokenizer in a GGUF file, as this project reads it."""
    return tokenizer_from_json(open_checkpoint(path).meta["tokenizer"]).encode(text, parse_special=True)


def ask_llama_cpp(path: Path, prompt: Sequence[int], text: str | None) -> Answer:
    """Return the tokens that llama.cpp chooses after a prompt. Raise ConfigError if it encodes the text differently."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=2, seed=0)
    if text is not None:
        own = llama.tokenize(text.encode(), add_bos=False, special=True)
        if own != list(prompt):
            raise ConfigError(
                f"--text {text!r}: llama.cpp's tokens are {own}, but this project's are {list(prompt)}, so the models cannot be "
                "compared; pass another --text"
            )
    tokens = list(prompt)
    llama.eval(tokens)
    for _ in range(N_NEW):
        tokens.append(int(np.argmax(llama.scores[len(tokens) - 1])))
        llama.eval(tokens[-1:])
    llama.close()
    return Answer(list(prompt), tokens[len(prompt) :])


def compare(path: Path, answers: Sequence[Answer]) -> tuple[int, float]:
    """Return the number of tokens that differ from the native model's best, and its smallest relative margin.

    The margin is the best minus the second logit. Tokens with a margin below MIN_MARGIN do not count.
    """
    plan = open_checkpoint(path).plan
    wrong, smallest = 0, float("inf")
    for answer in answers:
        sequence = [*answer.prompt, *answer.tokens]
        logits = run_native(plan.config, plan.values, np.array([sequence[:-1]], np.int32))[0, len(answer.prompt) - 1 :]
        top = np.sort(logits, axis=-1)
        margins = (top[:, -1] - top[:, -2]) / np.abs(logits).max()
        smallest = min(smallest, float(margins.min()))
        wrong += int(np.sum((logits.argmax(axis=-1) != answer.tokens) & (margins >= MIN_MARGIN)))
    return wrong, smallest


def read_answers(table: Mapping[str, Any]) -> dict[str, list[Answer]]:
    """Return the answers in the content of a recorded file."""
    return {name: [Answer(**answer) for answer in each] for name, each in table.items()}


if __name__ == "__main__":
    sys.exit(run_command(main))
