# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Translate a configuration of mesh-transformer-jax (JSON), GPT-Neo (JSON) or GPT-NeoX (YAML) to TOML.

The TOML is printed to stdout (or written to --output). A table on stderr lists the treatment of every key, which keys have
a different meaning here (DANGEROUS) and which are unknown (UNKNOWN), the effective batch and the final learning rate.
Several OLD files form one configuration.

examples:
  python scripts/import_config.py 6B_roto_256.json --output gptj.toml
      the run of GPT-J; train with: python device_train.py gptj.toml
  python scripts/import_config.py configs/20B.yml configs/local_setup.yml --devices 96
      the batch of GPT-NeoX depends on the number of devices, which its files do not contain

exit status: 0 done, 1 failed, 2 wrong usage, or keys that are missing or cannot be used
"""

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mesh_transformer.scripts import import_config_tables as keys

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError, config_to_toml, parse_config


class Import:
    """Translation of an old configuration: its keys, the table of the new configuration, and a note on every key."""

    def __init__(
        self, old: Mapping[str, Any], rules: Mapping[str, keys.Rule], required: list[str], fixed: Mapping[str, str]
    ):
        if missing := [key for key in required if key not in old]:
            raise ConfigError(
                f"these keys are missing: {', '.join(missing)}; add them, or pass the file that has them too"
            )
        self.old = old
        self.table: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        for key, value in old.items():
            rule = rules.get(key, keys.Rule("", "UNKNOWN: it has no counterpart here and was dropped"))
            self.notes[key] = "ignored because it is disabled" if rule == keys.UNSUPPORTED and not value else rule.note
            if rule.field:
                self.set(**{rule.field: rule.cast(value)})
                verb = "used as" if rule.field.rpartition(".")[2] == key else "renamed to"
                self.notes[key] = f"{verb} {rule.field}" + (f"; {rule.note}" if rule.note else "")
        self.notes |= fixed

    def set(self, **fields: Any) -> None:
        """Set values at dotted paths."""
        for path, value in fields.items():
            table = self.table
            for name in path.split(".")[:-1]:
                table = table.setdefault(name, {})
            table[path.rpartition(".")[2]] = value

    def update(self, section: str, **fields: Any) -> None:
        """Set values in a section."""
        self.set(**{f"{section}.{name}": value for name, value in fields.items()})

    def pattern(self, key: str, n_layers: int) -> list[str]:
        """Return the shortest repeating pattern of the attention kinds in a key, [[[kind, ...], times], ...]."""
        kinds = [kind for group, times in self.old.get(key, [[["global"], n_layers]]) for kind in group * times]
        if len(kinds) != n_layers or set(kinds) - {"global", "local"}:
            raise ConfigError(
                f'{key} = {self.old[key]} lists {len(kinds)} layers; it must list "global" or "local" for each of {n_layers} layers'
            )
        lengths = (n for n in range(1, n_layers + 1) if n_layers % n == 0)
        return next(kinds[:n] for n in lengths if kinds[:n] * (n_layers // n) == kinds)

    def count(self, key: str, default: int | None = None) -> int:
        """Return the value of a key, which must be a positive integer."""
        value = self.old.get(key, default)
        if value is None:
            raise ConfigError(f"{key} is missing; set it to a positive integer")
        if type(value) is not int or value < 1:
            raise ConfigError(f"{key} = {json.dumps(value)} must be a positive integer")
        return value


def _source_name(text: str) -> str:
    """Return the name of a data source, in which dots are not allowed."""
    return text.replace(".", "_")


def convert_mtj(new: Import, devices: int | None) -> None:
    """Set the fields that mesh-transformer-jax computes from several keys or hard-codes."""
    from mesh_transformer.convert.gptj.reader import NORMS, POSITIONS

    old = new.old
    count = new.count
    norm = str(old["norm"])
    pe = old["pe"]
    d_head = count("d_model") // count("n_heads")
    if pe not in POSITIONS or norm not in {*NORMS, "layernorm-desync"}:
        raise ConfigError(
            f"norm = {json.dumps(norm)} or pe = {json.dumps(pe)} is not supported; norm must be one of "
            f"{', '.join(NORMS)}, layernorm-desync, and pe one of {', '.join(POSITIONS)}"
        )
    kind, bias = NORMS.get(norm, NORMS["layernorm"])
    new.update("model", **keys.MTJ_MODEL, positions=POSITIONS[pe], norm=kind, norm_bias=bias)
    if norm == "layernorm-desync":
        new.notes["norm"] = (
            keys.DANGER
            + "each shard had a separate norm; here all shards share one norm, so the weights cannot be imported"
        )
    if pe == "rotary":
        dims = old.get("pe_rotary_dims", d_head)
        new.update("model", rope_dims=min(dims, d_head))
        if dims > d_head:
            new.notes["pe_rotary_dims"] = (
                keys.DANGER
                + f"it was clamped without a message to d_head = {d_head}; model.rope_dims is set to that value"
            )
    elif "pe_rotary_dims" in old:
        del new.table["model"]["rope_dims"]
        new.notes["pe_rotary_dims"] = "ignored because pe is not rotary"
    grad_accum_steps = count("gradient_accumulation_steps", 1)
    replicas, rest = divmod(devices or count("tpu_size"), count("cores_per_replica"))
    if rest or not replicas:
        given = f"--devices {devices}" if devices else f"tpu_size = {count('tpu_size')}"
        raise ConfigError(
            f"{given} is not a multiple of cores_per_replica = {count('cores_per_replica')}; set --devices to a multiple"
        )
    new.update(
        "train", batch_size=grad_accum_steps * count("per_replica_batch") * replicas, grad_accum_steps=grad_accum_steps
    )
    new.update("train", z_loss=1e-4, evaluate_batches=math.ceil(count("val_batches", 100) / grad_accum_steps))
    new.update("optimizer", schedule="gptj", beta1=0.9, beta2=0.999, eps=1e-8, clip_norm=1.0)
    new.update("checkpoint", keep_last=3)
    if old.get("ckpt_every") == 1:
        new.notes["ckpt_every"] = keys.DANGER + "1 meant that no checkpoint was saved; here it means every step"
    new.update("data", tokenizer=keys.GPT2, shuffle=False)
    sets = old.get("val_set", {})
    for name, index in (sets if isinstance(sets, dict) else {"validation": sets}).items():
        new.update("data", **{f"validation.{_source_name(name)}.path": f"data/{index}"})


def convert_neo(new: Import, devices: int | None) -> None:
    """Set the fields that GPT-Neo computes from several keys or hard-codes."""
    del devices
    old = new.old
    steps = new.count("train_steps")
    rates = {key: old.get(key, 0) or 0 for key in ("embed_dropout", "attn_dropout", "res_dropout")}
    new.update("model", attention_pattern=new.pattern("attention_types", new.count("n_layer")), qkv_bias=False)
    new.update("model", attention_scale="rsqrt_d_head", dropout=max(rates.values()))
    if len(set(rates.values())) > 1:
        note: str = keys.DANGER + "GPT-Neo had three rates, and model.dropout is one rate; the largest is used"
        new.notes |= dict.fromkeys(rates, note)
    decay = (old.get("lr_decay_end") or steps) - old["warmup_steps"]
    new.update("optimizer", end_learning_rate=old["lr"] / 10, decay_steps=decay)
    new.update("train", z_loss=1e-4)
    new.update("data", tokenizer=keys.GPT2)
    for entry in old["datasets"]:
        name, weight = (entry, 1.0) if isinstance(entry, str) else (entry[0], entry[3] if len(entry) > 3 else 1.0)
        new.update(
            "data",
            **{f"train.{_source_name(name)}.path": f"data/{name}.index", f"train.{_source_name(name)}.weight": weight},
        )


def convert_neox(new: Import, devices: int | None) -> None:
    """Set the fields that GPT-NeoX computes from several keys or sets by default."""
    old = new.old
    count = new.count
    adam = old["optimizer"].get("params", {})
    shards = count("model_parallel_size", 1)
    grad_accum_steps = count("gradient_accumulation_steps", 1)
    if "data_path" not in old and "train_data_paths" not in old:
        raise ConfigError("data_path and train_data_paths are both missing; add one of them")
    if "train_batch_size" not in old:
        if devices is None:
            raise ConfigError(
                "train_batch_size is missing, so the batch size depends on the number of GPUs of the run, which the files do not "
                "contain; pass it as --devices N"
            )
        stages = max(old.get("pipe_parallel_size", 1), 1)
        replicas, rest = divmod(devices, shards * stages)
        if rest or not replicas:
            raise ConfigError(
                f"--devices {devices} is not a multiple of model_parallel_size x pipe_parallel_size = {shards} x {stages}; pass "
                "the number of GPUs of the run"
            )
        new.update("train", batch_size=count("train_micro_batch_size_per_gpu") * grad_accum_steps * replicas)
    norm = old.get("norm", "layernorm")
    rope_dims = int(count("hidden_size") / count("num_attention_heads") * old.get("rotary_pct", 1))
    eps = {"rmsnorm": "rms_norm_epsilon"}.get(norm, f"{norm}_epsilon")
    residual = (
        "serial" if not old.get("gpt_j_residual") else "parallel" if old.get("gpt_j_tied") else "parallel-two-norms"
    )
    gelu = "gelu-tanh" if old.get("bias_gelu_fusion") else "gelu-erf"
    activation = old.get("activation", "gelu")
    own_init = (old.get("init_method"), old.get("output_layer_init_method")) == ("small_init", "wang_init")
    new.update(
        "model",
        positions=keys.NEOX_POSITIONS.get(old["pos_emb"], old["pos_emb"]),
        residual=residual,
        norm_eps=old.get(eps, 1e-5 if norm == "layernorm" else 1e-8),
        init="neox" if own_init else "gpt2",
        activation={"gelu": gelu, "swish": "silu"}.get(activation, activation),
        head_bias=False,
        attention_pattern=new.pattern("attention_config", count("num_layers")),
        dropout=max(old["hidden_dropout"], old["attention_dropout"]),
    )
    if old["pos_emb"] == "rotary":
        new.update("model", rope_dims=rope_dims)
    kinds = [old.get(key) for key in ("fp16", "bf16", "precision")]
    if any(kind.get("enabled", True) if isinstance(kind, dict) else kind not in (None, "fp32") for kind in kinds):
        new.update("model", dtype="bfloat16")
    if not own_init:
        new.notes["(model) init"] = (
            keys.DANGER + 'only small_init with wang_init is supported; model.init = "gpt2" is used'
        )
    kind = old["optimizer"].get("type", "adam").lower()
    decay = old.get("lr_decay_iters") or count("train_iters")
    warmup = int(old.get("warmup", 0.01) * decay)
    beta1, beta2 = adam.get("betas", (0.9, 0.999))
    new.update(
        "optimizer",
        name="adamw" if "adam" in kind else kind,
        learning_rate=adam.get("lr"),
        beta1=beta1,
        beta2=beta2,
        eps=adam.get("eps", 1e-8),
        warmup_steps=warmup,
        schedule=old.get("lr_decay_style", "linear"),
        end_learning_rate=old.get("min_lr", 0.0),
    )
    if old.get("lr_decay_style", "linear") != "constant":
        new.update("optimizer", decay_steps=decay - warmup)
    own = old.get("tokenizer_type", "GPT2BPETokenizer") == "HFTokenizer"
    multiple = old.get("make_vocab_size_divisible_by", 128) * shards
    new.update("model", n_vocab=-(-(50277 if own else 50257) // multiple) * multiple)
    new.update("data", tokenizer=old.get("vocab_file", "20B_tokenizer.json") if own else keys.GPT2)
    new.notes["(model) n_vocab"] = (
        keys.DANGER + f"it came from the tokenizer; the tokenizer of {'GPT-NeoX-20B' if own else 'GPT-2'} is assumed"
    )
    for side, section in (("train", "train"), ("valid", "validation")):
        paths = old.get(f"{side}_data_paths") or []
        for i, (path, weight) in enumerate(
            zip(paths, old.get(f"{side}_data_weights") or [1.0] * len(paths), strict=True)
        ):
            new.update("data", **{f"{section}.{side}{i}.path": path, f"{section}.{side}{i}.weight": weight})


FORMATS = {
    "mesh-transformer-jax": (keys.MTJ, keys.MTJ_REQUIRED, keys.MTJ_FIXED, convert_mtj),
    "GPT-Neo": (keys.NEO, keys.NEO_REQUIRED, keys.NEO_FIXED, convert_neo),
    "GPT-NeoX": (keys.NEOX, keys.NEOX_REQUIRED, {}, convert_neox),
}


class _Yaml(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if duplicates := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ConfigError(f"the key {duplicates[0]} occurs twice; remove one of them")
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None"), ["N"])


def read_old(paths: list[Path]) -> dict[str, Any]:
    """Return the keys of all files, with "-" replaced by "_".

    JSON and the files of GPT-NeoX, which have comments, trailing commas and constants, are read as YAML.
    """
    old: dict[str, Any] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8").replace("\t", " ")  # JSON allows tabs as indentation, YAML does not
        try:
            table = _Yaml(text).get_single_data()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise ConfigError(
                f"{where}: neither JSON nor YAML ({getattr(error, 'problem', error)}); correct the syntax"
            ) from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: expected a mapping of keys to values at the top level, but it is a {type(table).__name__}"
            )
        new = [(str(key).replace("-", "_"), value) for key, value in table.items()]
        keys_so_far = [*old, *(key for key, _ in new)]
        if duplicates := [key for n, key in enumerate(keys_so_far) if key in keys_so_far[:n]]:
            raise ConfigError(
                f"{path}: the key {duplicates[0]} occurs twice, in this file or an earlier one; remove one of them"
            )
        old |= dict(new)
    return old


def import_config(paths: list[Path], devices: int | None = None) -> tuple[str, str]:
    """Return the TOML, and a table of the treatment of every key."""
    where, old = str(paths[0]), read_old(paths)
    name = max(FORMATS, key=lambda name: len(FORMATS[name][0].keys() & old.keys()))
    rules, required, fixed, convert = FORMATS[name]
    if len(rules.keys() & old.keys()) < 3:
        raise ConfigError(
            f"{where}: not a configuration of {', '.join(FORMATS)}: fewer than 3 of its {len(old)} keys are known; "
            "pass another file"
        )
    try:
        new = Import(old, rules, required, fixed)
        convert(new, devices)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ConfigError(
            f"{where}: a value has a type that {name} does not allow ({error}); correct the value"
        ) from error
    config = parse_config(new.table, where=where, run_dir=f"runs/{paths[0].stem}")
    from mesh_transformer.train.schedule import make_schedule  # after the errors above, because it imports JAX

    tokens = config.train.batch_size * config.model.seq_len
    last = float(make_schedule(config.optimizer, config.train.steps)(config.train.steps - 1))
    shown = {key: json.dumps(old[key]) if key in old else "" for key in new.notes}
    lines = [f"{key:<{max(map(len, shown))}}  {value[:24]:<24}  {new.notes[key]}" for key, value in shown.items()]
    found = [sum(word in note for note in new.notes.values()) for word in ("DANGEROUS", "UNKNOWN")]
    lines += [f"{where} is a configuration of {name}; notes on its keys: {found[0]} DANGEROUS, {found[1]} UNKNOWN",
              f"batch: {config.train.batch_size:,} sequences of {config.model.seq_len:,}, {tokens:,} tokens per step; "
              f"{tokens * config.train.steps:,} tokens in {config.train.steps:,} steps",
              f"learning rate at the last step: {last:.6g}"]  # fmt: skip
    return config_to_toml(config, mark_changes=True), "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Parse the arguments, translate the configuration, print it."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "old", nargs="+", type=Path, metavar="OLD", help="configuration file; several files form one configuration"
    )
    parser.add_argument("--output", type=Path, metavar="NEW.toml", help="file to write the TOML to; default: stdout")
    parser.add_argument(
        "--devices", type=int, metavar="N", help="number of devices of the old run, if its files do not contain it"
    )
    options = parser.parse_args(arguments)
    if options.output and options.output.exists():
        raise ConfigError(f"--output {options.output}: the file exists; remove it, or choose another name")
    if options.devices is not None and options.devices < 1:
        raise ConfigError(f"--devices {options.devices}: must be at least 1")
    toml, report = import_config(options.old, options.devices)
    print(report, file=sys.stderr)
    if not options.output:
        print(toml, end="")
        return 0
    partial = options.output.with_name(f"{options.output.name}.tmp-{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(toml)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
