# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Differential test of imports: every field of every supported configuration class of transformers, varied one at a time.

A small random model is saved by transformers and imported. Each field is set to other values (in a model of that
configuration, and in the saved config.json) and to null, and is deleted. Then the logits of transformers and of the imported
model must be equal and give the same 16 greedy tokens, or the import must be refused with an error that names the key. Models
that transformers cannot load are not counted. Imported models are exported, loaded by transformers and compared again.

examples:
  python scripts/stress/differential.py
      all families
  python scripts/stress/differential.py --only qwen2 --only t5 --verbose
      two families, with a line for each cell
  python scripts/stress/differential.py --sample 20
      20 random cells of each family

The outcome of a cell (one value of one key) is equal, refused, not loadable, or a failure: silent (other logits), unnamed (the
error does not name the key), crash, or export.

exit status: 0 no failure, 1 a cell failed, 2 wrong usage
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.convert.huggingface.families import FAMILIES
from mesh_transformer.convert.huggingface.hf_config import KEYS_WITHOUT_EFFECT, NO_EFFECT_OF, recorded_classes
from mesh_transformer.convert.huggingface.reader import find_family, open_huggingface, pack_tensors
from mesh_transformer.convert.import_plan import ImportPlan
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
# Fields of which the default of the class, or the small size, is not supported.
CHOICES: dict[str, dict[str, Any]] = {"arcee": {"hidden_act": "silu"}, "roberta": {"pad_token_id": 1}}
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "quick_gelu", "relu2", "mish"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = dict(YARN, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
ROPE = [
    {"rope_type": "default", "rope_theta": 5e3}, {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0}, YARN, LLAMA3, dict(LLAMA3, rope_theta=5e3), {"rope_theta": 5e3},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, {},
]  # fmt: skip
LAYER_TYPES = [
    [first, second] for first in ("full_attention", "sliding_attention") for second in ("full_attention", "x")
]
VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn"), ACTIVATIONS
    ),
    "feed_forward_proj": ["relu", "gelu", "silu", "gated-gelu", "gated-silu", "gated-relu"],
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ROPE),
    "layer_types": [[each.replace("x", "sliding_attention") for each in types] for types in LAYER_TYPES],
    "attention_types": [[[["local"], 2]], [[["local"], 1], [["global"], 1]], [[["global"], 2]]],
    "attention_layers": [["local", "global"]],
    "eos_token_id": [5, [5, 6]],
    "router_dtype": ["bfloat16"],
}
# Keys that can occur in any config.json, even if the class does not have the field.
OTHER_KEYS: dict[str, list[Any]] = {
    "rope_theta": [5e3], "partial_rotary_factor": [0.5], "rotary_pct": [0.5], "rotary_emb_base": [5e3],
    "rope_scaling": ROPE, "attention_bias": [True], "mlp_bias": [True], "tie_word_embeddings": [True, False],
    "scale_decoder_outputs": [True, False], "head_dim": [4], "sliding_window": [3], "use_sliding_window": [True],
    "is_decoder": [True], "num_key_value_heads": [2, 4], "decoder_start_token_id": [3], "per_layer_config": [{}],
    "dense_act_fn": ["silu"], "is_gated_act": [True], "layer_types": VALUES["layer_types"],
}  # fmt: skip


class Cell(NamedTuple):
    """One change of one key."""

    key: str
    value: Any  # ABSENT: the key is deleted
    built: bool  # True: transformers builds a model with the value; False: config.json of the base model is edited


class NotLoadable(Exception):
    """Error for a model that transformers cannot load or run."""


def main(arguments: list[str]) -> int:
    """Run the cells and print a table."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "--only", action="append", choices=list_families(), help="family to test; repeatable; default: all"
    )
    parser.add_argument("--sample", type=int, help="number of random cells of each family; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample; default: %(default)s")
    parser.add_argument("--verbose", action="store_true", help="print a line for each cell")
    options = parser.parse_args(arguments)
    names = ("equal", "refused", "not loadable", *FAILURES)
    print("  ".join(f"{name:>12}" for name in ("family", *names)))
    failed = False
    for kind in options.only or list_families():
        outcomes = run_family(kind, options.sample, options.seed)
        counts = Counter(outcome for _, outcome, _ in outcomes)
        print("  ".join(f"{value:>12}" for value in (kind, *(counts[name] for name in names))), flush=True)
        for cell, outcome, detail in outcomes:
            if outcome in FAILURES or options.verbose:
                how = "built" if cell.built else "edited"
                print(f"    {outcome}: {cell.key} = {cell.value!r} ({how}): {detail}", flush=True)
        failed = failed or any(counts[name] for name in FAILURES)
    return 1 if failed else 0


def list_families() -> list[str]:
    """Return the families whose configuration class is recorded, which excludes multimodal families."""
    return [kind for kind in FAMILIES if kind in recorded_classes()]


def run_family(kind: str, sample: int | None = None, seed: int = 0) -> list[tuple[Cell, str, str]]:
    """Return (cell, outcome, detail) of each cell of a family."""
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    cells = list(list_cells(kind))
    if sample is not None and sample < len(cells):
        cells = random.Random(seed).sample(cells, sample)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about many of these configurations
        bench = Bench(kind, Path(folder))
        return [(cell, *bench.run(cell)) for cell in cells]


def list_cells(kind: str) -> Iterator[Cell]:
    """Yield all changes for a family."""
    fields = recorded_classes()[kind]["fields"]
    yield Cell("model_type", kind, built=False)  # the base model itself
    for key, (default, types) in fields.items():
        for value in VALUES.get(key) or other_values(SMALL.get(key, default), types):
            yield Cell(key, value, built=True)
            yield Cell(key, value, built=False)
        yield Cell(key, None, built=False)
        yield Cell(key, ABSENT, built=False)
    for key, values in OTHER_KEYS.items():
        if key not in fields:
            for value in values:
                yield Cell(key, value, built=False)


def other_values(value: Any, types: str) -> list[Any]:
    """Return legal values of a field besides `value`, given its JSON types."""
    kinds = types.split("|")
    if isinstance(value, bool) or "bool" in kinds:
        return [not value]
    if isinstance(value, float) or (value is None and "float" in kinds):
        return [1.5 * (value or 0.2), 0.5]
    if isinstance(value, int) or (value is None and "int" in kinds):
        return [2 * (value or 4), 1]
    return []


class Bench:
    """The base model of a family on disk, and comparisons of changed models with transformers."""

    def __init__(self, kind: str, folder: Path):
        import transformers

        self.kind = kind
        self.folder = folder
        self.model_class = getattr(transformers, FAMILIES[kind].architecture)
        fields = recorded_classes()[kind]["fields"]
        self.sizes = {key: value for key, value in SMALL.items() if key in fields} | CHOICES.get(kind, {})
        self.base = self._build({})
        self.base_folder = folder / "base"
        self.base.save_pretrained(self.base_folder)
        self.tokens = np.random.default_rng(0).integers(3, 90, (2, PROMPT), dtype=np.int32)
        self.native: dict[tuple[str, str], np.ndarray] = {}

    def run(self, cell: Cell) -> tuple[str, str]:
        """Return the outcome of a cell and a detail."""
        folder = self.folder / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            weights = self._save(cell, folder)
            tokens, expected = self._generate(folder)
        except Exception as error:
            return "not loadable", f"{type(error).__name__}: {str(error)[:100]}"
        try:
            plan = open_huggingface(folder)
            found = self._run_native(plan, tokens, weights)
        except CheckpointError as error:
            return "refused" if cell.key in str(error) else "unnamed", str(error)[-200:]
        except Exception as error:
            return "crash", f"{type(error).__name__}: {error}"
        difference = float(np.abs(found - expected).max())
        scale = max(1.0, float(np.abs(expected).max()))
        same = (found.argmax(-1) == expected.argmax(-1))[:, PROMPT - 1 : -1].all()
        if not same or not difference <= TOLERANCE * scale:
            return "silent", f"largest difference of logits {difference:.2g} of {scale:.2g}"
        problem = self._check_export(plan, folder, tokens, expected) if cell.built or cell.key == "model_type" else ""
        return ("export", problem) if problem else ("equal", f"{difference:.1e}")

    def _build(self, changes: dict[str, Any]) -> Any:
        """Return a transformers model with the base model's weights, or random weights if the tensors' shapes differ."""
        import torch

        config = self.model_class.config_class(**copy.deepcopy(self.sizes | changes), attn_implementation="eager")
        torch.manual_seed(0)
        model = self.model_class(config).eval().float()
        base = dict(self.base.state_dict()) if hasattr(self, "base") else {}
        same = {name: tensor.shape for name, tensor in base.items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        if same:
            model.load_state_dict(base)
            return model
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.7 / 32**0.5)
            parameter.data = noise + (1 if parameter.ndim == 1 else 0)
        return model

    def _save(self, cell: Cell, folder: Path) -> str:
        """Save the model of a cell and return a name for its weights."""
        if cell.built:
            model = self._build({cell.key: cell.value})
            model.save_pretrained(folder)
            return "base" if all(map(_equal, model.state_dict().items(), self.base.state_dict().items())) else str(cell)
        shutil.copytree(self.base_folder, folder)
        path = folder / "config.json"
        table = json.loads(path.read_text())
        table.pop(cell.key, None)
        path.write_text(json.dumps(table if cell.value == ABSENT else table | {cell.key: cell.value}))
        return "base"

    def _load(self, folder: Path) -> Any:
        """Return the transformers model of a folder; raise NotLoadable if tensors are missing, added or of another shape."""
        import torch

        config = self.model_class.config_class.from_pretrained(folder)
        with torch.device(
            "meta"
        ):  # a deleted size has the default of the class, so that the model would need gigabytes
            wanted = {name: list(tensor.shape) for name, tensor in self.model_class(config).state_dict().items()}
        with safe_open(folder / "model.safetensors", "numpy") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
        other = [name for name, shape in found.items() if wanted.get(name, shape) != shape]
        if other:
            raise NotLoadable(f"tensors whose shape differs from the configuration: {other}")
        model, info = self.model_class.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
            raise NotLoadable(f"tensors differ from the configuration: {info}")
        return model.eval()

    def _generate(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return prompt and greedy tokens of transformers [B, T], and its logits [B, T, V]."""
        model = self._load(folder)
        tokens = self.tokens
        for _ in range(GREEDY):
            following = _library_logits(model, tokens)[:, -1].argmax(-1)
            tokens = np.concatenate([tokens, following[:, None].astype(np.int32)], axis=1)
        logits = _library_logits(model, tokens)
        if not np.isfinite(logits).all():
            raise NotLoadable("logits are not finite")
        return tokens, logits

    def _run_native(self, plan: ImportPlan, tokens: np.ndarray, weights: str) -> np.ndarray:
        if weights != "base":
            return run_native(plan.config, plan.values, tokens)
        key = (repr(plan.config), tokens.tobytes().hex())
        if key not in self.native:
            self.native[key] = run_native(plan.config, plan.values, tokens)
        return self.native[key]

    def _check_export(self, plan: ImportPlan, source: Path, tokens: np.ndarray, expected: np.ndarray) -> str:
        """Return a description of the exported model's problem, "" without one."""
        kind, table = find_family(plan.config, self.kind)
        if kind != self.kind:
            return f"exported as {kind}"
        folder = self.folder / "exported"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        packed = pack_tensors(plan.config, plan.values, FAMILIES[kind])
        values = {name: each.read_slice(0, 0, each.shape[0]) for name, each in packed.items()}
        save_file({name: np.ascontiguousarray(each) for name, each in values.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(table))
        model = self._load(folder)
        difference = float(np.abs(_library_logits(model, tokens) - expected).max())
        if difference > TOLERANCE:
            return f"logits differ by {difference:.2g}"
        before = self.model_class.config_class.from_pretrained(source).to_dict()
        after = model.config.to_dict()
        ignored = (
            KEYS_WITHOUT_EFFECT | NO_EFFECT_OF.get(kind, set()) | {"dtype", "architectures", "transformers_version"}
        )
        changed = {key: after.get(key) for key in before.keys() - ignored if not key.startswith("_")}
        changed = {key: value for key, value in changed.items() if value != before[key]}
        changed = {key: value for key, value in changed.items() if (kind, key) not in EQUIVALENT | {("any", key)}}
        return f"keys differ: {changed}" if changed else ""


# Fields that have another value after an export, although the function is the same.
EQUIVALENT = {
    ("gpt2", "n_inner"),  # null means 4 n_embd, which is written
    ("gpt_neo", "intermediate_size"),
    ("gptj", "n_inner"),
    ("gpt_neo", "attention_types"),  # the same layers, in the shortest form
    ("qwen2", "max_window_layers"),  # without effect where layer_types is given or no window is in use
    ("qwen3", "max_window_layers"),
}


def _library_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of a transformers model; an encoder reads the tokens of make_encoder_tokens."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        if not model.config.is_encoder_decoder:
            return model(ids, use_cache=False).logits.numpy()
        encoder_ids = torch.tensor(make_encoder_tokens(tokens), dtype=torch.long)
        return model(input_ids=encoder_ids, decoder_input_ids=ids, use_cache=False).logits.numpy()


def _equal(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    return a[0] == b[0] and a[1].shape == b[1].shape and bool((a[1] == b[1]).all())


if __name__ == "__main__":
    sys.exit(run_command(main))
