# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Evaluate a trained model. RUN is a run folder, a checkpoint in it, a Hugging Face model, or a .gguf file.

examples:
  python device_evaluate.py runs/quickstart
      bits per byte of the run's held-out text, in segments of the model's context length
  python device_evaluate.py runs/gpt2 --data pile=test.jsonl.zst --set 'evaluate.group_key="meta.pile_set_name"'
      the same by component, next to table 2 of the Pile's paper (add --set evaluate.sample_fraction=0.1 for its sample size)
  python device_evaluate.py runs/gpt2 --task wikitext2 --data wikitext2=wiki.test.tokens --set evaluate.stride=512
      perplexity per word and per token, in overlapping windows
  python device_evaluate.py runs/gpt2 --task hellaswag --data hellaswag=hellaswag_val.jsonl --task local --json
      lm-evaluation-harness tasks from local files, and synthetic tasks made from held-out text
      (pip install 'mesh-transformer[evaluate]')
  python device_evaluate.py runs/gpt2 --task rte --data rte=val.jsonl --num-fewshot 32 --fewshot-data rte=train.jsonl
      32-shot evaluation, with the few-shot examples that the harness samples

tasks: text (the default), wikitext2; lambada, hellaswag, piqa, winogrande, arc_easy, arc_challenge, sciq; superglue (boolq, cb,
copa, rte, wic, wsc, multirc, record), each with --data TASK=FILE; local (local_choice, local_cloze), local_line; and the file of
any task definition of the harness (gsm8k/gsm8k.yaml) or your own, with --data gsm8k=FILE.
Results are written into the run folder: evaluation_<step>.json in the harness's format, and the page report.html.
exit status: 0 done, 1 failed, 2 invalid usage or configuration
"""

import argparse
import json
import re
import sys

from mesh_transformer.cli import add_set_option, make_parser, run_command
from mesh_transformer.config import ConfigError

NAME = "[A-Za-z0-9_-]+"  # of a task or a component


def main(arguments: list[str]) -> int:
    """Evaluate the model named on the command line."""
    options = parse_options(arguments)
    # Import JAX after parsing, so that --help and usage errors are fast.
    from mesh_transformer.evaluate.checkpoint_eval import evaluate_checkpoint

    evaluation = evaluate_checkpoint(options.run, options.set, quiet=options.json)
    if options.json:
        print(json.dumps(evaluation, indent=2))
    return 0


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. Flags become overrides of [evaluate] in `set`; ConfigError for an invalid value."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run folder, checkpoint, Hugging Face folder or name (org/model), or .gguf file",
    )
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="task to run; repeatable")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="data file of a task; a NAME that is not a task is a component of the text task, and PATH its file, folder or "
        "token shard; repeatable",
    )
    parser.add_argument(
        "--num-fewshot",
        action="append",
        default=[],
        metavar="N|NAME=N",
        help="few-shot examples before every question, of all tasks or of task NAME; repeatable",
    )
    parser.add_argument(
        "--fewshot-data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="file from which the few-shot examples of task NAME are sampled; repeatable",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate at most N examples or documents of each task")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the harness's format")
    add_set_option(parser)
    options = parser.parse_args(arguments)
    if options.task:
        options.set.append(f"evaluate.tasks={json.dumps(options.task)}")
    options.set += [_path_override("data", item) for item in options.data]
    options.set += [_path_override("fewshot_data", item) for item in options.fewshot_data]
    options.set += [_num_fewshot_override(item) for item in options.num_fewshot]
    if options.limit is not None:
        options.set.append(f"evaluate.limit={options.limit}")
    return options


def _path_override(key: str, item: str) -> str:
    name, equals, path = item.partition("=")
    if not (equals and path and re.fullmatch(NAME, name)):
        flag = f"--{key.replace('_', '-')}"
        raise ConfigError(f"{flag} {item}: expected NAME=PATH, for example {flag} hellaswag=hellaswag.jsonl")
    return f"evaluate.{key}.{name}={json.dumps(path)}"


def _num_fewshot_override(item: str) -> str:
    name, _, count = item.rpartition("=")
    if not count.isdigit() or not re.fullmatch(f"({NAME})?", name):
        raise ConfigError(f"--num-fewshot {item}: expected N or NAME=N, for example --num-fewshot hellaswag=10")
    return f"evaluate.num_fewshot_by_task.{name}={count}" if name else f"evaluate.num_fewshot={count}"


if __name__ == "__main__":
    sys.exit(run_command(main))
