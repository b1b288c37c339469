# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Incomplete stages are detected: lost parts, killed workers, truncated files and full disks."""

import dataclasses
import json
import os
import resource
import signal
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
from mesh_transformer.corpus.parts import PartWriter, read_documents
from mesh_transformer.corpus.stages import CorpusError, Executor, run_stage
from mesh_transformer.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Write:
    """Task that writes its number; part 1 fails in the way that `fails` names."""

    folder: Path
    fails: str = ""

    def __call__(self, rank: int) -> dict:
        with open(self.folder / "made", "a") as file:
            file.write(f"{rank}\n")
        if rank == 1 and self.fails == "raise":
            raise DataError("the source is damaged")
        if rank == 1 and self.fails == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        path = self.folder / f"{rank}.txt"
        path.write_text(f"part {rank}")
        return {
            "number": rank,
            "outputs": {path.name: {"size": path.stat().st_size + (self.fails == "short" and rank == 1)}},
        }


def made(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "made").read_text().split())


def test_parts_are_made_once(tmp_path):
    progress = []
    records = run_stage("write", Write(tmp_path), 3, tmp_path, Executor(), lambda *update: progress.append(update))
    assert [record["number"] for record in records] == [0, 1, 2]
    assert progress[-1] == ("write", 3, 3)
    assert run_stage("write", Write(tmp_path), 3, tmp_path, Executor()) == records
    assert made(tmp_path) == [0, 1, 2]


def test_a_failed_part_is_raised_and_made_by_the_next_run(tmp_path):
    with pytest.raises(DataError, match="the source is damaged"):
        run_stage("write", Write(tmp_path, "raise"), 3, tmp_path, Executor())
    assert len(run_stage("write", Write(tmp_path), 3, tmp_path, Executor())) == 3
    assert made(tmp_path) == [0, 1, 1, 2]


def test_a_killed_worker_is_detected(tmp_path):
    with pytest.raises(CorpusError, match="one of 2 workers was killed, most likely because memory ran out"):
        run_stage("write", Write(tmp_path, "kill"), 3, tmp_path, Executor(workers=2))
    assert len(run_stage("write", Write(tmp_path), 3, tmp_path, Executor())) == 3


def test_a_part_with_a_truncated_or_missing_file_is_not_done(tmp_path):
    with pytest.raises(CorpusError, match=r"stage write: 1 of 3 parts are incomplete .1."):
        run_stage("write", Write(tmp_path, "short"), 3, tmp_path, Executor())
    run_stage("write", Write(tmp_path), 3, tmp_path, Executor())
    (tmp_path / "2.txt").unlink()
    run_stage("write", Write(tmp_path), 3, tmp_path, Executor())
    assert made(tmp_path) == [0, 1, 1, 2, 2]
    (tmp_path / "records" / "00000.json").write_text("{")
    with pytest.raises(DataError, match=r"00000.json: invalid JSON in the record of a part"):
        run_stage("write", Write(tmp_path), 3, tmp_path, Executor())


def test_a_part_that_datatrove_marks_complete_needs_its_record(tmp_path):
    run_stage("write", Write(tmp_path), 2, tmp_path, Executor())
    (tmp_path / "records" / "00001.json").unlink()
    assert (tmp_path / "log" / "completions" / "00001").is_file()
    run_stage("write", Write(tmp_path), 2, tmp_path, Executor())
    assert made(tmp_path) == [0, 1, 1]


@pytest.fixture
def small_files():
    """Limit files to 64 kB, to simulate a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_no_part(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    noise = os.urandom(200_000).hex()

    def write():
        with PartWriter(path) as part:
            part.add(noise, "a", {})

    with pytest.raises(OSError, match="File too large"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_truncated_and_missing_parts_are_errors(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with PartWriter(path) as part:
        part.add("Grüße\n", "a:1", {"side": "train"})
        part.add("zwei", "a:2", {})
    assert [record["text"] for record in read_documents(path)] == ["Grüße\n", "zwei"]
    assert part.describe() == {"documents": 2, "bytes": 12, "size": path.stat().st_size, "digest": part.digest}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="truncated archive"):
        list(read_documents(path))
    path.unlink()
    with pytest.raises(DataError, match="a part of the corpus is missing"):
        list(read_documents(path))


def test_records_are_json(tmp_path):
    run_stage("write", Write(tmp_path), 1, tmp_path, Executor())
    assert json.loads((tmp_path / "records" / "00000.json").read_text())["number"] == 0
