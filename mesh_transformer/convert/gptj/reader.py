# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mesh-transformer-jax, "v1" (GPT-J's own); gptj_writer.py makes them.

    step_<N>/shard_<s>/<p>.npz    s = 0 .. shards - 1 (its cores_per_replica), p = 0 .. 15

Each shard is a list of leaves without names, cut into 16 pieces, the first ones longer by one leaf: Adam's count, mu and
nu, the schedule's count (a slim checkpoint lacks these), the weights, the step. Members arr_<i>.npy of a piece are stored
uncompressed, so that each leaf is a range of bytes. Weights come in the order of the sorted names of the program's
modules, layer_10 before layer_2; `list_slots` is that order. bfloat16 is descr "<V2". Only the configuration beside it,
a JSON file, says which model it is.
"""

import dataclasses
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
from mesh_transformer.convert.import_plan import PREFIX, Foreign, Leaf, assemble, make_model_config
from mesh_transformer.convert.lazy_arrays import (
    AddRow,
    Concat,
    FileArray,
    Held,
    Lazy,
    Sum,
    View,
    parse_pattern,
    whole,
)
from mesh_transformer.model.positions import T5_BUCKETS
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath

PIECES = 16
READERS = 4  # pieces opened at once
KINDS = ("bfloat16", "float16", "float32")
# Adam's state among the arrays of a run: moments lie here under the names of their weights, without "params/".
OPT_MU, OPT_NU = "opt_state/1/mu/", "opt_state/1/nu/"
OPT_COUNT, SCHEDULE_COUNT = "opt_state/1/count", "opt_state/3/count"
# What zipfile and numpy raise on bytes that are not theirs.
UNREADABLE = (
    OSError, EOFError, ValueError, NotImplementedError, SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile
)  # fmt: skip

# What every v1 model is; the rest is in its configuration.
FIXED: dict[str, Any] = dict(
    norm_eps=1e-5, residual="parallel", activation="gelu-tanh", gated_ffn=False, attention_scale="rsqrt_d_head",
    qkv_bias=False, attention_out_bias=False, ff_bias=True, head_bias=True, tied_embeddings=False, qk_norm=False,
)  # fmt: skip
POSITIONS = {"rotary": "rope-interleaved", "fixed": "learned", "t5": "t5"}
# Their name -> ours, and whether it has a bias.
NORMS = {
    "layernorm": ("layernorm", True), "layernorm-nobias": ("layernorm", False),
    "rmsnorm": ("gptj-rmsnorm", False), "rmsnorm-bias": ("gptj-rmsnorm", True),
    "scalenorm": ("gptj-scalenorm", False), "scalenorm-bias": ("gptj-scalenorm", True),
}  # fmt: skip
DESYNC = "has another norm in each shard: the function depends on their number"


class Entry(NamedTuple):
    """One leaf of theirs."""

    theirs: str
    ours: str | None  # None: folded into another array
    pattern: str  # its dims, in our words
    # shards side by side along this axis; "sum": each adds its own; "mean" is used; "first": only shard 0's is used
    merge: int | str


class Slot(NamedTuple):
    """A place in the order of leaves."""

    entry: Entry
    layer: int | None

    @property
    def name(self) -> str:
        """Theirs."""
        return self.entry.theirs if self.layer is None else f"layer_{self.layer}/{self.entry.theirs}"


POSITION = Entry("embedding_shard/pos_embs", "w_positions", "position embed", 1)
EMBEDDING_BIAS = Entry("embedding_shard/linear/b", None, "embed", "sum")
EMBEDDING = Entry("embedding_shard/linear/w", "w_tokens", "vocab embed", 0)
LAYER = (
    Entry("linear/w", "attention/w_q", "embed (heads head_dim)", 1),
    Entry("linear_1/w", "attention/w_v", "embed (kv_heads head_dim)", 1),  # values before keys
    Entry("linear_2/w", "attention/w_k", "embed (kv_heads head_dim)", 1),
    Entry("linear_3/w", "attention/w_o", "(heads head_dim) embed", 0),
    Entry("linear_4/b", "feed_forward/b_in", "ff", 0),
    Entry("linear_4/w", "feed_forward/w_in", "embed ff", 1),
    Entry("linear_5/b", "feed_forward/b_out", "embed", "sum"),
    Entry("linear_5/w", "feed_forward/w_out", "ff embed", 0),
)
HEAD = (
    Entry("projection_shard/linear/b", "b_head", "vocab", 0),
    Entry("projection_shard/linear/w", "w_head", "embed vocab", 1),
)
# Same buckets as ours: exact up to 15, then logarithmic up to 128.
RELATIVE = Entry("relative_position_embs/rel_embedding", "relative_bias/table", "heads buckets", 0)


def open_gptj(folder: AnyPath, old_config: Mapping[str, Any], where: str = "the configuration") -> Foreign:
    """The model in a folder step_<N>, and Adam's state where it is there; `where` names the configuration in errors.

    CheckpointError lists whatever is missing, damaged or does not fit the configuration.
    """
    model = read_model(old_config, where)
    config = make_model_config(model, where)
    shards = _read_shards(folder)
    layers, full = _count_layers(len(shards[0]), config, folder, where)
    if layers != config.n_layers:
        raise CheckpointError(
            f"{folder} holds {layers} layers, {where} says {config.n_layers}; give the configuration it was trained with"
        )
    slots = list_slots(config)
    n = len(slots)
    first = 2 + 2 * n if full else 0
    groups = [first, 1, 1 + n] if full else [first]
    problems = [problem for start in groups for problem in _check_leaves(shards, start, slots, config)]
    check_problems(f"{folder} does not fit {where}", problems)
    arrays = assemble(config, _make_find(shards, first, slots), folder)
    if full:
        for prefix, start in ((OPT_MU, 1), (OPT_NU, 1 + n)):
            moments = assemble(config, _make_find(shards, start, slots, moments=True), folder)
            arrays |= {prefix + name.removeprefix(PREFIX): moment for name, moment in moments.items()}
        for name, place in ((OPT_COUNT, 0), (SCHEDULE_COUNT, 1 + 2 * n)):
            arrays[name] = Held(np.array(_read_count(shards, place, name, folder), np.int32))
    step = _read_count(shards, -1, "step", folder)
    return Foreign(model, arrays, step, "gpt2", tuple(_make_notes(folder, len(shards), step, full, config)))


def find_weights(folder: AnyPath, old_config: Mapping[str, Any]) -> list[list[FileArray]]:
    """The weights of each shard in their order, without Adam's state and counters; see `open_gptj` for what is checked."""
    shards, n = _read_shards(folder), len(list_slots(make_model_config(read_model(old_config), folder)))
    return [shard[-1 - n : -1] for shard in shards]


def read_model(old: Mapping[str, Any], where: str = "the configuration") -> dict[str, Any]:
    """Our [model] for the program's JSON configuration; CheckpointError with all that is missing or has no equal here."""
    sizes = dict(n_layers="layers", d_model="d_model", n_heads="n_heads", n_vocab="n_vocab", seq_len="seq")
    problems = [f"{key} is missing" for key in (*sizes.values(), "norm", "pe") if key not in old]
    for key in (*sizes.values(), "pe_rotary_dims"):
        if key in old and (type(old[key]) is not int or old[key] <= 0):
            problems.append(f"{key} = {old[key]!r} is not a positive integer")
    norm, pe = old.get("norm"), old.get("pe")
    if "norm" in old and norm not in NORMS:
        reason = DESYNC if norm == "layernorm-desync" else "is unknown"
        problems.append(f"norm = {norm!r} {reason}; supported: {', '.join(NORMS)}")
    if "pe" in old and pe not in POSITIONS:
        problems.append(f"pe = {pe!r} is unknown; supported: {', '.join(POSITIONS)}")
    check_problems(f"{where} is not one that can be imported", problems)
    model = {ours: old[theirs] for ours, theirs in sizes.items()} | FIXED
    model |= dict(zip(("norm", "norm_bias"), NORMS[str(norm)], strict=True), positions=POSITIONS[str(pe)], init="gptj")
    if pe == "rotary":  # it clamps without a word
        d_head = old["d_model"] // old["n_heads"]
        model["rope_dims"] = min(old.get("pe_rotary_dims", d_head), d_head)
    return model


def list_slots(config: ModelConfig) -> list[Slot]:
    """The weights of a shard, in their order."""
    before = [POSITION] if config.positions == "learned" else []
    after = [RELATIVE] if config.positions == "t5" else []
    layers = sorted(range(config.n_layers), key=lambda layer: f"layer_{layer}")
    layer_entries = (*LAYER, *_list_norms("", "norm_1", config))
    head = (*HEAD, *_list_norms("projection_shard/", "norm_out", config))
    return [
        *(Slot(entry, None) for entry in (*before, EMBEDDING_BIAS, EMBEDDING)),
        *(Slot(entry, layer) for layer in layers for entry in layer_entries),
        *(Slot(entry, None) for entry in (*head, *after)),
    ]


def _list_norms(module: str, ours: str, config: ModelConfig) -> list[Entry]:
    """The leaves of a norm; "layernorm-nobias" has an offset, which it does not use."""
    name, how = ("replicated_layer_norm", "first") if config.norm == "layernorm" else ("rms_norm", "mean")
    pattern = "" if config.norm == "gptj-scalenorm" else "embed"
    leaves = {"offset": "bias", "scale": "scale"} if how == "first" or config.norm_bias else {"scale": "scale"}
    return [Entry(f"{module}{name}/{leaf}", f"{ours}/{own}", pattern, how) for leaf, own in leaves.items()]


def _read_shards(folder: AnyPath) -> list[list[FileArray]]:
    """The leaves of each shard, in order."""
    if (folder / "params").is_dir():
        raise CheckpointError(
            f'{folder} is of format "v2", whose weights are another function for each mesh; only v1 can be imported'
        )
    found = {int(path.name[6:]) for path in folder.glob("shard_*") if re.fullmatch(r"shard_\d+", path.name)}
    if not found:
        inner = ", ".join(sorted(path.name for path in folder.glob("step_*"))) or "none"
        raise CheckpointError(f"{folder}: no folders shard_0, shard_1 ... in it; name a step's folder (here: {inner})")
    problems = [f"shard_{s} is missing" for s in range(max(found)) if s not in found]
    shards: list[list[FileArray]] = []
    for shard in sorted(found):
        with ThreadPoolExecutor(READERS) as readers:
            found_pieces = readers.map(_try_piece, [folder / f"shard_{shard}" / f"{i}.npz" for i in range(PIECES)])
        pieces = []
        for i, piece in enumerate(found_pieces):
            if isinstance(piece, str):
                problems.append(f"shard_{shard}/{i}.npz{piece}")
            else:
                pieces.append(piece)
        shards.append([leaf for piece in pieces for leaf in piece])
        size, more = divmod(len(shards[-1]), PIECES)
        uneven = [i for i, piece in enumerate(pieces) if len(piece) != size + (i < more)]
        if uneven and len(pieces) == PIECES:
            problems.append(f"shard_{shard}: {len(shards[-1])} leaves are not cut evenly, at {uneven[0]}.npz")
    if not problems and len({len(shard) for shard in shards}) > 1:
        problems.append(f"shards have different numbers of leaves: {[len(shard) for shard in shards]}")
    check_problems(f"{folder} is damaged or not complete", problems)
    return shards


def _try_piece(path: AnyPath) -> list[FileArray] | str:
    """The arrays of a piece, or what is wrong with it."""
    try:
        return read_npz(path)
    except StorageError:
        raise
    except FileNotFoundError:
        return " is missing"
    except UNREADABLE as error:
        return f": {error}"


def _count_layers(leaves: int, config: ModelConfig, folder: AnyPath, where: str) -> tuple[int, bool]:
    """How many layers so many leaves are, and whether Adam's state is among them; no number can be both."""
    one, two = (len(list_slots(dataclasses.replace(config, n_layers=n, attention_pattern=("global",)))) for n in (1, 2))
    for full, copies, counters in ((False, 1, 1), (True, 3, 3)):
        layers, rest = divmod(leaves - counters - copies * (2 * one - two), copies * (two - one))
        if rest == 0 and layers > 0:
            return layers, full
    raise CheckpointError(
        f"{folder}: {leaves} leaves in each shard are no whole number of layers, with or without Adam's state; are pe "
        f"and norm those of {where}?"
    )


def _check_leaves(
    shards: Sequence[Sequence[FileArray]], first: int, slots: Sequence[Slot], config: ModelConfig
) -> list[str]:
    """What is wrong with shapes and types of the weights, or moments, from leaf `first` on."""
    n, rows = len(shards), shards[0][first + slots.index(Slot(EMBEDDING, None))].shape[:1]
    if rows and 0 < rows[0] * n < config.n_vocab and config.n_vocab % rows[0] == 0:
        missing = f"shard_{n} to shard_{config.n_vocab // rows[0] - 1} are missing, or n_vocab is another"
        return [f"{rows[0]} rows of {config.n_vocab} in each of {n} shards: {missing}"]
    if uneven := find_uneven(config, n):
        return uneven
    sizes = _sizes(config)
    problems = []
    for i, slot in enumerate(slots, first):
        shape = [math.prod(sizes[word] for word in group) for group in parse_pattern(slot.entry.pattern)]
        if isinstance(slot.entry.merge, int):
            shape[slot.entry.merge] //= n
        for s, shard in enumerate(shards):
            if shard[i].shape != tuple(shape):
                problems.append(f"{slot.name} (leaf {i}) of shard_{s} has shape {shard[i].shape}, not {tuple(shape)}")
    kinds = sorted({str(leaf.dtype) for shard in shards for leaf in shard[first : first + len(slots)]})
    if len(kinds) > 1 or kinds[0] not in KINDS:
        problems.append(
            f"leaves from {first} on are of type {', '.join(kinds)}; they must be one of {', '.join(KINDS)}"
        )
    return problems


def _make_find(
    shards: Sequence[Sequence[FileArray]], first: int, slots: Sequence[Slot], moments: bool = False
) -> Callable[[Leaf], Lazy]:
    """How an array of ours is put together; moments are not added up, as each shard saw the same gradient."""
    places = {(slot.entry.ours, slot.layer): i for i, slot in enumerate(slots)}

    def merge(place: int) -> Lazy:
        parts, how = [shard[first + place] for shard in shards], slots[place].entry.merge
        if isinstance(how, int):
            return Concat(parts, how)
        return Sum(parts, mean=how == "mean") if how != "first" and not moments else parts[0]

    def find(leaf: Leaf) -> Lazy:
        place = places[leaf.name, leaf.layer]
        base = merge(place)
        if slots[place].entry is EMBEDDING and not moments:
            base = AddRow(base, merge(places[None, None]))
        return View(base, slots[place].entry.pattern, leaf.axes, leaf.shape)

    return find


def _read_count(shards: Sequence[Sequence[FileArray]], place: int, name: str, folder: AnyPath) -> int:
    leaves = [shard[place] for shard in shards]
    if any(leaf.dtype.kind not in "iu" or math.prod(leaf.shape) != 1 for leaf in leaves):
        raise CheckpointError(f"{folder}: {name} is not an integer but {leaves[0].dtype}{list(leaves[0].shape)}")
    values = [int(leaf.read(whole(leaf)).reshape(())) for leaf in leaves]
    if len(set(values)) > 1:
        raise CheckpointError(f"{folder}: {name} differs between shards: {values}; they are not of one checkpoint")
    return values[0]


def _make_notes(folder: AnyPath, shards: int, step: int, full: bool, config: ModelConfig) -> Iterator[str]:
    yield "the embedding's bias, added to every token, is folded into w_tokens, which is float32 for that"
    yield f"the biases b_out, of which each of the {shards} shards added its own, are summed in float32"
    used = "those of shard 0, the only ones that were used" if config.norm == "layernorm" else "the mean of all shards'"
    yield f"norms are {used}"
    if full:
        yield "moments of summed biases are shard 0's: each shard saw the sum's gradient; w_tokens has its table's"
        yield f"the original moved summed biases {shards} times as far in a step as its learning rate says; here they are not"
        yield 'its Adam had optimizer.beta2 = 0.999 and its schedule is optimizer.schedule = "gptj"'
    if folder.name != f"step_{step}":
        yield f"the folder is called {folder.name}, its arrays say step {step}"


def _sizes(config: ModelConfig) -> dict[str, int]:
    sizes = dict(embed=config.d_model, heads=config.n_heads, kv_heads=config.n_heads, head_dim=config.head_dim)
    sizes |= dict(ff=config.ff_dim, vocab=config.n_vocab, position=config.seq_len, buckets=T5_BUCKETS)
    return sizes


def find_uneven(config: ModelConfig, shards: int) -> list[str]:
    """Why a model cannot be cut into so many shards."""
    if shards <= 0:
        return [f"{shards} is no number of shards"]
    sizes = dict(n_heads=config.n_heads, n_vocab=config.n_vocab, d_model=config.d_model)
    return [f"{key} = {size} is not a multiple of {shards} shards" for key, size in sizes.items() if size % shards]


def check_problems(what: str, problems: Sequence[str]) -> None:
    """CheckpointError with the first 50 problems, each once; nothing if there are none."""
    if problems:
        raise CheckpointError(f"{what}:\n  " + "\n  ".join(list(dict.fromkeys(problems))[:50]))
