# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Console output of a run: a live display on a terminal, plain lines in pipes, files and notebooks."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mesh_transformer.reports.metrics_table import CONSOLE_METRICS, VALIDATION_METRICS

GAP = 3  # characters between two metrics of the display
BITS_SUFFIX = "_bits_per_byte"  # suffix of a value's name, after the name of the validation set

ProgressFn = Callable[[str, int, int | None], None]  # name of the work, amount done, total amount (None: unknown)


class Progress:
    """Display of a run's progress. Use it in a `with` block; call `update` with metrics and `note` with messages.

    The display is live only on an interactive terminal, even if FORCE_COLOR is set.
    """

    def __init__(self, title: str, steps: int, first_step: int = 0, *, console: Console | None = None):
        self.console = console or Console()
        self.live = self.console.is_interactive and self.console.file.isatty()
        self.title = title
        self.steps = steps
        self.first_step = first_step
        self._values: dict[str, Any] = {}
        self._status = ""  # progress of the current evaluation, "" without one
        self._started = time.monotonic()
        self._step = first_step
        self._step_time = self._started
        self._first_update: tuple[int, float] | None = None  # step and time of the first update, after compilation
        self._display = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self.live:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._status = ""
            self._display.stop()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the metrics after `step` finished steps."""
        self._values |= values
        self._status = ""
        if step > self._step:
            self._step = step
            self._step_time = time.monotonic()
            self._first_update = self._first_update or (self._step, self._step_time)
        if not self.live:
            self._print(self._line(step, values))

    def show_validation(self, name: str, done: int, total: int) -> None:
        """Show the progress of validation set `name`, in batches."""
        self._status = f"evaluating {name}: {done} of {total} batches" if done < total else ""

    def show_evaluation(self, name: str, done: int, total: int | None) -> None:
        """Show the progress of evaluation task `name`."""
        self._status = f"evaluating {name}: {done:,}" + (f" of {total:,}" if total else "")

    def show_results(self, step: int, values: Mapping[str, float]) -> None:
        """Print the accuracies of evaluation tasks and the bits per byte of evaluation texts."""
        self._status = ""
        shown = [f"{name} {value:.4g}" for name, value in values.items() if name.endswith((".acc", ".bits_per_byte"))]
        self._print(f"step {step}/{self.steps}  {'  '.join(shown)}")

    def note(self, text: str) -> None:
        """Print a message above the display."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        shown = "  ".join(f"{label} {text}" for label, text in format_values(values))
        left = self._seconds_left()
        return f"step {step}/{self.steps}  {shown}" + (f"  {format_time(left)} left" if left else "")

    def _seconds_left(self) -> float | None:
        """Return the estimated remaining time, from the mean step time since the first update; None before the second update."""
        first_step, first_time = self._first_update or (self._step, 0.0)
        if self._step == first_step:
            return None
        step_seconds = (self._step_time - first_time) / (self._step - first_step)
        return max(step_seconds * (self.steps - self._step) - (time.monotonic() - self._step_time), 0.0)

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
        lines = wrap_cells(format_values(self._values), self.console.width)
        status = Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")
        return Group(head, *map(_draw_cells, lines), status)


def format_values(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) of the metrics to print, in the order of metrics_table.py; optional metrics only if nonzero."""
    shown = []
    for metric in CONSOLE_METRICS:
        value = values.get(metric.name)
        if value is not None and not (metric.optional and not value):
            shown.append((metric.label, metric.value_format.format(value)))
    for name, value in values.items():
        if name.endswith(BITS_SUFFIX) and value is not None:
            shown.append((f"{name.removesuffix(BITS_SUFFIX)} bits/byte", f"{value:.4f}"))
    return shown


def wrap_cells(cells: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Return cells in lines of at most `width` characters; a wider cell gets a separate line."""
    lines: list[list[tuple[str, str]]] = []
    free = 0
    for cell in cells:
        needed = max(map(cell_len, cell)) + GAP
        if not lines or needed - GAP > free:
            lines.append([])
            free = width
        lines[-1].append(cell)
        free -= needed
    return lines


def _draw_cells(cells: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, GAP, 0, 0))
    for _ in cells:
        table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row(*(Text(label, style="dim") for label, _ in cells))
    table.add_row(*(Text(text, style="bold") for _, text in cells))
    return table


def format_time(seconds: float) -> str:
    """Return a duration as text, for example 0:07, 12:30, 3:05:00 or 2 d 04:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def print_rows(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print a table of names and values under an optional title."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)


def print_scores(console: Console, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the bits per byte of the model and of general compressors on every validation set, if there are any sets."""
    if not scores:
        return
    table = Table(
        title="held-out bits per byte", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("set")
    for metric in VALIDATION_METRICS:
        table.add_column(metric.label, justify="right")
    compared = [metric.name for metric in VALIDATION_METRICS if metric.unit == "bits/byte"]
    for name, score in scores.items():
        best = min((score[key] for key in compared if score.get(key) is not None), default=None)
        cells = []
        for metric in VALIDATION_METRICS:
            value = score.get(metric.name)
            is_best = metric.name in compared and value == best
            cells.append(
                Text("" if value is None else metric.value_format.format(value), style="bold" if is_best else "")
            )
        table.add_row(Text(name), *cells)
    console.print(table)
