# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Interactive prompt at which the user types texts, reads their continuations, and changes the sampling options."""

import dataclasses
import difflib
import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Sequence

from pydantic import ValidationError

from mesh_transformer.config import SampleConfig
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.sample.engine.engine import Engine
from mesh_transformer.sample.model_defaults import ModelDefaults
from mesh_transformer.sample.text_generation import TextGeneration

HELP = '''\
Type a text; the model continues it. A line that ends in \\ continues on the next line; a text between lines of """ may
have many lines.

  /set NAME VALUE   change a sampling option, for example /set temperature 0.7
  /show             show the sampling options and the seed
  /seed N           set the seed of the next completion; it increases by one with every completion
  /reset            restore the initial options and seed
  /help             show this text
  /quit             quit (also Ctrl-D); Ctrl-C interrupts a completion'''
BLOCK = '"""'
COMMANDS = ("/set", "/show", "/seed", "/reset", "/help", "/quit")
FIELDS = [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompts"]
# Generated control characters, which could control the terminal -> Unicode symbols that are printed instead.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(128, 160), 65533)


class ReplError(ValueError):
    """Invalid command or option at the interactive prompt."""


class Repl:
    """A session at a terminal or over pipes. Over pipes, only completions are written to stdout."""

    def __init__(
        self,
        engine: Engine,
        defaults: ModelDefaults,
        options: SampleConfig,
        *,
        seed: int = 0,
        stops: Sequence[str] = (),
    ) -> None:
        """`options` and `seed` are the initial values; a completion ends before any of the strings `stops`."""
        self._engine = engine
        self._defaults = defaults
        self._stops = list(stops)
        self._start = (options, seed)
        self._options = options
        self._seed = seed
        self._reads_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._dim = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        if self._reads_terminal:
            _load_history()

    def run(self) -> None:
        """Read texts and commands until /quit or the end of input."""
        self._note("type /help for help, Ctrl-D to quit")
        while True:
            try:
                text, is_command = self._read()
            except KeyboardInterrupt:  # as in a shell: discard the line
                print()
                continue
            except EOFError:
                break
            if is_command and text.strip() == "/quit":
                break
            try:
                self._run_command(text) if is_command else self._complete(text)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _run_command(self, text: str) -> None:
        name, *values = text.split(maxsplit=1)
        match name, "".join(values).strip():
            case "/set", assignment:
                self._options = set_option(self._options, assignment)
            case "/seed", number:
                if not number.isdecimal():
                    raise ReplError(f"/seed {number}: expected an integer >= 0, for example /seed 3")
                self._seed = int(number)
            case "/show", _:
                print("\n".join(f"{name} = {json.dumps(getattr(self._options, name))}" for name in FIELDS))
                print(f"seed = {self._seed}", flush=True)
            case "/reset", _:
                self._options, self._seed = self._start
            case "/help", _:
                print(HELP, flush=True)
            case _:
                near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"commands are {' '.join(COMMANDS)}"
                raise ReplError(
                    f'unknown command {name}; {hint} (a text that begins with / must be between lines of """)'
                )

    def _complete(self, prompt: str) -> None:
        start = time.monotonic()
        seed = self._seed
        self._seed += 1
        suffix = ""
        # The signal sets a flag instead of raising: an exception inside XLA can crash the process at exit.
        with StopRequest((signal.SIGINT,), "") as stop:
            generation = TextGeneration(
                self._engine, self._defaults, [prompt], self._options, seed=seed, stops=self._stops
            )
            for _, text in generation:
                self._write(text)
                if stop.requested:
                    suffix = ", interrupted"
                    break
        for _, text in generation.interrupt():
            self._write(text)
        seconds = time.monotonic() - start
        print(flush=True)
        tokens = generation.n_tokens
        [completion] = generation.completions()
        if completion.finish == "length" and not suffix and tokens < self._options.max_tokens:
            suffix = f", stopped at seq_len={self._engine.config.seq_len}"
        if stats := completion.speculative:
            suffix = f", {stats.accepted_tokens} of {stats.draft_tokens} draft tokens accepted" + suffix
        self._note(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s, seed {seed}{suffix}")

    def _read(self) -> tuple[str, bool]:
        """Return the next text, which may have several lines (see HELP), and whether it is a command."""
        line = ""
        while not line.strip():
            line = self._read_line("> ")
        if line.strip() == BLOCK:
            block = []
            while (line := self._read_line(". ")).strip() != BLOCK:
                block.append(line)
            return "\n".join(block), False
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(". "))
        return "\n".join(lines), line.startswith("/")

    def _read_line(self, prompt: str) -> str:
        if self._reads_terminal:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def _write(self, text: str) -> None:
        print(text.translate(VISIBLE) if sys.stdout.isatty() else text, end="", flush=True)

    def _note(self, text: str) -> None:
        if sys.stdout.isatty():
            print(f"\x1b[2m{text}\x1b[0m" if self._dim else text, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def set_option(options: SampleConfig, assignment: str) -> SampleConfig:
    """Return `options` with "NAME VALUE" or "NAME = VALUE" applied.

    Raises ReplError for an unknown name or an invalid value.
    """
    name, _, value = assignment.replace("=", " ", 1).partition(" ")
    value = value.strip()
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(FIELDS)}"
        raise ReplError(f"unknown option {name!r}; {hint}")
    try:
        return dataclasses.replace(options, **{name: tomllib.loads(f"value = {value}")["value"]})
    except tomllib.TOMLDecodeError:
        raise ReplError(f"/set {name} {value}: expected a number, true or false") from None
    except ValidationError as error:
        raise ReplError(f"{name} = {value}: {error.errors()[0]['msg']}") from None


def _load_history() -> None:
    """Enable arrow keys and history if Python was built with readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_history_length(1000)
