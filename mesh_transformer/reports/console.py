# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run: live on a terminal, plain lines everywhere else."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
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
    ("skipped", "skipped", "{:,}"),
)
GAP = 3  # characters between two metrics of the display
BITS = "_bits_per_byte"  # names of validation sets come before it


class Progress:
    """`with Progress(...) as progress:`, then `update` with metrics, `note` with news.

    Live only where a person looks: a pipe, a file or a notebook's output gets plain lines, whatever FORCE_COLOR says.
    """

    def __init__(self, title: str, steps: int, first_step: int = 0, *, console: Console | None = None):
        self.console = console or Console()
        self.live = self.console.is_interactive and self.console.file.isatty()
        self.title, self.steps, self.first_step = title, steps, first_step
        self._values: dict[str, Any] = {}
        self._evaluating = ""
        self._started = time.monotonic()
        self._step, self._stepped = first_step, self._started
        self._pace_from: tuple[int, float] | None = None  # the first step told, and when: compilation is over then
        self._display = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self.live:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._evaluating = ""
            self._display.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """`step` steps are taken; show these metrics."""
        self._values |= values
        self._evaluating = ""
        if step > self._step:
            self._step, self._stepped = step, time.monotonic()
            self._pace_from = self._pace_from or (self._step, self._stepped)
        if not self.live:
            self._print(self._line(step, values))

    def show_validation(self, name: str, done: int, total: int) -> None:
        """Show how far the evaluation of a set is."""
        self._evaluating = f"evaluating {name}: {done} of {total} batches" if done < total else ""

    def show_evaluation(self, what: str, done: int, total: int | None) -> None:
        """Show how far a measurement is."""
        self._evaluating = f"measuring {what}: {done:,}" + (f" of {total:,}" if total else "")

    def show_results(self, step: int, values: Mapping[str, float]) -> None:
        """Say what tasks came to: accuracies, and bits per byte of texts."""
        self._evaluating = ""
        told = [f"{name} {value:.4g}" for name, value in values.items() if name.endswith((".acc", ".bits_per_byte"))]
        self._print(f"step {step}/{self.steps}  {'  '.join(told)}")

    def note(self, text: str) -> None:
        """News above the display."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        shown = "  ".join(f"{label} {text}" for label, text in format_values(values))
        left = self._seconds_left()
        return f"step {step}/{self.steps}  {shown}" + (f"  {format_time(left)} left" if left else "")

    def _seconds_left(self) -> float | None:
        """From the pace between the steps told so far, minus the time since the last; None while that is unknown."""
        step, told = self._pace_from or (self._step, 0.0)
        if self._step == step:
            return None
        pace = (self._stepped - told) / (self._step - step)
        return max(pace * (self.steps - self._step) - (time.monotonic() - self._stepped), 0.0)

    def _render(self) -> Group:
        left = self._seconds_left()
        times = format_time(time.monotonic() - self._started)
        if self._step < self.steps:
            times += f"  {'-:--' if left is None else format_time(left)} left"
        head = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for ratio in (None, 1, None, None):
            head.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.steps, completed=self._step),
            Text(f"{self._step:,}/{self.steps:,}"),
            Text(times, style="dim"),
        )
        rows = wrap_cells(format_values(self._values), self.console.width)
        return Group(
            head, *map(_draw_cells, rows), Text(self._evaluating, style="dim", no_wrap=True, overflow="ellipsis")
        )


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


def wrap_cells(cells: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Cells in rows that are at most `width` characters wide, or one cell."""
    rows: list[list[tuple[str, str]]] = []
    free = 0
    for cell in cells:
        needed = max(map(cell_len, cell)) + GAP
        if not rows or needed - GAP > free:
            rows.append([])
            free = width
        rows[-1].append(cell)
        free -= needed
    return rows


def _draw_cells(cells: list[tuple[str, str]]) -> Table:
    row = Table.grid(padding=(0, GAP, 0, 0))
    for _ in cells:
        row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row(*(Text(label, style="dim") for label, _ in cells))
    row.add_row(*(Text(text, style="bold") for _, text in cells))
    return row


def format_time(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them: 0:07, 12:30, 3:05:00, 2 d 04:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def print_rows(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """A small table of two columns under a title, if it has one."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Bits per byte of every validation set, beside general compressors on the same bytes; nothing if there is none."""
    if not scores:
        return
    table = Table(
        title="held-out bits per byte", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    for heading in ("set", "this model", "xz -9", "gzip -9", "loss", "perplexity"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    columns = ("bits_per_byte", "xz_bits_per_byte", "gzip_bits_per_byte", "loss", "perplexity")
    for name, score in scores.items():
        best = min((score[key] for key in columns[:3] if score.get(key) is not None), default=None)
        cells = []
        for key, form in zip(columns, ("{:.3f}", "{:.3f}", "{:.3f}", "{:.4f}", "{:.3f}"), strict=True):
            value = score.get(key)
            lowest = key in columns[:3] and value == best
            cells.append(Text("" if value is None else form.format(value), style="bold" if lowest else ""))
        table.add_row(Text(name), *cells)
    console.print(table)
