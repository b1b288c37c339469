# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables of scripts/import_config.py: the treatment of every key of the configurations of other programs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GPT2 = "gpt2"  # folder with vocab.json and merges.txt of GPT-2
DANGER = "DANGEROUS because "


def keep(value: Any) -> Any:
    """Return the value unchanged."""
    return value


class Rule(NamedTuple):
    """Treatment of a key: the field that gets its value, if any, and a note for the user."""

    field: str
    note: str
    cast: Callable[[Any], Any] = keep


def use(field: str, note: str = "", cast: Callable[[Any], Any] = keep) -> Rule:
    """Set a field to the value."""
    return Rule(field, note, cast)


def uses(section: str, **fields: str) -> dict[str, Rule]:
    """Set fields of one section to the values of the keys that the keywords name."""
    return {key: Rule(f"{section}.{field}", "") for key, field in fields.items()}


def part(field: str, note: str = "") -> Rule:
    """Compute a field from this value and others."""
    return Rule("", f"used as part of {field}" + (f"; {note}" if note else ""))


def ignore(reason: str, *keys: str) -> dict[str, Rule]:
    """Ignore keys without effect here; `reason` completes "ignored because"."""
    return dict.fromkeys(keys, Rule("", f"ignored because {reason}"))


def danger(reason: str, field: str = "", cast: Callable[[Any], Any] = keep) -> Rule:
    """Warn the user that the key has another meaning here, or none; `reason` completes "DANGEROUS because"."""
    return Rule(field, DANGER + reason, cast)


def remat(flag: Any) -> str:
    """Return the value of model.remat for a flag that enables activation checkpointing."""
    return "full" if flag else "none"


GRAD_ACCUM = danger(
    "it multiplied the batch size; here it divides train.batch_size, the size of the whole batch",
    "train.grad_accum_steps",
)
MESH = "the model's function and its checkpoints no longer depend on it, so it can be changed"
DECAY = "multiplied by the learning rate and applied to matrices only, as in the old program"
MTJ = {
    **uses("model", layers="n_layers", d_model="d_model", n_heads="n_heads", n_vocab="n_vocab"),
    **uses("optimizer", warmup_steps="warmup_steps", lr="learning_rate", end_lr="end_learning_rate"),
    **uses("train", total_steps="steps", val_every="evaluate_every"),
    **uses("track", wandb_project="wandb_project"),
    "norm": part("model.norm"),
    "pe": part("model.positions"),
    "pe_rotary_dims": use("model.rope_dims"),
    "seq": danger("it trained on the length of the records (2,049 IDs); here the data is split into sequences of this length",
                  "model.seq_len"),
    "cores_per_replica": use("mesh.tensor", MESH),
    "per_replica_batch": part("train.batch_size"),
    "tpu_size": danger("device_train used the number of devices present instead, which changed the batch size; here "
                       "train.batch_size does not depend on the number of devices"),
    "gradient_accumulation_steps": GRAD_ACCUM,
    "anneal_steps": use("optimizer.decay_steps", 'with optimizer.schedule = "gptj", which has the same formula'),
    "weight_decay": use("optimizer.weight_decay", DECAY),
    "model_dir": use("run.dir", cast=lambda value: f"runs/{value}"),
    "train_set": use("data.train.train.path", "an index of TFRecords can be used unchanged", lambda value: f"data/{value}"),
    "val_set": part("data.validation"),
    "val_batches": part("train.evaluate_batches", "the number of sequences is the same, in batches of train.batch_size"),
    "ckpt_every": use("checkpoint.every"),
    "keep_every": danger("device_train read and ignored it; here these checkpoints are never deleted and use disk space",
                         "checkpoint.keep_every"),
    "early_cast": danger("its presence, even with the value false, made all weights bfloat16; here they are float32"),
    **ignore("runs are stored in run.dir", "bucket"),
    **ignore("a run has the name of its folder, run.dir", "name"),
    **ignore("evaluation tasks are set in the [evaluate] section", "eval_harness_tasks"),
    **ignore("train.log_grad_noise_scale = true measures it with its own averaging", "noise_scale_alpha"),
    **ignore("it was never read", "comment", "d_head", "early_collect", "bf16_optimizer", "eval_only", "gen_length"),
    **ignore("only train.py read it", "val_batch_multiplier"),
}  # fmt: skip
MTJ_REQUIRED = [
    "layers", "d_model", "n_heads", "n_vocab", "norm", "pe", "seq", "cores_per_replica", "per_replica_batch",
    "warmup_steps", "anneal_steps", "lr", "end_lr", "weight_decay", "total_steps", "train_set",
]  # fmt: skip
MTJ_FIXED = {
    "(code) Adam": "used as optimizer.beta1 = 0.9, beta2 = 0.999, eps = 1e-8; the default of beta2 here is different",
    "(code) clip norm": "used as optimizer.clip_norm = 1.0; the old norm was in bfloat16 and counted some biases several times",
    "(code) z-loss": DANGER
    + "it applied to log Z minus the largest logit; train.z_loss = 1e-4 applies to log Z itself",
    "(code) biases": DANGER
    + "the biases of embedding and MLP output had cores_per_replica times the learning rate; here all have the same",
    "(code) precision": DANGER
    + "microbatch gradients were summed in bfloat16, here in float32; activations are float32 in both, and "
    'model.dtype = "bfloat16" is faster',
    "(code) order": "used as data.shuffle = false; the text is split into sequences of seq_len tokens, not by record",
    "(code) tokenizer": f'used as data.tokenizer = "{GPT2}", a folder with vocab.json and merges.txt of GPT-2',
    "(code) seed 42": "ignored because the initial weights depended on cores_per_replica; here they depend on run.seed",
}
MTJ_MODEL: dict[str, Any] = dict(
    residual="parallel", qkv_bias=False, attention_out_bias=False, head_bias=True, tied_embeddings=False, init="gptj",
    remat="full",
)  # fmt: skip
UNSUPPORTED = danger("this feature is not supported; if it was enabled, the translated model computes another function")
NEO = {
    **uses("model", n_layer="n_layers", n_embd="d_model", n_head="n_heads", n_ctx="seq_len", n_vocab="n_vocab",
           local_attention_radius="attention_window"),
    **uses("optimizer", lr="learning_rate", warmup_steps="warmup_steps", beta1="beta1", beta2="beta2", epsilon="eps"),
    **uses("train", train_batch_size="batch_size", train_steps="steps"),
    **uses("checkpoint", steps_per_checkpoint="every"),
    "attention_types": part("model.attention_pattern"),
    **dict.fromkeys(("embed_dropout", "attn_dropout", "res_dropout"), part("model.dropout", "there is one rate for all three")),
    "scale_by_depth": danger('it scaled by 1 / sqrt(layers); model.init = "gpt2" scales by 1 / sqrt(2 layers), as GPT-2 does'),
    "lr_decay": danger("its decay started at step 0, here after the warmup; both end at a tenth of the peak", "optimizer.schedule"),
    "lr_decay_end": part("optimizer.decay_steps"),
    "opt_name": danger("its Adam had no bias correction, and AdamW here has it; its Adafactor had no schedule", "optimizer.name",
                       lambda value: {"adam": "adamw"}.get(value.lower(), value.lower())),
    "weight_decay": use("optimizer.weight_decay", DECAY + ", except for the final norm"),
    "gradient_clipping": use("optimizer.clip_norm", cast=lambda value: value or 0.0),
    "eval_steps": use("train.evaluate_batches", "in batches of train.batch_size"),
    "recompute_grad": use("model.remat", cast=remat),
    "precision": danger("it applied to weights as well; here weights are float32", "model.dtype"),
    "datasets": danger("their paths are in other files; list the .tfrecords in data/NAME.index, one per line"),
    "model_path": use("run.dir", cast=lambda value: f"runs/{Path(value).name}"),
    **ignore("GPT-Neo read activation_fn instead, so every model had the tanh GELU, which is used here", "activation_function"),
    **ignore("microbatches do not change the result; set train.grad_accum_steps", "tokens_per_mb_per_replica"),
    **ignore("the function does not depend on the mesh; set mesh.fsdp and mesh.tensor", "mesh_shape", "layout"),
    **ignore("nothing here depends on it", "eval_batch_size", "predict_steps", "predict_batch_size", "iterations",
             "model", "eval_tasks", "ada_epsilon1", "ada_epsilon2"),
    **dict.fromkeys(("activation_fn", "scale_by_in", "axial_pos_emb", "rotary_emb", "mlp_glu", "scalenorm", "rezero", "num_mem_kv",
                     "macaron", "share_parameters", "no_weight_tie", "moe_layers", "mlm_training", "entmax_loss"), UNSUPPORTED),
}  # fmt: skip
NEO_REQUIRED = [
    "n_layer", "n_embd", "n_head", "n_ctx", "n_vocab", "attention_types", "lr", "lr_decay", "warmup_steps",
    "weight_decay", "train_batch_size", "train_steps", "datasets",
]  # fmt: skip
NEO_FIXED = {
    "(code) z-loss": "used as train.z_loss = 1e-4",
    "(code) scores": DANGER
    + 'their scale was part of the initial weights; model.attention_scale = "rsqrt_d_head" is for training '
    'from scratch, weights trained with GPT-Neo need "none"',
    "(code) tokenizer": MTJ_FIXED["(code) tokenizer"],
}

NEOX = {
    **uses("model", num_layers="n_layers", hidden_size="d_model", num_attention_heads="n_heads", seq_length="seq_len",
           norm="norm", rotary_emb_base="rope_theta"),
    **uses("optimizer", min_lr="end_learning_rate", weight_decay="weight_decay", gradient_clipping="clip_norm",
           lr_decay_style="schedule"),
    **uses("train", train_iters="steps", train_batch_size="batch_size", eval_interval="evaluate_every",
           eval_iters="evaluate_batches", log_interval="log_every"),
    **uses("checkpoint", checkpoint_factor="every", save_interval="every", keep_last_n_checkpoints="keep_last"),
    **uses("data.train.train", data_path="path") | uses("track", wandb_project="wandb_project") | uses("run", save="dir"),
    **dict.fromkeys(("layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon"), part("model.norm_eps")),
    "pos_emb": part("model.positions"),
    "rotary_pct": part("model.rope_dims"),
    "no_weight_tying": use("model.tied_embeddings", cast=lambda value: not value),
    "gpt_j_residual": part("model.residual", "GPT-NeoX has two norms where GPT-J has one"),
    "gpt_j_tied": part("model.residual"),
    "activation": part("model.activation"),
    "bias_gelu_fusion": part("model.activation", "the tanh approximation if fused, otherwise the exact GELU"),
    "attention_config": part("model.attention_pattern"),
    **dict.fromkeys(("init_method", "output_layer_init_method"), part("model.init")),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), part("model.dropout", "there is one rate for both")),
    "optimizer": part("optimizer"),
    "lr_decay_iters": part("optimizer.decay_steps"),
    "warmup": part("optimizer.warmup_steps", "converted from a fraction of lr_decay_iters to a number of steps"),
    "train_micro_batch_size_per_gpu": part("train.batch_size"),
    "gradient_accumulation_steps": GRAD_ACCUM,
    "model_parallel_size": use("mesh.tensor", MESH),
    "checkpoint_activations": use("model.remat", cast=remat),
    **dict.fromkeys(("fp16", "bf16", "precision"), danger("float16 and loss scaling are not supported; see model.dtype")),
    "split": danger("it split a file by position, which is not supported; set data.validation.NAME.path to other data"),
    "tensorboard_dir": use("track.tensorboard", cast=bool),
    **dict.fromkeys(("vocab_file", "merge_file", "tokenizer_type"), part("data.tokenizer")),
    "make_vocab_size_divisible_by": part("model.n_vocab", "padded in the same way"),
    **ignore("mesh.fsdp shards layers, gradients and moments", "pipe_parallel_size", "zero_optimization"),
    **ignore("model.seq_len is the number of positions", "max_position_embeddings"),
    **ignore("nothing here depends on it", "load", "log_dir", "hostfile", "launcher", "num_nodes", "num_gpus",
             "steps_per_print", "data_impl", "wall_clock_breakdown", "output_layer_parallelism",
             "scaled_upper_triang_masked_softmax_fusion", "partition_activations", "scaled_masked_softmax_fusion",
             "checkpoint_num_layers", "synchronize_each_layer", "distributed_backend"),
}  # fmt: skip
NEOX_REQUIRED = [
    "num_layers", "hidden_size", "num_attention_heads", "seq_length", "pos_emb", "optimizer", "train_iters",
    "weight_decay", "hidden_dropout", "attention_dropout",
]  # fmt: skip
NEOX_POSITIONS = {"learned": "learned", "rotary": "rope-half", "alibi": "alibi", "none": "none", "rpe": "t5"}
