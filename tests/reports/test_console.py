# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Console output: plain lines in pipes and files, a live display on a terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from mesh_transformer.reports.console import Progress, format_time, print_rows, print_scores, wrap_cells

ROOT = Path(__file__).parents[2]
VALUES = {
    "loss": 2.34567,
    "learning_rate": 3e-4,
    "grad_norm": 0.421,
    "tokens_per_s": 123456.7,
    "mfu": 0.4321,
    "noise_scale": 123.4,
    "skipped": 0,
    "step_ms": 12.0,
}
PROGRAM = f"""
from mesh_transformer.reports.console import Progress
with Progress("run[/x]", 30, 10) as progress:
    progress.note("resumed [bold]from[/bold] :smile:")
    progress.update(20, {VALUES!r})
    progress.update(30, {VALUES | {"skipped": 1234, "loss": None}!r})
    progress.show_validation("web", 1, 2)
    progress.update(30, {{"web[/x]_bits_per_byte": 1.25}})
"""
GOLDEN = """\
resumed [bold]from[/bold] :smile:
step 20/30  loss 2.3457  learning rate 3.00e-04  grad norm 0.42  tokens/s 123,457  MFU 43%  noise scale 123
step 30/30  learning rate 3.00e-04  grad norm 0.42  tokens/s 123,457  MFU 43%  noise scale 123  skipped 1,234
step 30/30  web[/x] bits/byte 1.2500
"""


def environment(**more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return {name: value for name, value in (clean | own | more).items() if value}


def run_on_terminal(program: str, *, width: int = 80, **more: str) -> str:
    """Return the output of a program on a terminal of this width."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with subprocess.Popen([sys.executable, "-c", program], stdout=secondary, env=environment(**more)) as writer:
        os.close(secondary)
        written = b""
        while True:
            try:
                part = os.read(primary, 65536)
            except OSError:  # on Linux: the other end is closed
                break
            if not part:
                break
            written += part
        assert writer.wait(60) == 0
    os.close(primary)
    return written.decode()


@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}])
def test_a_pipe_gets_plain_lines(forced):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment(**forced), check=True
    )
    assert ended.stdout == GOLDEN
    assert ended.stderr == ""


def test_a_terminal_gets_a_live_display():
    written = run_on_terminal(PROGRAM)
    assert "\x1b[?25l" in written, "the cursor is hidden"
    assert written.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in written[-20:], "and shown again"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "")
    assert "run[/x]" in plain
    assert "30/30" in plain
    assert "resumed [bold]from[/bold] :smile:" in plain
    assert "web[/x] bits/byte" in plain
    assert "1.2500" in plain
    assert "step 20/30" not in plain
    assert all(len(line) <= 80 for line in plain.splitlines())


def test_no_color_is_respected():
    colors = re.compile(r"\x1b\[[0-9;]*(3[0-7]|38;[0-9;]+|9[0-7])m")
    assert colors.search(run_on_terminal(PROGRAM))
    assert not colors.search(run_on_terminal(PROGRAM, NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_lines():
    written = run_on_terminal(PROGRAM, width=200, TERM="dumb")
    assert written.replace("\r\n", "\n") == GOLDEN


def test_time_left_excludes_compilation(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mesh_transformer.reports.console.time.monotonic", lambda: clock[0])
    out = io.StringIO()
    with Progress("run", 100, 40, console=Console(file=out, width=200)) as progress:
        for step, seconds in ((50, 600.0), (60, 610.0), (80, 630.0), (100, 650.0)):  # 9 minutes of compiling
            clock[0] = seconds
            progress.update(step, {"loss": 1.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 50/100  loss 1.0000"
    assert lines[1] == "step 60/100  loss 1.0000  0:40 left"
    assert lines[2] == "step 80/100  loss 1.0000  0:20 left"
    assert lines[3] == "step 100/100  loss 1.0000"


def test_missing_and_non_finite_values():
    out = io.StringIO()
    with Progress("run", 2, console=Console(file=out, width=200)) as progress:
        progress.update(1, {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None, "noise_scale": float("nan")})
    assert out.getvalue() == "step 1/2  loss nan  grad norm inf  noise scale nan\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11_100, "3:05:00"), (187_200, "2 d 04:00:00")],
)
def test_format_time(seconds, text):
    assert format_time(seconds) == text


def test_cells_wrap_at_the_width():
    cells = [("aaaa", "1"), ("b", "22222"), ("cc", "3"), ("x" * 40, "4")]
    assert wrap_cells(cells, 12) == [cells[:2], [cells[2]], [cells[3]]]
    assert wrap_cells(cells, 11) == [[cells[0]], [cells[1], cells[2]], [cells[3]]]
    assert wrap_cells(cells, 200) == [cells]
    assert wrap_cells([], 80) == []


def test_rows_and_scores_print_markup_literally():
    out = io.StringIO()
    console = Console(file=out, width=80)
    print_rows(console, "a [run]", {"run": "runs/[/x]", "devices": "8 x CPU"})
    print_scores(console, {})
    print_scores(
        console,
        {
            "stdlib[/x]": {
                "bits_per_byte": 1.473,
                "loss": 1.11,
                "perplexity": 3.034,
                "xz_bits_per_byte": 1.752,
                "gzip_bits_per_byte": 2.0314,
            },
            "web": {"bits_per_byte": 1.6, "loss": None, "perplexity": None},
        },
    )
    written = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    assert written == (
        "a [run]\n"
        "run      runs/[/x]\n"
        "devices  8 x CPU\n"
        "held-out bits per byte\n"
        "set         this model  xz -9  gzip -9    loss  perplexity\n"
        "stdlib[/x]       1.473  1.752    2.031  1.1100       3.034\n"
        "web              1.600"
    )
