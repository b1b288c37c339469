# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: live on a terminal, plain lines everywhere else."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

# name in the metrics, label, format
COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("learning_rate", "learning rate", "{:.2e}"),
    ("grad_norm", "gradient", "{:.2f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("mfu", "of product peak", "{:.0%}"),
    ("noise_scale", "noise scale", "{:.3g}"),
    ("skipped", "skipped", "{:d}"),
)
BITS = "_bits_per_byte"  # names of validation sets come before it


class Progress:
    """`with Progress(...) as progress:`, then `update` with metrics, `note` with news."""

    def __init__(self, title: str, steps: int, first_step: int = 0, *, console: Console | None = None):
        self.console = console or Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.title, self.steps, self.first_step = title, steps, first_step
        self._values: dict[str, Any] = {}
        self._evaluating = ""
        self._started = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Bar(*columns, console=self.console, expand=True)
        self._task = self._bar.add_task(title, total=steps, completed=first_step)
        self._display = Live(self._render(), console=self.console, refresh_per_second=4, transient=False)

    def __enter__(self) -> "Progress":
        if self.live:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._display.update(self._render())
            self._display.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """`step` steps are taken; show these metrics."""
        self._values |= values
        self._evaluating = ""
        self._bar.update(self._task, completed=step)
        if self.live:
            self._display.update(self._render())
        else:
            self.console.print(self._line(step, values), soft_wrap=True, highlight=False, markup=False)

    def evaluating(self, name: str, done: int, total: int) -> None:
        """Show how far the evaluation of a set is."""
        self._evaluating = f"evaluating {name}: {done} of {total} batches" if done < total else ""
        if self.live:
            self._display.update(self._render())

    def note(self, text: str) -> None:
        """News above the display."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        shown = "  ".join(f"{label} {text}" for label, text in format_values(values))
        left = ""
        done = step - self.first_step
        if done > 0 and step < self.steps:
            seconds = (time.monotonic() - self._started) / done * (self.steps - step)
            left = f"  {seconds // 60:.0f}m{seconds % 60:02.0f}s left"
        return f"step {step}/{self.steps}  {shown}{left}"

    def _render(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        shown = format_values(self._values)
        for _ in shown:
            grid.add_column(justify="right", no_wrap=True)
        if shown:
            grid.add_row(*(Text(label, style="dim") for label, _ in shown))
            grid.add_row(*(Text(text, style="bold") for _, text in shown))
        return Group(self._bar, grid, Text(self._evaluating, style="dim"))


def format_values(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of the metrics a person watches, in order; steps skipped only if there are any."""
    shown = []
    for name, label, form in COLUMNS:
        value = values.get(name)
        if value is not None and not (name == "skipped" and not value):
            shown.append((label, form.format(value)))
    for name, value in values.items():
        if name.endswith(BITS) and value is not None:
            shown.append((f"{name.removesuffix(BITS)} bits/byte", f"{value:.4f}"))
    return shown


def print_rows(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """A small table of two columns under a title."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(Text(title, style="bold"))
    console.print(table)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Bits per byte of every validation set, beside general compressors on the same bytes."""
    table = Table(title="held-out bits per byte", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for heading in ("set", "this model", "xz -9", "gzip -9", "loss", "perplexity"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for name, score in scores.items():
        others = (f"{score[key]:.3f}" if key in score else "" for key in ("xz_bits_per_byte", "gzip_bits_per_byte"))
        table.add_row(
            name, f"{score['bits_per_byte']:.3f}", *others, f"{score['loss']:.4f}", f"{score['perplexity']:.3f}"
        )
    console.print(table)
