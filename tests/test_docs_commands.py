# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every command of README.md and docs/ runs as written, shortened by `--set`.

A block of commands that this machine cannot run is preceded by `<!-- not run: reason -->`; its configurations are still
parsed.
"""

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
GENERATED = {"docs/reference/commands.md"}  # docstrings; their examples name files of the reader
# Shells' and other projects' commands, which say nothing of this project.
OTHER_PROGRAMS = (
    "pip ",
    "git ",
    "cd ",
    ". ",
    "python3 -m venv",
    "make ",
    "pre-commit ",
    "jupyter ",
    "apt ",
    "sbatch ",
    "python -c ",
)
SHORT = [
    "train.steps=4", "train.batch_size=8", "train.log_every=1", "train.evaluate_every=0", "train.evaluate_batches=1",
    "optimizer.warmup_steps=1", "checkpoint.every=4", "sample.max_tokens=8",
]  # fmt: skip
SMALL = ["model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.seq_len=64", "data.holdout_one_in=400"]


class Block(NamedTuple):
    """A fenced block of shell commands."""

    page: str
    line: int
    commands: list[str]
    not_run: str  # the reason, or empty


def blocks_of(page: Path) -> list[Block]:
    name = page.relative_to(ROOT).as_posix()
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        if lines[i].strip() != "```sh":
            i += 1
            continue
        before = next((line for line in reversed(lines[:i]) if line.strip()), "")
        reason = re.fullmatch(r"<!-- not run: (.+) -->", before.strip())
        end = lines.index("```", i + 1)
        text = "\n".join(lines[i + 1 : end]).replace("\\\n", " ")
        commands = [line.strip() for line in text.split("\n") if line.strip() and not line.strip().startswith("#")]
        found.append(Block(name, i + 1, commands, reason[1] if reason else ""))
        i = end + 1
    return found


BLOCKS = {
    path.relative_to(ROOT).as_posix(): found
    for path in PAGES
    if path.relative_to(ROOT).as_posix() not in GENERATED and (found := blocks_of(path))
}


def arguments_of(command: str) -> list[str]:
    """Words of a command without a trailing comment, and without `VARIABLE=value` before it."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def shortened(words: list[str]) -> list[str]:
    """The command with a fresh interpreter, and with settings that make it take seconds."""
    words = list(words)
    if "--" in words:  # a launcher: the command after it
        at = words.index("--")
        return [*shortened(words[:at]), "--", *shortened(words[at + 1 :])]
    if words[0] == "mesh-transformer":
        words[:1] = ["-m", "mesh_transformer"]
    elif words[0] == "python":
        words.pop(0)
    program = words[2] if words[:2] == ["-m", "mesh_transformer"] else Path(words[0]).name.removesuffix(".py")
    extra: list[str] = []
    if program.removeprefix("device_") in ("train", "plan") and "--print-config" not in words:
        preset = any("t5" in word for word in words)
        extra = SHORT + ([] if preset or any("model." in word for word in words) else SMALL)
        extra = [one for one in extra if not any(one.split("=")[0] + "=" in word for word in words)]
    elif program.removeprefix("device_") in ("sample",):
        extra = ["sample.max_tokens=8"]
    return [sys.executable, *words, *(part for one in extra for part in ("--set", one))]


def test_extras_that_messages_name_exist():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [*PAGES, *ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "mesh_transformer").rglob("*.py")]
    pattern = re.compile(r"mesh-transformer\[([a-z,]+)\]")
    named = {
        extra for path in texts for found in pattern.findall(path.read_text("utf-8")) for extra in found.split(",")
    }
    assert {"serve", "tokenizers"} <= named <= set(config["options.extras_require"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory that looks like a clone, in which every page's commands run, with one trained run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "configs",
        "scripts",
        "notebooks",
        "docs",
        "mesh_transformer",
        *[p.name for p in ROOT.glob("device_*.py")],
    ):
        (folder / name).symlink_to(ROOT / name)
    run(shortened(arguments_of("python device_train.py configs/quickstart.toml")), folder)
    return folder


def run(words: list[str], folder: Path, variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", **(variables or {})},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", BLOCKS)
def test_commands_run(page, folder):
    for block in BLOCKS[page]:
        for command in block.commands:
            if block.not_run or command.startswith(OTHER_PROGRAMS):
                continue
            variables = dict(re.findall(r"^([A-Z_]+)=(\S+)(?= )", command))
            words = shortened(arguments_of(command))
            run(words, folder, variables)


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_name_what_exists(page):
    """Programs, shipped configurations and configuration keys, also of blocks that are not run."""
    from mesh_transformer.__main__ import COMMANDS
    from mesh_transformer.config import load_config

    for block in BLOCKS[page]:
        for command in block.commands:
            where = f"{block.page}:{block.line}: {command}"
            if command.startswith(OTHER_PROGRAMS):
                continue
            words = arguments_of(command)
            for word in words:
                if re.fullmatch(r"(device_\w+|scripts/[\w/]+)\.(py|sh)", word):
                    assert (ROOT / word).is_file(), where
                if re.fullmatch(r"configs/[\w/.]+\.toml", word):
                    assert (ROOT / word).is_file(), where
            if words[0] == "mesh-transformer" and not words[1].startswith("-"):
                assert words[1] in COMMANDS, where
            config = next((word for word in words if re.fullmatch(r"configs/\w+\.toml", word)), None)
            overrides = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--set"]
            if config and "build_corpus" not in command:
                load_config(ROOT / config, overrides)  # raises ConfigError for a wrong key or value


def test_links_between_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_generated_pages_are_current(load_script):
    docs = load_script("write_docs")
    stale = [path.name for path, text in docs.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/write_docs.py"


def test_every_config_field_has_a_meaning(load_script):
    rows = [line for line in load_script("write_docs").config_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row for row in rows if row.endswith("|  |")] == [], "add a comment to the field in the schema"
