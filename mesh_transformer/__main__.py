# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The `mesh-transformer` command: run any program of the project by name, from any directory.

examples:
  mesh-transformer train quickstart
      train the configuration that is shipped under this name; the same as python device_train.py configs/quickstart.toml
  mesh-transformer sample runs/quickstart --prompt "def "
      sample from the trained model
  mesh-transformer reshard --help
      help of one command
"""

import difflib
import importlib
import sys
from typing import NamedTuple

from mesh_transformer import __version__
from mesh_transformer.cli import DONE, PROGRAM, WRONG_USAGE, run_command


class Command(NamedTuple):
    """The module whose `main` runs a command, and the command's line in the help text."""

    module: str
    summary: str


SCRIPTS = "mesh_transformer.scripts"
COMMANDS = {
    "train": Command("device_train", "train or resume a run: CONFIG -> checkpoints, metrics, report"),
    "sample": Command("device_sample", "generate text from a trained model, interactively or with --prompt"),
    "serve": Command("device_serve", "serve a trained model over HTTP (OpenAI's API and a web page)"),
    "plan": Command(
        "device_plan", "report memory, FLOPs and step time of a run, also for hardware that is not present"
    ),
    "evaluate": Command("device_evaluate", "evaluate a model: bits per byte and benchmark tasks"),
    "reshard": Command(f"{SCRIPTS}.reshard_checkpoint", "convert a checkpoint between formats"),
    "checkpoint": Command(f"{SCRIPTS}.checkpoint", "inspect, verify or compare checkpoints"),
    "corpus": Command(f"{SCRIPTS}.build_corpus", "build a corpus: filter, deduplicate, mix, tokenize, document"),
    "inspect-corpus": Command(f"{SCRIPTS}.inspect_corpus", "print documents of a corpus and why others were dropped"),
    "tokenizer": Command(f"{SCRIPTS}.train_tokenizer", "train a byte-level BPE tokenizer"),
    "shards": Command(f"{SCRIPTS}.make_shards", "tokenize text into token shards"),
    "import-config": Command(
        f"{SCRIPTS}.import_config", "translate a mesh-transformer-jax, GPT-Neo or GPT-NeoX config"
    ),
    "compare": Command(f"{SCRIPTS}.compare_runs", "compare runs in one page; fit scaling laws"),
    "reproduce": Command(f"{SCRIPTS}.reproduce", "repeat a run from its record and compare the results"),
    "replay": Command(f"{SCRIPTS}.replay_step", "repeat one step of a run and inspect it"),
    "supervise": Command(f"{SCRIPTS}.launch.supervise", "restart a command after crashes and preemptions"),
    "launch-local": Command(f"{SCRIPTS}.launch.local", "start several processes of one run on this machine"),
}


def usage() -> str:
    """Return the help text: the module's docstring and the table of commands."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    head, _, examples = (__doc__ or "").partition("\n\n")
    return (
        f"{head}\n\nusage: {PROGRAM} COMMAND [ARGUMENTS]   ({PROGRAM} COMMAND --help for more)\n\n{rows}\n\n{examples}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names, with the remaining arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return DONE
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return DONE
    name, *rest = arguments
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"error: {name!r} is not a command; {hint}", file=sys.stderr)
        return WRONG_USAGE
    sys.argv = [f"{PROGRAM} {name}", *rest]  # name in the program's help and messages
    return run_command(importlib.import_module(command.module).main)


if __name__ == "__main__":
    sys.exit(main())
