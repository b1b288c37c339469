# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Read checkpoints of mesh-transformer-jax, format "v1" (the format of GPT-J); writer.py writes them.

    step_<N>/shard_<s>/<p>.npz    s = 0 .. shards - 1 (cores_per_replica), p = 0 .. 15

A shard is a list of unnamed leaves in 16 .npz files; if the number of leaves is not divisible by 16, the first files have one
leaf more. The leaves are: Adam's count, mu and nu, the count of the schedule (these four are absent from a "slim" checkpoint,
which has no optimizer state), the weights, the step. Members arr_<i>.npy are stored uncompressed, so each leaf is a range of
bytes. Weights are in the order of the sorted module names of mesh-transformer-jax, layer_10 before layer_2; `list_leaves`
returns this order. In the header of a member, the descr of bfloat16 is "<V2". The shards do not describe the model; its JSON
configuration does.
"""

import dataclasses
import json
import math
import re
import struct
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer.config import ModelConfig
from mesh_transformer.convert.huggingface.tensor_files import read_npz
from mesh_transformer.convert.import_plan import (
    PREFIX,
    ImportPlan,
    PlannedArray,
    WeightSpec,
    assemble,
    make_model_config,
    raise_problems,
)
from mesh_transformer.convert.layout_views import LayoutView, parse_pattern
from mesh_transformer.convert.lazy_arrays import AddBias, Concat, FileArray, InMemory, LazyArray, Sum, full_index
from mesh_transformer.storage.errors import CheckpointError
from mesh_transformer.storage.paths import AnyPath

NPZ_FILES = 16  # of each shard
READERS = 4  # .npz files whose headers are read concurrently
DTYPES = ("bfloat16", "float16", "float32")
# Adam's state in the arrays of a run. The moments have the names of their weights without "params/".
OPT_MU, OPT_NU = "opt_state/1/mu/", "opt_state/1/nu/"
OPT_COUNT, SCHEDULE_COUNT = "opt_state/1/count", "opt_state/3/count"
# Raised by zipfile and NumPy for damaged files.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
)

# Fields that are equal for all v1 models; the other fields come from the JSON configuration.
FIXED: dict[str, Any] = dict(
    norm_eps=1e-5,
    residual="parallel",
    activation="gelu-tanh",
    gated_ffn=False,
    attention_scale="rsqrt_d_head",
    qkv_bias=False,
    attention_out_bias=False,
    ff_bias=True,
    head_bias=True,
    tied_embeddings=False,
    qk_norm=False,
)
POSITIONS = {"rotary": "rope-interleaved", "fixed": "learned", "t5": "t5"}
# External name -> native name, and whether the norm has a bias.
NORMS = {
    "layernorm": ("layernorm", True), "layernorm-nobias": ("layernorm", False),
    "rmsnorm": ("gptj-rmsnorm", False), "rmsnorm-bias": ("gptj-rmsnorm", True),
    "scalenorm": ("gptj-scalenorm", False), "scalenorm-bias": ("gptj-scalenorm", True),
}  # fmt: skip
DESYNC = "is not supported: each shard has its own norm, so the function depends on the number of shards"


class LeafMapping(NamedTuple):
    """An external leaf and the native weight that it corresponds to."""

    external: str
    native: str | None  # None: added to another weight
    pattern: str  # layout in native axes; see layout_views.py
    # Combination of a leaf's shards: concatenation along this dimension, "sum", "mean", or "first" (only shard 0 is used)
    merge: int | str


class Leaf(NamedTuple):
    """A leaf of a layer, or a leaf outside the layers."""

    mapping: LeafMapping
    layer: int | None

    @property
    def name(self) -> str:
        """Return the external name, with the layer."""
        return self.mapping.external if self.layer is None else f"layer_{self.layer}/{self.mapping.external}"


POSITION = LeafMapping("embedding_shard/pos_embs", "w_positions", "position embed", 1)
EMBEDDING_BIAS = LeafMapping("embedding_shard/linear/b", None, "embed", "sum")
EMBEDDING = LeafMapping("embedding_shard/linear/w", "w_tokens", "vocab embed", 0)
LAYER = (
    LeafMapping("linear/w", "attention/w_q", "embed (heads head_dim)", 1),
    LeafMapping("linear_1/w", "attention/w_v", "embed (kv_heads head_dim)", 1),  # values before keys
    LeafMapping("linear_2/w", "attention/w_k", "embed (kv_heads head_dim)", 1),
    LeafMapping("linear_3/w", "attention/w_o", "(heads head_dim) embed", 0),
    LeafMapping("linear_4/b", "feed_forward/b_in", "ff", 0),
    LeafMapping("linear_4/w", "feed_forward/w_in", "embed ff", 1),
    LeafMapping("linear_5/b", "feed_forward/b_out", "embed", "sum"),
    LeafMapping("linear_5/w", "feed_forward/w_out", "ff embed", 0),
)
HEAD = (
    LeafMapping("projection_shard/linear/b", "b_head", "vocab", 0),
    LeafMapping("projection_shard/linear/w", "w_head", "embed vocab", 1),
)
# The same buckets as in the native model: exact up to 15, then logarithmic up to 128.
RELATIVE = LeafMapping("relative_position_embs/rel_embedding", "relative_bias/table", "heads buckets", 0)


class Shards(NamedTuple):
    """The leaves of each shard, in order."""

    folder: AnyPath
    leaves: list[list[FileArray]]

    def __len__(self) -> int:
        return len(self.leaves)

    def at(self, position: int) -> list[FileArray]:
        """Return the leaf at one position of each shard."""
        return [shard[position] for shard in self.leaves]


def open_gptj(folder: AnyPath, external_config: Mapping[str, Any], where: str = "the configuration") -> ImportPlan:
    """Plan the import of a folder step_<N>: the weights, and Adam's state if the checkpoint has it.

    `where` names the configuration in messages. Raises CheckpointError with everything that is missing, damaged or does not
    match the configuration.
    """
    model = read_model(external_config, where)
    config = make_model_config(model, where)
    shards = _read_shards(folder)
    layers, has_optimizer = _count_layers(len(shards.leaves[0]), config, folder, where)
    if layers != config.n_layers:
        raise CheckpointError(
            f"{folder}: the shards have the leaves of {layers} layers, but {where} has layers = {config.n_layers}; pass the "
            "configuration of the training run with --source-config"
        )
    leaves = list_leaves(config)
    n = len(leaves)
    first = 2 + 2 * n if has_optimizer else 0  # position of the first weight
    starts = [first, 1, 1 + n] if has_optimizer else [first]  # of weights, mu and nu
    problems = [problem for start in starts for problem in _check_leaves(shards, start, leaves, config)]
    raise_problems(
        f"{folder} does not match {where}; pass the configuration of the training run with --source-config", problems
    )
    arrays = assemble(config, _make_find(shards, first, leaves), folder)
    if has_optimizer:
        for prefix, start in ((OPT_MU, 1), (OPT_NU, 1 + n)):
            moments = assemble(config, _make_find(shards, start, leaves, moments=True), folder)
            arrays |= {prefix + name.removeprefix(PREFIX): moment for name, moment in moments.items()}
        for name, position in ((OPT_COUNT, 0), (SCHEDULE_COUNT, 1 + 2 * n)):
            arrays[name] = PlannedArray(InMemory(np.array(_read_count(shards, position, name), np.int32)), ())
    step = _read_count(shards, -1, "step")
    notes = tuple(_list_notes(shards, step, config, has_optimizer=has_optimizer))
    return ImportPlan(config, model, arrays, step, "gpt2", notes)


def open_raw_weights(folder: AnyPath, external_config: Mapping[str, Any]) -> list[list[FileArray]]:
    """Return the weights of each shard in order, without Adam's state and counters, of a folder that `open_gptj` accepts."""
    n = len(list_leaves(make_model_config(read_model(external_config), folder)))
    return [shard[-1 - n : -1] for shard in _read_shards(folder).leaves]


def read_model(external: Mapping[str, Any], where: str = "the configuration") -> dict[str, Any]:
    """Return the native [model] of a JSON configuration.

    Raises CheckpointError with all keys that are missing, invalid or have no native equivalent.
    """
    size_keys = dict(n_layers="layers", d_model="d_model", n_heads="n_heads", n_vocab="n_vocab", seq_len="seq")
    problems = [f"{key} is missing" for key in (*size_keys.values(), "norm", "pe") if key not in external]
    for key in (*size_keys.values(), "pe_rotary_dims"):
        if key in external and (type(external[key]) is not int or external[key] <= 0):
            problems.append(f"{key} = {json.dumps(external[key])} is not a positive integer")
    norm, pe = external.get("norm"), external.get("pe")
    if "norm" in external and (not isinstance(norm, str) or norm not in NORMS):
        reason = DESYNC if norm == "layernorm-desync" else "is unknown"
        problems.append(f"norm = {json.dumps(norm)} {reason}; supported: {', '.join(NORMS)}")
    if "pe" in external and (not isinstance(pe, str) or pe not in POSITIONS):
        problems.append(f"pe = {json.dumps(pe)} is unknown; supported: {', '.join(POSITIONS)}")
    raise_problems(f"{where} cannot be imported", problems)
    model = {native: external[key] for native, key in size_keys.items()} | FIXED
    model |= dict(zip(("norm", "norm_bias"), NORMS[str(norm)], strict=True), positions=POSITIONS[str(pe)], init="gptj")
    if pe == "rotary":  # mesh-transformer-jax clamps pe_rotary_dims to d_head
        d_head = external["d_model"] // external["n_heads"]
        model["rope_dims"] = min(external.get("pe_rotary_dims", d_head), d_head)
    return model


def list_leaves(config: ModelConfig) -> list[Leaf]:
    """Return the weights of a shard in order."""
    before = [POSITION] if config.positions == "learned" else []
    after = [RELATIVE] if config.positions == "t5" else []
    layers = sorted(range(config.n_layers), key=lambda layer: f"layer_{layer}")
    per_layer = (*LAYER, *_list_norms("", "norm_1", config))
    head = (*HEAD, *_list_norms("projection_shard/", "norm_out", config))
    return [
        *(Leaf(mapping, None) for mapping in (*before, EMBEDDING_BIAS, EMBEDDING)),
        *(Leaf(mapping, layer) for layer in layers for mapping in per_layer),
        *(Leaf(mapping, None) for mapping in (*head, *after)),
    ]


def _list_norms(module: str, native: str, config: ModelConfig) -> list[LeafMapping]:
    """Return the leaves of a norm. The leaves of "layernorm-nobias" include an offset that is not used."""
    name, merge = ("replicated_layer_norm", "first") if config.norm == "layernorm" else ("rms_norm", "mean")
    pattern = "" if config.norm == "gptj-scalenorm" else "embed"
    leaves = {"offset": "bias", "scale": "scale"} if merge == "first" or config.norm_bias else {"scale": "scale"}
    return [
        LeafMapping(f"{module}{name}/{external}", f"{native}/{param}", pattern, merge)
        for external, param in leaves.items()
    ]


def _read_shards(folder: AnyPath) -> Shards:
    if (folder / "params").is_dir():
        raise CheckpointError(
            f'{folder} has the format "v2", in which the function of the weights depends on the mesh; only v1 can be imported'
        )
    numbers = {int(path.name[6:]) for path in folder.glob("shard_*") if re.fullmatch(r"shard_\d+", path.name)}
    if not numbers:
        steps = ", ".join(sorted(path.name for path in folder.glob("step_*"))) or "none"
        raise CheckpointError(
            f"{folder}: no folders shard_0, shard_1, ...; pass the folder of a step (step folders found here: {steps})"
        )
    problems = [f"shard_{s} is missing" for s in range(max(numbers)) if s not in numbers]
    shards: list[list[FileArray]] = []
    for shard in sorted(numbers):
        paths = [folder / f"shard_{shard}" / f"{i}.npz" for i in range(NPZ_FILES)]
        with ThreadPoolExecutor(READERS) as readers:
            results = list(readers.map(_try_read, paths))
        problems += [f"shard_{shard}/{i}.npz{result}" for i, result in enumerate(results) if isinstance(result, str)]
        files = [result for result in results if not isinstance(result, str)]
        shards.append([leaf for file in files for leaf in file])
        per_file, rest = divmod(len(shards[-1]), NPZ_FILES)
        uneven = [i for i, file in enumerate(files) if len(file) != per_file + (i < rest)]
        if uneven and len(files) == NPZ_FILES:
            i = uneven[0]
            problems.append(
                f"shard_{shard}/{i}.npz has {len(files[i])} of the {len(shards[-1])} leaves, but must have {per_file + (i < rest)}"
            )
    if not problems and len({len(shard) for shard in shards}) > 1:
        problems.append(f"shards have different numbers of leaves: {[len(shard) for shard in shards]}")
    raise_problems(f"{folder} is damaged or incomplete; copy or download it again", problems)
    return Shards(folder, shards)


def _try_read(path: AnyPath) -> list[FileArray] | str:
    """Return the arrays of an .npz file, or the damage that prevents it from being read."""
    try:
        return read_npz(path)
    except CheckpointError:  # not accessible, or not damaged but not supported
        raise
    except FileNotFoundError:
        return " is missing"
    except UNREADABLE as error:
        return f": {error}"


def _count_layers(n_leaves: int, config: ModelConfig, folder: AnyPath, where: str) -> tuple[int, bool]:
    """Return the number of layers, and whether Adam's state is present; both follow from the number of leaves."""
    leaves_of_1, leaves_of_2 = (
        len(list_leaves(dataclasses.replace(config, n_layers=n, attention_pattern=("global",)))) for n in (1, 2)
    )
    for has_optimizer, copies, counters in ((False, 1, 1), (True, 3, 3)):
        layers, rest = divmod(
            n_leaves - counters - copies * (2 * leaves_of_1 - leaves_of_2), copies * (leaves_of_2 - leaves_of_1)
        )
        if rest == 0 and layers > 0:
            return layers, has_optimizer
    raise CheckpointError(
        f"{folder}: each shard has {n_leaves} leaves, which is not the number of any model with these pe and norm, with or "
        f"without Adam's state; correct pe and norm in {where}"
    )


def _check_leaves(shards: Shards, first: int, leaves: Sequence[Leaf], config: ModelConfig) -> list[str]:
    """Return the problems with shapes and types of the weights, or moments, from position `first` on."""
    n = len(shards)
    rows = shards.leaves[0][first + leaves.index(Leaf(EMBEDDING, None))].shape[:1]
    if rows and 0 < rows[0] * n < config.n_vocab and config.n_vocab % rows[0] == 0:
        missing = f"shard_{n} to shard_{config.n_vocab // rows[0] - 1} are missing, or n_vocab is wrong"
        return [f"each of {n} shards has {rows[0]} of {config.n_vocab} token embeddings: {missing}"]
    if indivisible := indivisible_dims(config, n):
        return indivisible
    sizes = _axis_sizes(config)
    problems: list[str] = []
    for i, leaf in enumerate(leaves, first):
        dims = [math.prod(sizes[word] for word in group) for group in parse_pattern(leaf.mapping.pattern)]
        if isinstance(leaf.mapping.merge, int):
            dims[leaf.mapping.merge] //= n
        for s, array in enumerate(shards.at(i)):
            if array.shape != tuple(dims):
                problems.append(f"{leaf.name} (leaf {i}) of shard_{s} has shape {array.shape}, expected {tuple(dims)}")
    dtypes = sorted({str(a.dtype) for shard in shards.leaves for a in shard[first : first + len(leaves)]})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        problems.append(
            f"leaves {first} to {first + len(leaves) - 1} have the types {', '.join(dtypes)}, but must all have the same type, "
            f"one of {', '.join(DTYPES)}"
        )
    return problems


def _make_find(
    shards: Shards, first: int, leaves: Sequence[Leaf], *, moments: bool = False
) -> Callable[[WeightSpec], LazyArray]:
    """Return the `find` function for `assemble`, for weights or moments from position `first` on.

    Moments are not summed, because each shard received the same gradient.
    """
    positions = {(leaf.mapping.native, leaf.layer): i for i, leaf in enumerate(leaves)}

    def merge(position: int) -> LazyArray:
        arrays = shards.at(first + position)
        rule = leaves[position].mapping.merge
        if isinstance(rule, int):
            return Concat(arrays, rule)
        return Sum(arrays, mean=rule == "mean") if rule != "first" and not moments else arrays[0]

    def find(spec: WeightSpec) -> LazyArray:
        position = positions[spec.name, spec.layer]
        mapping = leaves[position].mapping
        base = merge(position)
        if mapping is EMBEDDING and not moments:
            base = AddBias(base, merge(positions[None, None]))
        return LayoutView(base, mapping.pattern, spec.axes, spec.shape, name=leaves[position].name)

    return find


def _read_count(shards: Shards, position: int, name: str) -> int:
    leaves = shards.at(position)
    for s, leaf in enumerate(leaves):
        if leaf.dtype.kind not in "iu" or math.prod(leaf.shape) != 1:
            given = f"{leaf.dtype}{list(leaf.shape)}"
            raise CheckpointError(
                f"{shards.folder}: {name} of shard_{s} is {given}, but must be one integer; copy the shard again"
            )
    values = [int(leaf.read(full_index(leaf)).reshape(())) for leaf in leaves]
    if len(set(values)) > 1:
        raise CheckpointError(
            f"{shards.folder}: {name} differs between shards: {values}; they are from different checkpoints, so copy all "
            "shards of one checkpoint"
        )
    return values[0]


def _list_notes(shards: Shards, step: int, config: ModelConfig, *, has_optimizer: bool) -> Iterator[str]:
    yield "the embedding bias is added to each row of w_tokens, which is therefore float32"
    yield f"the bias b_out is the float32 sum of the biases that each of the {len(shards)} shards adds"
    used = "from shard 0, the only ones that are used" if config.norm == "layernorm" else "the mean over all shards"
    yield f"the parameters of norms are {used}"
    if has_optimizer:
        yield "the moments of summed biases are from shard 0, because each shard received the gradient of the sum"
        yield "the moments of w_tokens are the moments of the embedding matrix without its bias"
        yield (
            f"mesh-transformer-jax updates summed biases {len(shards)} times as fast as the learning rate; Mesh Transformer does "
            "not"
        )
        yield 'to continue the training, set optimizer.beta2 = 0.999 and optimizer.schedule = "gptj", as in mesh-transformer-jax'
    if shards.folder.name != f"step_{step}":
        yield f"the folder is named {shards.folder.name}, but the step stored in its arrays is {step}"


def _axis_sizes(config: ModelConfig) -> dict[str, int]:
    return dict(
        embed=config.d_model,
        heads=config.n_heads,
        kv_heads=config.n_heads,
        head_dim=config.head_dim,
        ff=config.ff_dim,
        vocab=config.n_vocab,
        position=config.seq_len,
        buckets=config.t5_buckets,
    )


def indivisible_dims(config: ModelConfig, shards: int) -> list[str]:
    """Return the reasons why a model cannot be divided into this number of shards."""
    if shards <= 0:
        return [f"the number of shards is {shards}, but must be positive"]
    sizes = dict(n_heads=config.n_heads, n_vocab=config.n_vocab, d_model=config.d_model)
    return [f"{key} = {size} is not a multiple of {shards} shards" for key, size in sizes.items() if size % shards]
