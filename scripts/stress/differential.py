# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Differential test of imports: every field of every supported configuration class of transformers, varied one at a time.

A small random model is saved by transformers and imported. Each field gets other values (a model of that configuration, and
an edit of the saved config.json), null, and is deleted; of some families also starting from a second model, for fields that
have an effect there only. Then the logits of transformers and of the imported model must be equal and give the same 16
greedy tokens, or the import must be refused with an error that names the key. Accepted models are exported, loaded by
transformers and compared again, logits and config.json. A line for each family counts the cells that are

  equal         as above
  refused       by an error that names the key
  unnamed       refused by an error that does not name the key (a failure)
  silent        accepted with other logits (a failure)
  crash         any other error (a failure)
  export        not the same after the way back (a failure)
  not loadable  not loaded by transformers itself; not counted in the number of cells

examples:
  python scripts/stress/differential.py
      all families; about an hour on one core
  python scripts/stress/differential.py --families qwen2 t5 --verbose
      two families, with a line for each cell
  python scripts/stress/differential.py --sample 20 --budget 300
      20 cells of each family, at most 5 minutes

exit status: 0 no cell fails, 1 one does, 2 wrong usage
"""

import copy
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from mesh_transformer.scripts.stress.config_comparison import compare_configs
from safetensors import safe_open
from safetensors.numpy import save_file

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import KEYS_WITHOUT_EFFECT, NO_EFFECT_OF, recorded_classes
from mesh_transformer.convert.huggingface.reader import find_family, open_huggingface, pack_tensors
from mesh_transformer.convert.huggingface.text_files import SPECIAL_IDS, read_text_files, write_text_files
from mesh_transformer.convert.import_plan import ImportPlan
from mesh_transformer.convert.library_logits import attention_of, compute_logits
from mesh_transformer.convert.logit_check import make_encoder_tokens, run_native
from mesh_transformer.storage.errors import CheckpointError

TOLERANCE = 2e-5  # relative to the largest absolute logit or 1
PROMPT = 8  # tokens of the prompt
GREEDY = 16  # tokens to generate
MODEL_LENGTH = 32  # positions of the model
ABSENT = "(absent)"
FAILURES = ("silent", "unnamed", "crash", "export")
# Sizes of the small models, for every class that has the field.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), MODEL_LENGTH),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("sliding_window", "window_size"), 5),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
    **dict(vocab_size=96, rotary_dim=4, attention_types=[[["global", "local"], 1]], query_pre_attn_scalar=16),
    **dict(num_experts_per_tok=2, n_shared_experts=1, q_lora_rank=12, n_group=2, topk_group=1, first_k_dense_replace=1),
    **dict(max_window_layers=1, embedding_size=16, expert_capacity=20, original_max_position_embeddings=MODEL_LENGTH),
    **dict(pad_token_id=None, bos_token_id=1, eos_token_id=2),
}
# Where the default of the class, or the small size, is not supported
CHOICES: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "silu"},
    "roberta": {"pad_token_id": 1},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "falcon": {"num_kv_heads": 4},
}
# Other models of a family, in which fields have an effect that they do not have in the first one
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [{"use_sliding_window": True}],
    "qwen3": [{"use_sliding_window": True, "attention_bias": True}],
    "qwen2_moe": [{"use_sliding_window": True, "decoder_sparse_step": 2}],
    "qwen3_moe": [{"use_sliding_window": True, "attention_bias": True, "norm_topk_prob": True}],
    "deepseek_v2": [{"topk_method": "group_limited_greedy", "q_lora_rank": None, "attention_bias": True}],
    "smollm3": [{"use_sliding_window": True, "no_rope_layer_interval": 2, "attention_bias": True}],
    "falcon": [{"new_decoder_architecture": True, "num_kv_heads": 2}, {"alibi": True, "parallel_attn": False}],
    "gpt_neox": [{"use_parallel_residual": False}],
    "stablelm": [{"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}],
    "cohere": [{"use_qk_norm": True, "attention_bias": True}],
    "gpt_bigcode": [{"multi_query": False}],
    "t5": [{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}],
}
# The part of config.json that holds the text model, and the family that it is there and in exports
PARTS = {"gemma3": ("text_config", "gemma3_text")}
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "quick_gelu", "relu2", "mish"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = dict(YARN, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
LONG = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 16} | {
    key: [1.0, 1.2, last / 2, last] for key, last in (("short_factor", 3.0), ("long_factor", 5.0))
}
ROPE = [
    {"rope_type": "default", "rope_theta": 5e3}, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0}, YARN, LLAMA3, dict(LLAMA3, rope_theta=5e3), {"rope_theta": 5e3},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, {}, LONG,
    dict(YARN, attention_factor=0.7), dict(YARN, beta_fast=4.0, beta_slow=0.5, truncate=False),
    dict(YARN, mscale=0.7, mscale_all_dim=0.5),
]  # fmt: skip
VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn"), ACTIVATIONS
    ),
    "feed_forward_proj": ["relu", "gelu", "silu", "gated-gelu", "gated-silu", "gated-relu"],
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ROPE),
    "layer_types": [list(types) for types in itertools.product(("full_attention", "sliding_attention"), repeat=2)],
    "attention_types": [[[["local"], 2]], [[["local"], 1], [["global"], 1]], [[["global"], 2]]],
    "attention_layers": [["local", "global"]],
    "eos_token_id": [5, [5, 6]],
    "router_dtype": ["bfloat16"],
    "mlp_only_layers": [[], [0], [1], [0, 1], [5]],
    "no_rope_layers": [[1, 1], [0, 1], [0, 0], [1, 0, 1]],
    "topk_method": ["group_limited_greedy", "noaux_tc"],
    "norm_type": ["layernorm", "rmsnorm"],
    "attn_config": [
        {"attn_type": "multiquery_attention"}, {"attn_pdrop": 1}, {"attn_impl": "triton"}, {"clip_qkv": 0.3},
        {"softmax_scale": 0.2}, {"prefix_lm": True}, {"qk_ln": True}, {"attn_uses_sequence_id": True}, {"alibi": False},
        {"alibi_bias_max": 4},
    ],
    "summary_type": ["mean"], "summary_activation": ["tanh"], "init_device": ["meta"],
}  # fmt: skip
OWN_VALUES = {("gemma3_text", "rope_parameters"): [{"full_attention": x, "sliding_attention": ROPE[0]} for x in ROPE]}
# Keys that can occur in any config.json, even if the class does not have the field.
OTHER_KEYS: dict[str, list[Any]] = {
    "rope_theta": [5e3], "partial_rotary_factor": [0.5], "rotary_pct": [0.5], "rotary_emb_base": [5e3],
    "rope_scaling": ROPE, "attention_bias": [True], "mlp_bias": [True], "tie_word_embeddings": [True, False],
    "scale_decoder_outputs": [True, False], "head_dim": [4], "sliding_window": [3], "use_sliding_window": [True],
    "is_decoder": [True], "num_key_value_heads": [2, 4], "decoder_start_token_id": [3], "per_layer_config": [{}],
    "dense_act_fn": ["silu"], "is_gated_act": [True], "layer_types": VALUES["layer_types"], "architectures": [["Other"]],
    "rope_local_base_freq": [3e3], "sliding_window_pattern": [1, 2], "n_embed": [16, 32], "seq_length": [16],
    "moe_layer_freq": [2], "scoring_func": ["softmax", "sigmoid"], "logit_scale": [0.5], "sep_token_id": [7],
}  # fmt: skip


class Cell(NamedTuple):
    """One change of one key."""

    key: str
    value: Any  # ABSENT: the key is deleted
    built: bool  # True: transformers builds a model with the value; False: config.json of the base model is edited
    variant: int = 0  # of the base model


class Outcome(NamedTuple):
    """The result of a cell."""

    cell: Cell
    name: str  # a column of the table
    detail: str


class NotLoadable(Exception):
    """Error for a model that transformers cannot load or run."""


def main(arguments: list[str]) -> int:
    """Run the cells and print a table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--sample", type=int, help="cells of each family, at random; default: all")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds; families not begun have 0 cells; default: no limit"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample; default: %(default)s")
    parser.add_argument("--verbose", action="store_true", help="print a line for each cell")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    names = ("equal", "refused", *FAILURES, "not loadable")
    print("  ".join(f"{name:>12}" for name in ("family", "cells", *names)))
    failed = 0
    for kind in options.families:
        outcomes = run_family(kind, options.sample, options.seed, end)
        counts = Counter(outcome.name for outcome in outcomes)
        row = (kind, len(outcomes) - counts["not loadable"], *(counts[name] for name in names))
        print("  ".join(f"{value:>12}" for value in row), flush=True)
        for cell, name, detail in outcomes:
            if name in FAILURES or options.verbose:
                how = "built" if cell.built else "edited"
                print(f"    {name}: {cell.key} = {cell.value!r} ({how}, {cell.variant}): {detail}", flush=True)
        failed += sum(counts[name] for name in FAILURES)
    return int(failed > 0)


def run_family(kind: str, sample: int | None = None, seed: int = 0, end: float = math.inf) -> list[Outcome]:
    """Return the outcome of each cell of a family, of as many as can be run before the time `end`."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    cells = list(list_cells(kind))
    if sample is not None and sample < len(cells):
        chosen = random.Random(seed).sample(cells[1:], sample - 1)
        cells = [cells[0], *sorted(chosen, key=lambda cell: cell.variant)]
    outcomes: list[Outcome] = []
    bench = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about many of these configurations
        for cell in cells:
            if time.monotonic() > end:
                break
            if bench is None or bench.variant != cell.variant:
                bench = Bench(kind, Path(folder) / str(cell.variant), cell.variant)
            outcomes.append(Outcome(cell, *bench.run(cell)))
    return outcomes


def list_fields(kind: str) -> dict[str, tuple[Any, str]]:
    """Return the fields of the class that configures the text model of a family, with default and JSON types."""
    return recorded_classes()[text_kind(kind)]["fields"]


def text_kind(kind: str) -> str:
    """Return the family of the text model of a family."""
    return PARTS.get(kind, ("", kind))[1]


def list_cells(kind: str) -> Iterator[Cell]:
    """Yield all changes for a family."""
    fields = list_fields(kind)
    for variant in range(1 + len(VARIANTS.get(kind, []))):
        yield Cell("model_type", text_kind(kind), built=False, variant=variant)  # the base model itself
        for key, (default, types) in fields.items():
            own = OWN_VALUES.get((text_kind(kind), key)) or VALUES.get(key)
            for value in own or other_values(SMALL.get(key, default), types):
                yield Cell(key, value, built=True, variant=variant)
                yield Cell(key, value, built=False, variant=variant)
            yield Cell(key, None, built=False, variant=variant)
            yield Cell(key, ABSENT, built=False, variant=variant)
        for key in sorted(OTHER_KEYS.keys() - fields.keys()):
            yield from (Cell(key, value, built=False, variant=variant) for value in OTHER_KEYS[key])


def other_values(value: Any, types: str) -> list[Any]:
    """Return legal values of a field besides `value`, given its JSON types."""
    kinds = types.split("|")
    if isinstance(value, bool) or "bool" in kinds:
        return [not value]
    if isinstance(value, float) or (value is None and "float" in kinds):
        return [1.5 * (value or 0.2), 0.5, 2]
    if isinstance(value, int) or (value is None and "int" in kinds):
        return [2 * (value or 4), 1]
    return []


class Bench:
    """The base model of a family on disk, and comparisons of changed models with transformers."""

    def __init__(self, kind: str, folder: Path, variant: int = 0):
        import transformers

        self.kind = kind
        self.folder = folder
        self.variant = variant
        self.part, self.exported_kind = PARTS.get(kind, ("", kind))
        self.model_class = getattr(transformers, FAMILIES[kind].architecture)
        self.sizes = {key: value for key, value in SMALL.items() if key in list_fields(kind)}
        self.sizes |= CHOICES.get(kind, {}) | [{}, *VARIANTS.get(kind, [])][variant]
        self.base = self._build({})
        self.base_folder = folder / "base"
        self.base.save_pretrained(self.base_folder)
        self.tokens = np.random.default_rng(0).integers(3, 90, (2, PROMPT), dtype=np.int32)
        # Results by what determines them: configuration and digest of the weights
        self.expected: dict[tuple[str, str], tuple[np.ndarray, np.ndarray] | Exception] = {}
        self.native: dict[tuple[str, str, bytes], np.ndarray] = {}
        self.exports: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}

    def run(self, cell: Cell) -> tuple[str, str]:
        """Return the outcome of a cell and a detail."""
        folder = self.folder / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._save(cell, folder)
            digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            tokens, expected = self._generate(folder, digest)
        except Exception as error:
            name = "crash" if cell.key == "model_type" else "not loadable"  # the base model itself must be loaded
            return name, f"{type(error).__name__}: {str(error)[:100]}"
        try:
            plan = open_huggingface(folder)
            has_table = plan.config.positions == "learned" or self.kind == "mpt"  # MPT: of biases
            if has_table and plan.config.seq_len < tokens.shape[1]:
                return (
                    "not loadable",
                    f"{tokens.shape[1]} tokens exceed the {plan.config.seq_len} positions of the model",
                )
            found = self._run_native(plan, tokens, digest)
        except CheckpointError as error:
            named = re.search(rf"(?<!\w){re.escape(cell.key)}(?!\w)", str(error).replace(str(folder), ""))
            return "refused" if named else "unnamed", str(error)[-300:]
        except Exception as error:
            return "crash", f"{type(error).__name__}: {error}"
        difference = float(np.abs(found - expected).max())
        scale = max(1.0, float(np.abs(expected).max()))
        # The next token is the library's, or one with the same logit but for rounding.
        chosen = np.take_along_axis(expected, found.argmax(-1, keepdims=True), -1)[..., 0]
        same = (expected.max(-1) - chosen <= TOLERANCE * scale)[:, PROMPT - 1 : -1].all()
        if not same or not difference <= TOLERANCE * scale:
            return "silent", f"largest difference of logits {difference:.2g} of {scale:.2g}"
        try:
            problem = self._check_export(plan, folder, tokens, expected, digest)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return ("export", problem) if problem else ("equal", f"{difference:.1e}")

    def _build(self, changes: dict[str, Any]) -> Any:
        """Return a transformers model with the base model's weights, or random weights if the tensors' shapes differ."""
        import torch

        torch.manual_seed(0)
        table = copy.deepcopy(self.sizes | changes)
        table = {self.part: table, "vision_config": VISION, "mm_tokens_per_image": 4} if self.part else table
        model = self.model_class(self.model_class.config_class(**table)).eval().float()
        base = dict(self.base.state_dict()) if hasattr(self, "base") else {}
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if {name: tensor.shape for name, tensor in base.items()} == shapes:
            model.load_state_dict(base)
            return model
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.7 / 32**0.5)
            parameter.data = noise + (1 if parameter.ndim == 1 else 0)
        return model

    def _save(self, cell: Cell, folder: Path) -> None:
        """Save the model of a cell."""
        if cell.built:
            self._build({cell.key: cell.value}).save_pretrained(folder)
            return
        shutil.copytree(self.base_folder, folder)
        path = folder / "config.json"
        whole = json.loads(path.read_text())
        table = whole[self.part] if self.part else whole
        table[cell.key] = cell.value
        if cell.value == ABSENT:
            del table[cell.key]
        path.write_text(json.dumps(whole))

    def _load(self, folder: Path, model_class: Any) -> Any:
        """Return the transformers model of a folder; raise NotLoadable if tensors are missing, added or of another shape."""
        import torch

        config = model_class.config_class.from_pretrained(folder)
        with torch.device("meta"):  # with default sizes the model would need gigabytes
            wanted = {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
        with safe_open(folder / "model.safetensors", "numpy") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
        other = [name for name, shape in found.items() if wanted.get(name, shape) != shape]
        if other:
            raise NotLoadable(f"tensors whose shape differs from the configuration: {other}")
        model, info = model_class.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=attention_of(model_class.__name__),
            output_loading_info=True,
        )
        if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
            raise NotLoadable(f"tensors differ from the configuration: {info}")
        return model.eval()

    def _generate(self, folder: Path, digest: str) -> tuple[np.ndarray, np.ndarray]:
        """Return prompt and greedy tokens of transformers [B, T], and its logits [B, T, V]."""
        config = vars(self.model_class.config_class.from_pretrained(folder)) | {"_name_or_path": ""}
        key = (repr(sorted(config.items())), digest)
        if key not in self.expected:
            try:
                self.expected[key] = self._generate_with(self._load(folder, self.model_class))
            except Exception as error:
                self.expected[key] = error
        if isinstance(result := self.expected[key], Exception):
            raise result
        return result

    def _generate_with(self, model: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.tokens
        for _ in range(GREEDY):
            following = _library_logits(model, tokens)[:, -1].argmax(-1)
            tokens = np.concatenate([tokens, following[:, None].astype(np.int32)], axis=1)
        logits = _library_logits(model, tokens)
        if not np.isfinite(logits).all():
            raise NotLoadable("logits are not finite")
        return tokens, logits

    def _run_native(self, plan: ImportPlan, tokens: np.ndarray, digest: str) -> np.ndarray:
        key = (repr(plan.config), digest, tokens.tobytes())
        if key not in self.native:
            with jax.disable_jit():  # a compilation takes longer than thousands of such operations
                self.native[key] = run_native(plan.config, plan.values, tokens)
        return self.native[key]

    def _check_export(
        self, plan: ImportPlan, source: Path, tokens: np.ndarray, expected: np.ndarray, digest: str
    ) -> str:
        """Return a description of the exported model's problem, "" without one."""
        key = (repr(plan.config), digest)
        if key not in self.exports:
            self.exports[key] = self._export(plan, source, tokens, expected)
        problem, table = self.exports[key]
        if problem:
            return problem
        config_class = self._exported_class().config_class
        whole = json.loads((source / "config.json").read_text())
        folder = self.folder / "exported"
        (folder / "config.json").write_text(json.dumps(table))
        write_text_files(folder, read_text_files(source, whole))
        before = config_class(**(whole[self.part] if self.part else whole)).to_dict()
        after = config_class.from_pretrained(folder).to_dict()
        without_effect = KEYS_WITHOUT_EFFECT - set(SPECIAL_IDS) | NO_EFFECT_OF.get(self.kind, set())
        keys = {*list_fields(self.kind), *recorded_classes()[self.exported_kind]["computed"]}
        keys = (keys | (set(SPECIAL_IDS) & whole.keys())) - without_effect
        keys -= {"tie_word_embeddings"} if self.part else set()  # tied if the whole configuration or its part says so
        return compare_configs(self.exported_kind, plan.config, keys, before, after)

    def _exported_class(self) -> Any:
        import transformers

        return getattr(transformers, FAMILIES[self.exported_kind].architecture)

    def _export(
        self, plan: ImportPlan, source: Path, tokens: np.ndarray, expected: np.ndarray
    ) -> tuple[str, dict[str, Any]]:
        """Export a model. Return a description of a problem of its logits, "" without one, and its config.json."""
        kind, table = find_family(plan.config, self.exported_kind)
        if kind != self.exported_kind:
            return f"exported as {kind}", table
        folder = self.folder / "exported"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        packed = pack_tensors(plan.config, plan.values, FAMILIES[kind])
        values = {name: each.read_slice(0, 0, each.shape[0]) for name, each in packed.items()}
        save_file({name: np.ascontiguousarray(each) for name, each in values.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(table))
        write_text_files(folder, read_text_files(source, json.loads((source / "config.json").read_text())))
        model = self._load(folder, self._exported_class())
        difference = float(np.abs(_library_logits(model, tokens) - expected).max())
        scale = max(1.0, float(np.abs(expected).max()))
        return (f"logits differ by {difference:.2g}" if difference > TOLERANCE * scale else ""), table


def _library_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of a transformers model; an encoder reads the tokens of make_encoder_tokens."""
    return compute_logits(model, tokens, make_encoder_tokens(tokens) if model.config.is_encoder_decoder else None)


if __name__ == "__main__":
    sys.exit(run_command(main))
