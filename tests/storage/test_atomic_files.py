# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A file is replaced whole or not at all; a log goes on where a full disk stopped it, without a gap."""

import contextlib
import os

import pytest

from mesh_transformer.storage.atomic_files import LineFile, replace_file


def fill(folder):
    """Take all room of a file system; the file that does."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return ballast


def test_replaced_whole_or_not_at_all(small_disk):
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


def test_lines_wait_for_room(small_disk, capsys):
    log = LineFile(small_disk / "log")
    lines = [b"%d " % i + bytes([65 + i % 26]) * 3000 for i in range(20)]
    log.write(lines[0])
    ballast = fill(small_disk)
    for line in lines[1:10]:
        log.write(line)
    assert (small_disk / "log").stat().st_size < sum(map(len, lines[:10]))
    assert capsys.readouterr().err.count("lines wait in memory") == 1
    ballast.unlink()
    for line in lines[10:]:
        log.write(line)
    assert "has all its lines again" in capsys.readouterr().err
    log.close()
    assert (small_disk / "log").read_bytes() == b"".join(line + b"\n" for line in lines)


def test_what_is_lost_in_the_end_is_said(small_disk):
    log = LineFile(small_disk / "log")
    fill(small_disk)
    log.write(bytes(10_000))
    with pytest.raises(OSError, match=r"No space left on device: \d+ bytes are lost"):
        log.close()


def test_a_cut_line_is_removed_before_more_are_written(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    log = LineFile(path)
    log.write(b"three")
    log.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"
