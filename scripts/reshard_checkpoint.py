# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Any checkpoint to any other: ours, Hugging Face's, mesh-transformer-jax's (GPT-J); in bounded memory, and proved.

examples:
  python scripts/reshard_checkpoint.py models/gpt-j-6b runs/gptj
      a Hugging Face folder becomes a checkpoint of ours; then: python device_sample.py runs/gptj
  python scripts/reshard_checkpoint.py runs/mine models/mine --format huggingface --dtype bfloat16
      a run's newest checkpoint for transformers' from_pretrained
  python scripts/reshard_checkpoint.py step_383500 runs/gptj --source-config 6B_roto_256.json --weights-only
      the original's shards, any number of them; --format gptj-v1 --shards 8 writes them

SRC and DST can be s3://bucket/path or gs://bucket/path (pip install 'mesh-transformer[remote]'). Of a remote source only
what is needed is read; a remote result is made and proved here, in --staging, then uploaded and read back.

The result is made in DST.partial; a conversion that was killed goes on there when it is called again. Every array is
then read back from the result and compared with the source, bit by bit, before DST gets its name, and conversion.json
in it says what was proved. A checkpoint has no mesh: whatever is written here restores on any number of devices.

exit status: 0 done, 1 failed, 2 wrong usage or input
"""

import json
import math
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.config import ConfigError

# Files of a Hugging Face folder that a checkpoint of ours carries along, to be written again on the way back.
CARRIED_TEXTS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a config.json
GPT2_END = 50256
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(arguments: list[str]) -> int:
    """Parse, convert, prove, print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("source", metavar="SRC", help="a run, a checkpoint, a model folder, or v1 shards; or its URL")
    parser.add_argument("destination", metavar="DST", help="the folder to make; or s3://bucket/path, gs://bucket/path")
    parser.add_argument("--format", choices=("native", "huggingface", "gptj-v1"), default="native")
    parser.add_argument("--shards", type=int, default=8, help="of a gptj-v1 result; default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as they are"
    )
    parser.add_argument("--weights-only", action="store_true", help="leave out optimizer state and counters")
    parser.add_argument("--max-memory", default="1G", help="ceiling beside the interpreter's own; default: %(default)s")
    parser.add_argument("--source-config", help="the JSON file of a mesh-transformer-jax checkpoint")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder, where the source carries none; or bytes")
    parser.add_argument("--overwrite", action="store_true", help="replace DST, once the new one is complete")
    parser.add_argument(
        "--staging", type=Path, help="where a remote DST is made; default: the folder of temporary files"
    )
    parser.add_argument("--plan", action="store_true", help="check everything and say what it takes; write nothing")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(arguments)
    work, show = (plan, format_plan) if options.plan else (convert, format_report)
    report = work(options)
    print(json.dumps(report) if options.json else show(report))
    return 0


class Prepared(NamedTuple):
    """A conversion of which everything was checked that can be before it begins."""

    source: Any  # reshard.Source, of what is to be converted
    destination: Any  # places.Place
    partial: Path  # where the result is made
    nbytes: int  # of its values
    ceiling: int  # bytes


def prepare(options: Any) -> Prepared:
    """Open the source and check the destination; CheckpointError or ConfigError if it cannot be done."""
    from mesh_transformer.convert import reshard
    from mesh_transformer.convert.gptj.writer import old_config
    from mesh_transformer.convert.huggingface.reader import find_family
    from mesh_transformer.convert.import_plan import make_model_config
    from mesh_transformer.storage.paths import parse_path

    ceiling, destination = parse_bytes(options.max_memory), parse_path(options.destination)
    options.rounds = bool(options.dtype)
    settings = parse_path(options.source_config) if options.source_config else None
    source = reshard.open_source(parse_path(options.source), settings)
    if options.weights_only or options.format != "native":
        weights = {name: array for name, array in source.foreign.arrays.items() if name.startswith("params/")}
        source = source._replace(foreign=source.foreign._replace(arrays=weights))
    config = make_model_config(source.foreign.model, source.path)
    match options.format:  # either may have no words for this model
        case "huggingface":
            find_family(config)
        case "gptj-v1":
            old_config(config, options.shards)
            if not options.dtype:  # all its leaves have one type
                options.dtype = reshard.common_dtype(source.foreign.arrays)
    nbytes = reshard.count_bytes(source.foreign.arrays, options.dtype)
    reshard.check_destination(destination, options.overwrite, nbytes, options.staging)
    return Prepared(source, destination, reshard.partial_folder(destination, options.staging), nbytes, ceiling)


def plan(options: Any) -> dict[str, Any]:
    """What a conversion would read, write and hold in memory; nothing of the weights is read."""
    source, destination, partial, nbytes, ceiling = prepare(options)
    arrays = source.foreign.arrays
    return {
        "source": str(source.path), "kind": source.kind, "destination": str(destination), "format": options.format,
        "arrays": len(arrays), "bytes": nbytes, "dtype": options.dtype or "unchanged", "max_memory": ceiling,
        "largest_array": max(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values()),
        "free_bytes": shutil.disk_usage(partial.parent).free,
        "notes": list(source.foreign.notes),
    }  # fmt: skip


def format_plan(found: dict[str, Any]) -> str:
    """For a person."""
    lines = [
        f"{found['source']} ({found['kind']}) -> {found['destination']} ({found['format']}), nothing was written",
        f"{found['arrays']} arrays, {found['bytes']:,} bytes to write ({found['free_bytes']:,} are free), each read twice more",
        f"largest array {found['largest_array']:,} bytes; at most {found['max_memory']:,} in memory beside the interpreter",
        *(f"note: {note}" for note in found["notes"]),
    ]
    return "\n".join(lines)


def convert(options: Any) -> dict[str, Any]:
    """Do it; the report, which is also written beside the result."""
    from mesh_transformer.convert import reshard
    from mesh_transformer.mesh import keep_freed_memory
    from mesh_transformer.storage.errors import CheckpointError, StorageError

    keep_freed_memory(True)  # blocks are all of a size
    source, destination, partial, nbytes, ceiling = prepare(options)
    meta = make_meta(source, options)
    identity = {"source": str(source.path.absolute()), "stamp": _stamp(source.path), "format": options.format,
                "dtype": options.dtype, "shards": options.shards, "arrays": sorted(source.foreign.arrays),
                "memory": ceiling}  # fmt: skip
    part_bytes = ceiling // 6  # three workers have one as it is read and one as it is written
    start = time.perf_counter()
    with show_progress(sys.stderr.isatty()) as progress:
        journal = reshard.Journal(partial, identity)
        if options.format == "gptj-v1":
            made = reshard.write_original(
                partial, source, shards=options.shards, dtype=options.dtype, part_bytes=part_bytes, progress=progress
            )
        elif options.format == "native":
            made = reshard.write_native(
                partial,
                source,
                meta,
                dtype=options.dtype,
                part_bytes=part_bytes,
                journal=journal,
                progress=progress,
            )
        else:
            made = reshard.write_huggingface(
                partial, source, dtype=options.dtype, part_bytes=part_bytes, journal=journal, progress=progress
            )
            _write_carried(partial, meta)
        write_seconds = time.perf_counter() - start
        try:
            proved = prove(source, made, options, ceiling, progress)
        except StorageError:  # the source cannot be reached just now
            raise
        except CheckpointError:
            shutil.rmtree(partial)
            raise
    seconds = time.perf_counter() - start
    report = {
        "source": str(source.path), "kind": source.kind, "destination": str(options.destination),
        "format": options.format, "bytes": nbytes, "dtype": options.dtype or "unchanged", "seconds": round(seconds, 2),
        "write_seconds": round(write_seconds, 2),
        "mb_per_s": round(nbytes / seconds / 1e6, 1), "peak_memory_mb": round(peak_memory() / 1e6),
        "notes": list(source.foreign.notes), **proved,
    }  # fmt: skip
    (partial / "conversion.json").write_text(json.dumps(report, indent=1))
    with show_progress(sys.stderr.isatty()) as progress:
        sent = reshard.finish(partial, destination, progress)
    return report | ({"upload": sent._asdict()} if sent else {})


def make_meta(source: Any, options: Any) -> dict[str, Any]:
    """What the result says of itself: the source's own words, or the model's configuration and tokenizer."""
    from mesh_transformer.data.tokenizers import load_tokenizer

    meta = dict(source.meta)
    if "config" not in meta:
        meta["config"] = {"model": source.foreign.model}
    if source.kind == "huggingface":
        files = [source.path / name for name in CARRIED_TEXTS]
        meta["carried"] = {file.name: file.read_bytes().decode() for file in files if file.is_file()}
        meta["special_ids"] = {key: source.settings[key] for key in SPECIAL_IDS if key in source.settings}
    if source.kind == "gptj-v1" and source.foreign.model["n_vocab"] > GPT2_END:  # its tokenizer was always GPT-2's
        meta["special_ids"] = {"bos_token_id": GPT2_END, "eos_token_id": GPT2_END}
    spec = options.tokenizer or (source.foreign.tokenizer if source.kind == "huggingface" else None)
    if spec:
        tokenizer, rows = load_tokenizer(spec), source.foreign.model["n_vocab"]
        if tokenizer.n_vocab > rows:
            raise ConfigError(
                f"{spec}: the tokenizer has {tokenizer.n_vocab:,} entries, the model has rows for {rows:,}"
            )
        meta["tokenizer"] = tokenizer.to_json()
    meta["parent"] = {"kind": source.kind, "path": str(source.path.absolute()), "step": source.foreign.step}
    return meta


def prove(source: Any, made: Path, options: Any, ceiling: int, progress: Any) -> dict[str, Any]:
    """Every array read back, and the same prompts through both sides; CheckpointError if anything differs."""
    from mesh_transformer.checkpoint.manifest import CheckpointError
    from mesh_transformer.convert import reshard
    from mesh_transformer.convert.logit_check import TOLERANCE, compare_logits
    from mesh_transformer.mesh import keep_freed_memory

    old = made.parent / "config.json" if options.format == "gptj-v1" else None
    result = reshard.open_source(made, old)
    digests = reshard.prove(source.foreign, result.foreign, options.dtype, progress)
    keep_freed_memory(False)  # what comes now has blocks of other sizes
    difference = compare_logits(source, result, ceiling, progress)
    proof = "every array read back from the result equals the source bit by bit, after the cast if there was one"
    report = {"arrays": len(digests), "proof": proof, "digests": digests}
    if not options.rounds and difference.largest > TOLERANCE * difference.scale:
        raise CheckpointError(
            f"the logits of {source.path} and of the result differ by {difference.largest:.3g} (the largest is "
            f"{difference.scale:.3g}): nothing was kept. This is an error of this program; please report it"
        )
    words = f"of {difference.tokens} random tokens' logits, the largest of which is {difference.scale:.3g}"
    return report | {"max_logit_difference": difference.largest, "logits": words}


def parse_bytes(text: str) -> int:
    """Bytes of "256M" or "1.5G"; ConfigError for anything else or less than 64 MB."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 64_000_000:
        raise ConfigError(f"--max-memory {text}: expected a size such as 256M or 1G, at least 64M")
    return size


def show_progress(is_terminal: bool) -> Any:
    """A bar with bytes per second where somebody looks, otherwise nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not is_terminal)
    tasks: dict[str, Any] = {}

    class Shown:
        def __enter__(self) -> Any:
            bar.start()
            return self.update

        def __exit__(self, *_: object) -> None:
            bar.stop()

        def update(self, what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

    return Shown()


def format_report(report: dict[str, Any]) -> str:
    """For a person."""
    lines = [
        f"{report['source']} ({report['kind']}) -> {report['destination']} ({report['format']})",
        f"{report['arrays']} arrays, {report['bytes']:,} bytes, {report['mb_per_s']} MB/s with the proof, "
        f"peak memory {report['peak_memory_mb']:,} MB",
        f"proved: {report['proof']}",
        f"largest logit difference {report['max_logit_difference']:.3g} {report['logits']}",
        *_format_upload(report.get("upload")),
        *(f"note: {note}" for note in report["notes"]),
    ]
    return "\n".join(lines)


def _format_upload(sent: dict[str, Any] | None) -> list[str]:
    if not sent:
        return []
    rate = f"{sent['nbytes'] / sent['seconds'] / 1e6:.1f} MB/s with reading back"
    return [
        f"uploaded {sent['put']} of {sent['objects']} objects, {sent['nbytes']:,} bytes, {rate}; the others were there"
    ]


def _write_carried(folder: Path, meta: dict[str, Any]) -> None:
    """The tokenizer and the files that once came with the weights, unless they are there; ids of special tokens.

    transformers would take its own for those that config.json does not name.
    """
    from mesh_transformer.data.tokenizers import tokenizer_from_json

    texts = dict(meta.get("carried", {}))
    tokenizer = meta.get("tokenizer", {})
    end = tokenizer_from_json(tokenizer).end_of_text if tokenizer else None
    table = json.loads((folder / "config.json").read_bytes())
    table |= meta.get("special_ids", {"bos_token_id": end, "eos_token_id": end})
    (folder / "config.json").write_text(json.dumps(table, indent=1))
    if tokenizer.get("type") == "file":
        texts["tokenizer.json"] = json.dumps(tokenizer["tokenizer"], ensure_ascii=False)
    for name in texts.keys() & {*CARRIED_TEXTS, "tokenizer.json"}:
        if not (folder / name).exists():
            (folder / name).write_text(texts[name], encoding="utf-8")


def _stamp(path: Any) -> list[tuple[str, int, float]]:
    """Names, sizes and times of change: a conversion does not go on with another source."""
    from mesh_transformer.checkpoint.backends import backend_for

    return [(name, *status) for name, status in sorted(backend_for(path).list_files().items())]


def peak_memory() -> int:
    """Bytes of memory that this process has held at most; getrusage would count those of the process that started it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(run_command(main))
