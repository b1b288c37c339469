# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What becomes of every key of other programs' configurations; the tables of import_config.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GPT2 = "gpt2"  # a folder with GPT-2's vocab.json and merges.txt
DANGER = "DANGEROUS because "


class Rule(NamedTuple):
    """What becomes of a key: the field it is written to, if it is, and what to say of it."""

    field: str
    why: str
    cast: Callable[[Any], Any] = lambda value: value


def use(field: str, why: str = "", cast: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The value goes to a field of ours."""
    return Rule(field, why, cast)


def uses(section: str, **fields: str) -> dict[str, Rule]:
    """Values that go to fields of one section, their keys as keywords."""
    return {key: Rule(f"{section}.{field}", "") for key, field in fields.items()}


def part(field: str, why: str = "") -> Rule:
    """A field of ours is computed from this value and others."""
    return Rule("", f"used as part of {field}" + (f"; {why}" if why else ""))


def ignore(why: str, *keys: str) -> dict[str, Rule]:
    """Nothing of ours depends on these keys."""
    return dict.fromkeys(keys, Rule("", f"ignored because {why}"))


def danger(why: str, field: str = "", cast: Callable[[Any], Any] = lambda value: value) -> Rule:
    """It means something else here, or nothing; a person has to look."""
    return Rule(field, DANGER + why, cast)


def remat(flag: Any) -> str:
    """Our word for recomputing activations."""
    return "full" if flag else "none"


ACCUMULATION = danger("there it multiplied the batch; here train.batch_size is the whole batch and this only cuts it",
                      "train.grad_accum_steps")  # fmt: skip
MESH = "not part of the function or of checkpoints any more: change it freely"
SAME_LR = "multiplied by the learning rate, on matrices only, as there"
ORIGINAL = {
    **uses("model", layers="n_layers", d_model="d_model", n_heads="n_heads", n_vocab="n_vocab"),
    **uses("optimizer", warmup_steps="warmup_steps", lr="learning_rate", end_lr="end_learning_rate"),
    **uses("train", total_steps="steps", val_every="evaluate_every"),
    **uses("track", wandb_project="wandb_project"),
    "norm": part("model.norm"),
    "pe": part("model.positions"),
    "pe_rotary_dims": use("model.rope_dims"),
    "seq": danger("it trained on the length of the records (2,049 ids); here this is what the data is cut to",
                  "model.seq_len"),
    "cores_per_replica": use("mesh.tensor", MESH),
    "per_replica_batch": part("train.batch_size"),
    "tpu_size": danger("device_train took the number of devices it found instead, and the batch with it; here "
                       "train.batch_size is the same on any number of them"),
    "gradient_accumulation_steps": ACCUMULATION,
    "anneal_steps": use("optimizer.decay_steps", 'with optimizer.schedule = "gptj", its own formula'),
    "weight_decay": use("optimizer.weight_decay", SAME_LR),
    "model_dir": use("run.dir", cast=lambda value: f"runs/{value}"),
    "train_set": use("data.train.train.path", "an index of TFRecords is read as it is", lambda value: f"data/{value}"),
    "val_set": part("data.validation"),
    "val_batches": part("train.evaluate_batches", "as many sequences, in batches of train.batch_size"),
    "ckpt_every": use("checkpoint.every"),
    "keep_every": danger("device_train read and ignored it; here these checkpoints stay for ever and take disk",
                         "checkpoint.keep_every"),
    "early_cast": danger("its presence alone, even as false, made all weights bfloat16; here they are float32"),
    **ignore("runs live in run.dir on this machine", "bucket"),
    **ignore("a run is named by its folder, run.dir", "name"),
    **ignore("there is no evaluation harness yet", "eval_harness_tasks"),
    **ignore("train.log_grad_noise_scale = true measures it, with averages of its own", "noise_scale_alpha"),
    **ignore("version 1 did not read it", "comment", "d_head", "early_collect", "bf16_optimizer", "eval_only", "gen_length"),
    **ignore("only train.py read it", "val_batch_multiplier"),
}  # fmt: skip
ORIGINAL_REQUIRED = [
    "layers", "d_model", "n_heads", "n_vocab", "norm", "pe", "seq", "cores_per_replica", "per_replica_batch",
    "warmup_steps", "anneal_steps", "lr", "end_lr", "weight_decay", "total_steps", "train_set",
]  # fmt: skip
ORIGINAL_FIXED = {
    "(code) Adam": "used as optimizer.beta1 = 0.9, beta2 = 0.999, eps = 1e-8; our own default of beta2 is another",
    "(code) clip norm": "used as optimizer.clip_norm = 1.0; there the norm was in bfloat16 and counted some biases often",
    "(code) z-loss": DANGER + "it was on log Z less the largest logit; train.z_loss = 1e-4 is on log Z itself",
    "(code) biases": DANGER + "those of embedding and MLP output learned cores_per_replica times as fast; not here",
    "(code) precision": DANGER
    + "it summed microbatches in bfloat16, we in float32; activations are float32 in both, and "
    'model.dtype = "bfloat16" is faster',
    "(code) order": "used as data.shuffle = false; sequences of seq_len are cut anew, not one from each record",
    "(code) tokenizer": f'used as data.tokenizer = "{GPT2}", a folder with GPT-2\'s vocab.json and merges.txt',
    "(code) seed 42": "ignored because its first weights depended on cores_per_replica; ours follow from run.seed",
}
ORIGINAL_MODEL: dict[str, Any] = dict(
    residual="parallel", qkv_bias=False, attention_out_bias=False, head_bias=True, tied_embeddings=False, init="gptj",
    remat="full",
)  # fmt: skip
NO_EQUAL = danger("no model of ours has it; ours is another model where it is on")
NEO = {
    **uses("model", n_layer="n_layers", n_embd="d_model", n_head="n_heads", n_ctx="seq_len", n_vocab="n_vocab",
           local_attention_radius="attention_window"),
    **uses("optimizer", lr="learning_rate", warmup_steps="warmup_steps", beta1="beta1", beta2="beta2", epsilon="eps"),
    **uses("train", train_batch_size="batch_size", train_steps="steps"),
    **uses("checkpoint", steps_per_checkpoint="every"),
    "attention_types": part("model.attention_pattern"),
    **dict.fromkeys(("embed_dropout", "attn_dropout", "res_dropout"), part("model.dropout", "one rate for all three")),
    "scale_by_depth": danger('it scaled by 1 / sqrt(layers); model.init = "gpt2" by 1 / sqrt(2 layers), as GPT-2 did'),
    "lr_decay": danger("its curve began at step 0, ours begins after the warm-up; both end at a tenth", "optimizer.schedule"),
    "lr_decay_end": part("optimizer.decay_steps"),
    "opt_name": danger("its Adam did not correct its moments' bias, ours does; its Adafactor had no schedule", "optimizer.name",
                       lambda value: {"adam": "adamw"}.get(value.lower(), value.lower())),
    "weight_decay": use("optimizer.weight_decay", SAME_LR + ", but for its final norm"),
    "gradient_clipping": use("optimizer.clip_norm", cast=lambda value: value or 0.0),
    "eval_steps": use("train.evaluate_batches", "in batches of train.batch_size"),
    "recompute_grad": use("model.remat", cast=remat),
    "precision": danger("its weights were of this type as well; ours stay float32", "model.dtype"),
    "datasets": danger("their paths are in files of their own; list the .tfrecords in data/NAME.index, one per line"),
    "model_path": use("run.dir", cast=lambda value: f"runs/{Path(value).name}"),
    **ignore("it read activation_fn, so that every model had the tanh GELU, as here", "activation_function"),
    **ignore("microbatches do not change the result; set train.grad_accum_steps", "tokens_per_mb_per_replica"),
    **ignore("the mesh does not change the function; set mesh.fsdp and mesh.tensor", "mesh_shape", "layout"),
    **ignore("nothing here depends on it", "eval_batch_size", "predict_steps", "predict_batch_size", "iterations",
             "model", "eval_tasks", "ada_epsilon1", "ada_epsilon2"),
    **dict.fromkeys(("activation_fn", "scale_by_in", "axial_pos_emb", "rotary_emb", "mlp_glu", "scalenorm", "rezero", "num_mem_kv",
                     "macaron", "share_parameters", "no_weight_tie", "moe_layers", "mlm_training", "entmax_loss"), NO_EQUAL),
}  # fmt: skip
NEO_REQUIRED = [
    "n_layer", "n_embd", "n_head", "n_ctx", "n_vocab", "attention_types", "lr", "lr_decay", "warmup_steps",
    "weight_decay", "train_batch_size", "train_steps", "datasets",
]  # fmt: skip
NEO_FIXED = {
    "(code) z-loss": "used as train.z_loss = 1e-4",
    "(code) scores": DANGER
    + 'their scale was in the first weights; model.attention_scale = "rsqrt_d_head" is for training '
    'afresh, weights trained there need "none"',
    "(code) tokenizer": ORIGINAL_FIXED["(code) tokenizer"],
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
    "gpt_j_residual": part("model.residual", "with two norms, unlike GPT-J's"),
    "gpt_j_tied": part("model.residual"),
    "activation": part("model.activation"),
    "bias_gelu_fusion": part("model.activation", "fused it is the tanh form, else the exact one"),
    "attention_config": part("model.attention_pattern"),
    **dict.fromkeys(("init_method", "output_layer_init_method"), part("model.init")),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), part("model.dropout", "one rate for both")),
    "optimizer": part("optimizer"),
    "lr_decay_iters": part("optimizer.decay_steps"),
    "warmup": part("optimizer.warmup_steps", "a share of lr_decay_iters there, steps here"),
    "train_micro_batch_size_per_gpu": part("train.batch_size"),
    "gradient_accumulation_steps": ACCUMULATION,
    "model_parallel_size": use("mesh.tensor", MESH),
    "checkpoint_activations": use("model.remat", cast=remat),
    **dict.fromkeys(("fp16", "bf16", "precision"), danger("there is no loss scaling and no float16; see model.dtype")),
    "split": danger("it split a shard by position; documents of a shard cannot be split here: set data.validation.NAME.path"),
    "tensorboard_dir": use("track.tensorboard", cast=bool),
    **dict.fromkeys(("vocab_file", "merge_file", "tokenizer_type"), part("data.tokenizer")),
    "make_vocab_size_divisible_by": part("model.n_vocab", "padded as there"),
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
