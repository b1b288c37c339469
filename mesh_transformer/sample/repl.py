# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The interactive prompt: type a text, watch the model continue it, change how it draws."""

import dataclasses
import difflib
import os
import signal
import sys
import time
import tomllib
from collections.abc import Sequence

from pydantic import ValidationError

from mesh_transformer.config import SampleConfig
from mesh_transformer.data.tokenizers import Tokenizer
from mesh_transformer.distributed.stop import StopRequest
from mesh_transformer.sample.engine.engine import DecoderOnlyEngine
from mesh_transformer.sample.text_generation import TextGeneration

HELP = '''\
Type a text; the model continues it. A line that ends in \\ continues on the next, as does all between lines of """.

  /set NAME VALUE   change how tokens are drawn, for example /set temperature 0.7
  /show             the settings
  /seed N           the next completion's seed; it grows by one with every completion
  /reset            all settings as at the start
  /help             this text
  /quit             leave, as does Ctrl-D; Ctrl-C ends a completion'''
BLOCK = '"""'
COMMANDS = ("/set", "/show", "/seed", "/reset", "/help", "/quit")
FIELDS = [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompts"]
# Control characters that a model draws would move the cursor or worse; they are shown as the symbols Unicode has for them.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys(range(128, 160), 65533)


class SettingError(ValueError):
    """A command of the prompt that cannot be followed."""


class Repl:
    """One session at a terminal, or over pipes, where only the texts go to stdout."""

    def __init__(
        self, engine: DecoderOnlyEngine, tokenizer: Tokenizer, options: SampleConfig, *, seed: int = 0, stops: Sequence[str] = ()
    ) -> None:
        self._engine, self._tokenizer, self._stops = engine, tokenizer, list(stops)
        self._start = self._options, self._seed = options, seed
        self._reads_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._dim = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        if self._reads_terminal:
            _load_history()

    def run(self) -> None:
        """Until /quit or the end of input."""
        self._note("/help for help, Ctrl-D to leave")
        while True:
            try:
                text, is_command = self._read()
            except KeyboardInterrupt:  # as in a shell: what was typed is dropped
                print()
                continue
            except EOFError:
                break
            if is_command and text.strip() == "/quit":
                break
            try:
                self._follow(text) if is_command else self._complete(text)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _follow(self, text: str) -> None:
        name, *values = text.split(maxsplit=1)
        match name, "".join(values).strip():
            case "/set", setting:
                self._options = change_setting(self._options, setting)
            case "/seed", number:
                if not number.isdecimal():
                    raise SettingError("/seed takes a whole number, for example /seed 3")
                self._seed = int(number)
            case "/show", _:
                print("\n".join(f"{name} = {getattr(self._options, name)}" for name in FIELDS))
                print(f"seed = {self._seed}", flush=True)
            case "/reset", _:
                self._options, self._seed = self._start
            case "/help", _:
                print(HELP, flush=True)
            case _:
                near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"there are {' '.join(COMMANDS)}"
                raise SettingError(
                    f'{name} is no command; {hint} (a text that begins with / goes between lines of """)'
                )

    def _complete(self, prompt: str) -> None:
        start = time.monotonic()
        seed, why = self._seed, ""
        self._seed += 1
        # Noted, not raised: an exception in the middle of what XLA does can bring the process down at its end.
        with StopRequest((signal.SIGINT,), "") as stop:
            generation = TextGeneration(
                self._engine, self._tokenizer, [prompt], self._options, seed=seed, stops=self._stops
            )
            for _, piece in generation:
                self._write(piece)
                if stop.requested:
                    why = ", interrupted"
                    break
        for _, piece in generation.interrupt():
            self._write(piece)
        seconds = time.monotonic() - start
        print(flush=True)
        tokens, finish = generation.n_tokens, generation.completions()[0].finish
        if finish == "length" and not why and tokens < self._options.max_tokens:
            why = f", all that seq_len={self._engine.config.seq_len} leaves room for"
        self._note(f"{tokens} tokens, {tokens / seconds:.1f} tokens/s, seed {seed}{why}")

    def _read(self) -> tuple[str, bool]:
        """The next text, and whether it is a command: a line, lines joined by a backslash at their end, or a block."""
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


def change_setting(options: SampleConfig, setting: str) -> SampleConfig:
    """`options` with "NAME VALUE" or "NAME = VALUE" applied; SettingError says what is wrong and what would be right."""
    name, _, value = setting.replace("=", " ", 1).partition(" ")
    value = value.strip()
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.4)
        raise SettingError(
            f"{name!r} is no setting; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}")
        )
    try:
        return dataclasses.replace(options, **{name: tomllib.loads(f"value = {value}")["value"]})
    except tomllib.TOMLDecodeError:
        raise SettingError(f"/set {name} takes a number, not {value!r}") from None
    except ValidationError as error:
        raise SettingError(f"{name} = {value}: {error.errors()[0]['msg']}") from None


def _load_history() -> None:
    """Arrow keys and history, where Python was built with them."""
    try:
        import readline
    except ImportError:
        return
    readline.set_history_length(1000)
