# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""DirectFile: writes at any offset, with and without O_DIRECT."""

import concurrent.futures
import itertools
import os
import zipfile

import numpy as np
import pytest

from mesh_transformer.storage import direct_io
from mesh_transformer.storage.direct_io import BLOCK, MIN_DIRECT_BYTES, STAGING_BYTES, DirectFile

SIZE = 5 * STAGING_BYTES + 123


@pytest.fixture(params=["direct", "plain"])
def direct_sizes(request, monkeypatch):
    """Return the sizes of O_DIRECT writes; with "plain" the file system does not support them."""
    sizes = []
    write_all = direct_io._write_all

    def count(descriptor, values, offset, fallback=None):
        if fallback is not None:
            assert not offset % BLOCK
            assert not len(values) % BLOCK
            sizes.append(len(values))
        write_all(descriptor, values, offset, fallback)

    monkeypatch.setattr(direct_io, "_write_all", count)
    if request.param == "plain":
        real = os.open

        def refuse(path, flags, *mode):
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return real(path, flags, *mode)

        monkeypatch.setattr(os, "open", refuse)
    yield sizes
    if request.param == "plain":
        assert not sizes


def test_parts_in_any_order_from_several_threads(tmp_path, direct_sizes):
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 256, SIZE, np.uint8)
    cuts = np.unique([0, *rng.integers(0, SIZE, 12), 17, 17 + MIN_DIRECT_BYTES, BLOCK, SIZE])
    parts = rng.permutation(list(itertools.pairwise(cuts)))
    path = tmp_path / "file"
    with DirectFile(path) as file, concurrent.futures.ThreadPoolExecutor(3) as threads:
        counts = threads.map(lambda part: file.write_at(wanted[part[0] : part[1]].data, int(part[0])), parts)
        assert list(counts) == [last - first for first, last in parts]
        file.sync()
    assert path.read_bytes() == wanted.tobytes()
    assert not direct_sizes or sum(direct_sizes) > SIZE / 2


@pytest.mark.usefixtures("direct_sizes")
def test_a_partial_write_keeps_the_rest(tmp_path):
    path = tmp_path / "file"
    before = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    path.write_bytes(before.tobytes())
    after = before.copy()
    after[1001 : 1001 + 3 * MIN_DIRECT_BYTES] = 7
    with DirectFile(path, truncate=False) as file:
        file.write_at(bytes([7]) * (3 * MIN_DIRECT_BYTES), 1001)
    assert path.read_bytes() == after.tobytes()
    DirectFile(path).close()
    assert path.read_bytes() == b""


@pytest.mark.usefixtures("direct_sizes")
def test_zip_archives(tmp_path):
    members = {f"{i}": np.random.default_rng(i).bytes(i * STAGING_BYTES // 3 + i) for i in range(6)}
    with DirectFile(tmp_path / "zip") as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    with zipfile.ZipFile(tmp_path / "zip") as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == members


def test_after_a_short_write_the_fallback_is_used(tmp_path, monkeypatch):
    wanted = np.random.default_rng(2).integers(0, 256, 4 * MIN_DIRECT_BYTES, np.uint8)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: min(real(fd, data, offset), 5000))
    with DirectFile(tmp_path / "file") as file:
        file.write_at(wanted.data, 0)
    assert (tmp_path / "file").read_bytes() == wanted.tobytes()
