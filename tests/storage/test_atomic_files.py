# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""replace_file is atomic; LineFile loses no line on a full disk."""

import contextlib
import os

import pytest

from mesh_transformer.storage.atomic_files import LineFile, replace_file


def fill(folder):
    """Fill a file system; return the file that occupies the space."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return ballast


def test_replacement_is_atomic(small_disk):
    path = small_disk / "file"
    replace_file(path, b"first")
    ballast = fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, bytes(100_000))
    assert path.read_bytes() == b"first"
    assert sorted(os.listdir(small_disk)) == ["ballast", "file"]
    ballast.unlink()
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"


def test_lines_are_buffered_while_the_disk_is_full(small_disk, capsys):
    log = LineFile(small_disk / "log")
    lines = [b"%d " % i + bytes([65 + i % 26]) * 3000 for i in range(20)]
    log.write(lines[0])
    ballast = fill(small_disk)
    for line in lines[1:10]:
        log.write(line)
    assert (small_disk / "log").stat().st_size < sum(map(len, lines[:10]))
    assert capsys.readouterr().err.count("buffering lines in memory") == 1
    ballast.unlink()
    for line in lines[10:]:
        log.write(line)
    assert "all buffered lines are written" in capsys.readouterr().err
    log.close()
    assert (small_disk / "log").read_bytes() == b"".join(line + b"\n" for line in lines)


def test_close_reports_lost_bytes(small_disk):
    log = LineFile(small_disk / "log")
    fill(small_disk)
    log.write(bytes(10_000))
    with pytest.raises(OSError, match=r"No space left on device: the last \d+ bytes could not be written"):
        log.close()


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    log = LineFile(path)
    log.write(b"three")
    log.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"
