# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversion of a checkpoint from any format to any other: open, write, verify, publish.

scripts/reshard_checkpoint.py is the command.
"""

import dataclasses
import json
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mesh_transformer.checkpoint.backends import backend_for
from mesh_transformer.config import ConfigError
from mesh_transformer.convert.bit_check import verify_bits
from mesh_transformer.convert.destination import check_destination, publish, staging_folder
from mesh_transformer.convert.gptj.writer import make_external_config
from mesh_transformer.convert.huggingface.reader import find_family
from mesh_transformer.convert.huggingface.text_files import read_text_files, write_text_files
from mesh_transformer.convert.lazy_arrays import array_bytes
from mesh_transformer.convert.logit_check import TOLERANCE, LogitDifference, Verify, compare_logits
from mesh_transformer.convert.progress import Progress, no_progress
from mesh_transformer.convert.readers import OpenCheckpoint, open_checkpoint, require_gguf
from mesh_transformer.convert.sources import find_source
from mesh_transformer.convert.writers import WriteOptions, write_gptj_v1, write_huggingface, write_native
from mesh_transformer.data.tokenizer_files import is_tokenizer_file
from mesh_transformer.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_json
from mesh_transformer.host_memory import keep_freed_memory
from mesh_transformer.storage.errors import CheckpointError, StorageError
from mesh_transformer.storage.paths import AnyPath, parse_path
from mesh_transformer.storage.resume_log import ResumeLog, open_staging_log

if TYPE_CHECKING:
    from mesh_transformer.convert.gguf.writer import GGUFPlan  # needs the package gguf

GPT2_END_OF_TEXT = 50256  # token ID
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Arguments of a conversion; the flags of scripts/reshard_checkpoint.py."""

    source: str | AnyPath  # run, checkpoint, model folder or v1 shards; a path or URL
    destination: str | AnyPath  # folder to create; a path or URL
    format: Literal["native", "huggingface", "gguf", "gptj-v1"] = "native"
    shards: int = 8  # of format "gptj-v1"
    gguf_type: str | None = None  # GGUF type of the matrices, for format "gguf"; None: the type of the source
    dtype: str | None = None  # of the weights; None: unchanged
    weights_only: bool = False  # leave out optimizer state and counters
    max_memory: str = "1G"  # limit, in addition to the memory of the interpreter
    source_config: str | AnyPath | None = None  # JSON configuration of a mesh-transformer-jax checkpoint
    tokenizer: str | None = None  # tokenizer.json, its folder, or "bytes"; None: the tokenizer of the source
    overwrite: bool = False  # replace the destination when the new result is complete
    verify: Verify = "auto"  # implementation that computes the logits of Hugging Face folders
    staging: Path | None = None  # local folder for a remote result; None: the system's temporary folder


class Conversion(NamedTuple):
    """A conversion whose source and destination have been checked."""

    source: OpenCheckpoint
    tokenizer: Tokenizer | None
    destination: AnyPath
    partial: Path  # folder in which the result is written before it is published
    nbytes: int  # size of the result's values in bytes
    dtype: str | None  # of the weights; None: unchanged
    may_round: bool  # whether weights may differ from the source: cast, quantized, or dequantized and rounded
    max_memory: int  # bytes
    gguf: "GGUFPlan | None"  # plan of the file to write, for format "gguf"


def prepare(options: ConversionOptions) -> Conversion:
    """Open the source and check the destination; no values are read.

    Raises CheckpointError or ConfigError if the conversion is impossible.
    """
    max_memory = parse_bytes(options.max_memory)
    destination = parse_path(options.destination)
    source_config = parse_path(options.source_config) if options.source_config else None
    source = open_checkpoint(find_source(options.source), source_config)
    if options.weights_only or options.format != "native":
        source = source._replace(plan=source.plan.weights_only())
    dtype = options.dtype
    gguf = None
    match options.format:  # raise if the format cannot represent the model
        case "huggingface":
            find_family(source.plan.config)
        case "gptj-v1":
            make_external_config(source.plan.config, options.shards)
            dtype = dtype or source.plan.weight_dtype()  # all leaves of the format have one type
        case "gguf":
            gguf = _plan_gguf(source, options)
    nbytes = gguf.nbytes if gguf else source.plan.nbytes(dtype)
    check_destination(destination, options.overwrite, nbytes, options.staging)
    partial = staging_folder(destination, options.staging)
    may_round = bool(options.dtype) or source.plan.is_rounded or (gguf is not None and not gguf.is_exact)
    tokenizer = load_source_tokenizer(source, options)
    return Conversion(source, tokenizer, destination, partial, nbytes, dtype, may_round, max_memory, gguf)


def _plan_gguf(source: OpenCheckpoint, options: ConversionOptions) -> "GGUFPlan":
    if options.dtype:
        raise ConfigError(
            f"--dtype {options.dtype} cannot be combined with --format gguf; use --gguf-type to set the type of its matrices"
        )
    require_gguf(options.destination)
    from mesh_transformer.convert.gguf.writer import plan_gguf

    model_type = source.meta.get("model_type") or source.external_config.get("model_type")
    return plan_gguf(source.plan, options.gguf_type, model_type)


def plan_conversion(options: ConversionOptions) -> dict[str, Any]:
    """Return the plan of a conversion: its arrays, sizes in bytes, memory limit and free disk space. No weights are read."""
    conversion = prepare(options)
    source = conversion.source
    return {
        "source": str(source.path),
        "kind": source.kind,
        "destination": str(conversion.destination),
        "format": options.format,
        "arrays": len(source.plan.arrays),
        "bytes": conversion.nbytes,
        "dtype": conversion.dtype or "unchanged",
        "max_memory": conversion.max_memory,
        "largest_array": max(array_bytes(array) for array in source.plan.values.values()),
        "free_bytes": shutil.disk_usage(conversion.partial.parent).free,
        "notes": [*source.plan.notes, *note_tokenizer(conversion.tokenizer, source.plan.model["n_vocab"])],
    }


def convert(options: ConversionOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Convert, verify and publish; return the report, which is also stored in conversion.json of the result."""
    keep_freed_memory(True)  # all blocks have the same size, so freed memory is reused
    conversion = prepare(options)
    source, partial = conversion.source, conversion.partial
    start = time.perf_counter()
    try:
        result = write(conversion, options, progress)
        write_seconds = time.perf_counter() - start
        verification = verify(conversion, result, options, progress)
    except StorageError:  # the source is temporarily unreachable: keep the partial result
        raise
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.perf_counter() - start
    report = {
        "source": str(source.path),
        "kind": source.kind,
        "destination": str(options.destination),
        "format": options.format,
        "bytes": conversion.nbytes,
        "dtype": conversion.dtype or "unchanged",
        "seconds": round(seconds, 2),
        "write_seconds": round(write_seconds, 2),
        "mb_per_s": round(conversion.nbytes / seconds / 1e6, 1),
        "peak_memory_mb": round(peak_memory() / 1e6),
        **verification,
    }
    (partial / "conversion.json").write_text(json.dumps(report, indent=1))
    upload = publish(partial, conversion.destination, progress)
    return report | ({"upload": upload._asdict()} if upload else {})


def write(conversion: Conversion, options: ConversionOptions, progress: Progress) -> Path:
    """Write the result below the partial folder and return its path: the folder of the checkpoint, or the GGUF file."""
    source, partial = conversion.source, conversion.partial
    meta = make_meta(source, conversion.tokenizer)
    if options.tokenizer and "carried_files" in meta:  # the files of the source's tokenizer no longer apply
        files: dict[str, str] = meta["carried_files"]
        meta["carried_files"] = {name: data for name, data in files.items() if not is_tokenizer_file(name)}
    identity = {
        "source": str(source.path.absolute()),
        "stamp": _stamp(source.path),
        "format": options.format,
        "dtype": conversion.dtype,
        "gguf_type": options.gguf_type,
        "shards": options.shards,
        "arrays": sorted(source.plan.arrays),
        "memory": conversion.max_memory,
    }
    slice_bytes = conversion.max_memory // 6  # each of three workers holds a slice as read and as written
    write_options = WriteOptions(conversion.dtype, slice_bytes, progress)
    with open_staging_log(partial, identity) as log:
        match options.format:
            case "gptj-v1":
                return write_gptj_v1(partial, source.plan, write_options, shards=options.shards)
            case "native":
                return write_native(partial, source.plan, meta, log, write_options)
            case "gguf":
                return _write_gguf(conversion, meta, log, write_options)
            case _:
                copy_files_from = source.path if source.kind == "huggingface" else None
                result = write_huggingface(
                    partial,
                    source.plan,
                    log,
                    write_options,
                    copy_files_from=copy_files_from,
                    model_type=meta.get("model_type"),
                )
                write_text_files(partial, meta)
                return result


def _write_gguf(conversion: Conversion, meta: dict[str, Any], log: ResumeLog, options: WriteOptions) -> Path:
    from mesh_transformer.convert.gguf.writer import write_gguf

    assert conversion.gguf is not None
    path = conversion.partial / f"{conversion.destination.name}-{conversion.gguf.type}.gguf"
    write_gguf(path, conversion.gguf, meta, log, options.progress, options.slice_bytes)
    return path


def load_source_tokenizer(source: OpenCheckpoint, options: ConversionOptions) -> Tokenizer | None:
    """Return the tokenizer given in the options, or found in the source's model folder or GGUF file; else None.

    Raises TokenizerError if the tokenizer cannot be read, and ConfigError if it has more tokens, without added tokens, than
    the model has embeddings.
    """
    spec = options.tokenizer or (source.plan.tokenizer if source.kind == "huggingface" else None)
    if spec:
        tokenizer = load_tokenizer(spec)
    elif source.kind == "gguf" and "tokenizer" in source.meta:
        spec = str(source.path)
        tokenizer = tokenizer_from_json(source.meta["tokenizer"], where=spec)
    else:
        return None
    n_vocab = source.plan.model["n_vocab"]
    if tokenizer.n_base_vocab > n_vocab:
        raise ConfigError(
            f"{spec}: the tokenizer has {tokenizer.n_base_vocab:,} tokens, but the model has embeddings of only "
            f"{n_vocab:,}; pass the tokenizer of this model with --tokenizer"
        )
    return tokenizer


def note_tokenizer(tokenizer: Tokenizer | None, n_vocab: int) -> list[str]:
    """Return notes for the user about the tokenizer of a model with `n_vocab` token embeddings."""
    if tokenizer is None:
        return []
    notes = [f"tokenizer: {tokenizer.loss}"] if tokenizer.loss else []
    if tokenizer.n_vocab > n_vocab:
        notes.append(
            f"tokenizer: its added tokens with the ids {n_vocab:,} to {tokenizer.n_vocab - 1:,} have no embedding in the model; "
            "prompts that contain these tokens will be rejected"
        )
    return notes


def make_meta(source: OpenCheckpoint, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the metadata of the result: the source's metadata, the model's configuration and the tokenizer."""
    meta = dict(source.meta)
    model = source.plan.model
    if "config" not in meta:
        meta["config"] = {"model": model}
    if source.kind == "huggingface":
        meta |= read_text_files(source.path, source.external_config)
        meta["model_type"] = source.external_config["model_type"]
    if (
        source.kind == "gptj-v1" and model["n_vocab"] > GPT2_END_OF_TEXT
    ):  # mesh-transformer-jax always uses GPT-2's tokenizer
        meta["special_ids"] = {"bos_token_id": GPT2_END_OF_TEXT, "eos_token_id": GPT2_END_OF_TEXT}
    if tokenizer:
        meta["tokenizer"] = tokenizer.to_json()
    meta["parent"] = {"kind": source.kind, "path": str(source.path.absolute()), "step": source.plan.step}
    return meta


def verify(conversion: Conversion, result: Path, options: ConversionOptions, progress: Progress) -> dict[str, Any]:
    """Compare all arrays and the logits of source and result; return the section of the report about the comparison.

    Raises CheckpointError if an array differs, or if the logits differ by more than TOLERANCE and no weights were rounded.
    """
    source = conversion.source
    written = open_checkpoint(result, result.parent / "config.json" if options.format == "gptj-v1" else None)
    if conversion.gguf is not None:
        from mesh_transformer.convert.gguf.writer import verify_gguf

        digests = verify_gguf(result, conversion.gguf, progress, conversion.max_memory // 6)
    else:
        digests = verify_bits(source.plan, written.plan, conversion.dtype, progress)
    keep_freed_memory(False)  # the blocks of the logit comparison have different sizes
    difference = compare_logits(source, written, conversion.max_memory, progress, options.verify)
    if difference and not conversion.may_round and difference.largest > TOLERANCE * difference.scale:
        raise CheckpointError(
            f"the logits of {source.path} and of the result differ by {difference.largest:.3g}, but may differ by at most "
            f"{TOLERANCE * difference.scale:.3g}; the result was deleted. This is a bug in the conversion, please report it"
        )
    dtype = conversion.gguf.type if conversion.gguf else conversion.dtype
    cast = f" cast to {dtype}" if dtype else ""
    section = {
        "arrays": len(digests),
        "verified": f"each array of the result was read back and is bit-identical to the array of the source{cast}",
        "digests": digests,
        "logits_compared": describe_comparison(difference),
        "notes": [
            *source.plan.notes,
            *note_tokenizer(conversion.tokenizer, source.plan.model["n_vocab"]),
            *(difference.notes if difference else ()),
        ],
    }
    if difference is None:
        return section
    return section | {
        "max_logit_difference": difference.largest,
        "logits": f"on {difference.tokens} random tokens; largest logit {difference.scale:.3g}",
    }


def describe_comparison(difference: LogitDifference | None) -> str:
    """Return the implementations that computed the logits of source and result, and the limits of the comparison."""
    if difference is None:
        return (
            "no: transformers is the only other implementation of this family, and it was not run; install transformers and "
            "torch, and pass --verify transformers"
        )
    source, result = difference.implementations
    if source == result:
        return f"{source} computed the logits of source and result, so this comparison tests the arrays and not the implementation"
    described = f"source: {source}; result: {result}"
    return (
        described
        if difference.used_transformers
        else f"{described}; both belong to this project, and the original library was not run"
    )


def parse_bytes(text: str) -> int:
    """Convert a size such as "256M" or "1.5G" to bytes. Raise ConfigError for an invalid size, or a size below 64 MB."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    nbytes = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if nbytes < 64_000_000:
        raise ConfigError(f"--max-memory {text}: expected a size such as 256M or 1G, at least 64M")
    return nbytes


def _stamp(path: AnyPath) -> list[Any]:
    """Return names, sizes and modification times of the source's files; if they change, a conversion starts again."""
    folder = path if path.is_dir() else path.parent
    return [(name, *status) for name, status in sorted(backend_for(folder).list_files().items())]


def peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    On Linux it is read from /proc, because getrusage also counts the memory of the parent process before the fork.
    """
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if peak:
        return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
