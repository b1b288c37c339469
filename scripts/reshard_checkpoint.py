# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint between the native, Hugging Face, GGUF and mesh-transformer-jax (GPT-J) formats in bounded memory.

examples:
  python scripts/reshard_checkpoint.py models/gpt-j-6b runs/gptj
      Hugging Face folder to native checkpoint; then: python device_sample.py runs/gptj
  python scripts/reshard_checkpoint.py runs/mine models/mine --format huggingface --dtype bfloat16
      latest checkpoint of a run, for from_pretrained of transformers
  python scripts/reshard_checkpoint.py models/SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2
      a GGUF file or its folder, quantized or not; --format gguf --gguf-type Q8_0 writes one, for llama.cpp
  python scripts/reshard_checkpoint.py step_383500 runs/gptj --source-config 6B_roto_256.json --weights-only
      shards of mesh-transformer-jax, any number of them; --format gptj-v1 --shards 8 writes such shards

SRC and DST can be s3://bucket/path or gs://bucket/path (pip install 'mesh-transformer[remote]'). Only the needed parts
of a remote source are downloaded. A remote result is written and verified in a local folder (--staging), then
uploaded and read back.

The result is written to DST.partial; the same command resumes an interrupted conversion there. Before DST gets its name,
every array is read back and compared with the source bit by bit, and the logits of both sides are compared on random
tokens; transformers computes the logits of a Hugging Face folder if it is installed (--verify). conversion.json in the
result records the comparison. A native checkpoint does not depend on a mesh: it can be restored on any number of devices.

exit status: 0 done, 1 failed, 2 wrong usage or input
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mesh_transformer.cli import make_parser, run_command

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K")


def main(arguments: list[str]) -> int:
    """Parse the arguments, convert, verify and print the report."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("source", metavar="SRC", help="run, checkpoint, model folder or v1 shards; a path or URL")
    parser.add_argument("destination", metavar="DST", help="folder to create, s3://bucket/path or gs://bucket/path")
    parser.add_argument(
        "--format",
        choices=("native", "huggingface", "gguf", "gptj-v1"),
        default="native",
        help="format of DST; default: %(default)s",
    )
    parser.add_argument(
        "--shards", type=int, default=8, help="number of shards to write with --format gptj-v1; default: %(default)s"
    )
    parser.add_argument(
        "--gguf-type", choices=GGUF_TYPES, help="data type of the matrices with --format gguf; default: unchanged"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights; default: unchanged"
    )
    parser.add_argument("--weights-only", action="store_true", help="leave out optimizer state and counters")
    parser.add_argument(
        "--max-memory", default="1G", help="memory limit in addition to the interpreter; default: %(default)s"
    )
    parser.add_argument("--source-config", help="JSON configuration of a mesh-transformer-jax checkpoint")
    parser.add_argument("--tokenizer", help='tokenizer.json, its folder, or "bytes", if the source has no tokenizer')
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing DST once the new result is complete"
    )
    parser.add_argument(
        "--staging",
        type=Path,
        help="local folder in which a remote DST is written before its upload; default: the folder for temporary files",
    )
    parser.add_argument(
        "--verify",
        choices=("auto", "transformers", "own"),
        default="auto",
        help="program that computes the logits of Hugging Face folders: transformers in a separate process; own: this "
        "project's reimplementation; auto: transformers if it is installed and the model fits in memory; default: %(default)s",
    )
    parser.add_argument(
        "--plan", action="store_true", help="check the source and the options, and print sizes; write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    arguments_by_name = vars(parser.parse_args(arguments))
    from mesh_transformer.convert.conversion import ConversionOptions, convert, plan_conversion  # slow to import
    from mesh_transformer.convert.progress import show_progress

    names = [field.name for field in dataclasses.fields(ConversionOptions)]
    options = ConversionOptions(**{name: arguments_by_name[name] for name in names})
    if arguments_by_name["plan"]:
        report = plan_conversion(options)
        text = format_plan(report)
    else:
        with show_progress() as progress:
            report = convert(options, progress)
        text = format_report(report)
    print(json.dumps(report) if arguments_by_name["json"] else text)
    return 0


def format_plan(report: dict[str, Any]) -> str:
    """Return the plan as text."""
    lines = [
        f"{report['source']} ({report['kind']}) -> {report['destination']} ({report['format']}), nothing was written",
        f"{report['arrays']} arrays, {report['bytes']:,} bytes to write ({report['free_bytes']:,} free); verification "
        "reads each byte two more times",
        f"largest array {report['largest_array']:,} bytes; memory limit {report['max_memory']:,} bytes in addition to the "
        "interpreter",
        *(f"note: {note}" for note in report["notes"]),
    ]
    return "\n".join(lines)


def format_report(report: dict[str, Any]) -> str:
    """Return the report as text."""
    lines = [
        f"{report['source']} ({report['kind']}) -> {report['destination']} ({report['format']})",
        f"{report['arrays']} arrays, {report['bytes']:,} bytes, {report['mb_per_s']} MB/s including verification, "
        f"peak memory {report['peak_memory_mb']:,} MB",
        f"verified: {report['verified']}",
        *_format_difference(report),
        f"logits compared: {report['logits_compared']}",
        *_format_upload(report.get("upload")),
        *(f"note: {note}" for note in report["notes"]),
    ]
    return "\n".join(lines)


def _format_difference(report: dict[str, Any]) -> list[str]:
    """Return one line, or none if no logits were compared."""
    if "max_logit_difference" not in report:
        return []
    return [f"largest logit difference {report['max_logit_difference']:.3g} {report['logits']}"]


def _format_upload(upload: dict[str, Any] | None) -> list[str]:
    if not upload:
        return []
    rate = f"{upload['nbytes'] / upload['seconds'] / 1e6:.1f} MB/s including reading back"
    skipped = upload["objects"] - upload["put"]
    return [
        f"uploaded {upload['put']} of {upload['objects']} objects, {upload['nbytes']:,} bytes, {rate}; "
        f"{skipped} were uploaded before"
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
