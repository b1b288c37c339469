# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The resume log: results of earlier attempts at the same job are reused, others are discarded."""

import json

import pytest

from mesh_transformer.storage.resume_log import LOG_FILE, ResumeLog, open_staging_log


def test_a_second_attempt_has_the_results_of_the_first(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with ResumeLog(path, {"model": "a"}) as log:
        assert log.get("x") is None
        log.add("x", [1.5, True])
        log.add("y", "text")
    with ResumeLog(path, {"model": "a"}) as log:
        assert log.n_resumed == 2
        assert log.get("x") == [1.5, True]
        log.add("z", None)
        log.delete()
    assert not path.exists()
    with ResumeLog(path, {"model": "a"}) as log:
        assert log.done == {}


def test_a_log_of_another_job_is_discarded(tmp_path):
    path = tmp_path / "log.jsonl"
    with ResumeLog(path, {"model": "a"}) as log:
        log.add("x", 1)
    with ResumeLog(path, {"model": "b"}) as log:
        assert log.done == {}
    assert path.read_text() == '{"model": "b"}\n'


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "log.jsonl"
    with ResumeLog(path, {"model": "a"}) as log:
        log.add("x", 1)
    with open(path, "a") as file:
        file.write('["half a li')
    with ResumeLog(path, {"model": "a"}) as log:
        assert log.done == {"x": 1}
        log.add("y", 2)
    with ResumeLog(path, {"model": "a"}) as log:
        assert log.done == {"x": 1, "y": 2}


@pytest.mark.parametrize("damage", ["nonsense", "[1]", "[1, 2, 3]", '{"key": "y"}', "7"])
def test_a_damaged_log_is_discarded(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    path.write_text('{"model": "a"}\n["x", 1]\n' + damage + "\n")
    with ResumeLog(path, {"model": "a"}) as log:
        assert log.done == {}
    assert path.read_text() == '{"model": "a"}\n'


def test_logs_of_version_1_are_read(tmp_path):
    evaluation = tmp_path / "evaluation_5.partial.jsonl"
    evaluation.write_text('{"model": "a"}\n{"key": "x", "is": [-2.5, false]}\n')
    with ResumeLog(evaluation, {"model": "a"}) as log:
        assert log.done == {"x": [-2.5, False]}
        log.add("y", 1)
    with ResumeLog(evaluation, {"model": "a"}) as log:
        assert log.done == {"x": [-2.5, False], "y": 1}
    (tmp_path / LOG_FILE).write_text(json.dumps({"conversion": {"source": "a"}}) + '\n["block", true]\n')
    with open_staging_log(tmp_path, {"source": "a"}) as log:
        assert log.done == {"block": True}


def test_the_staging_folder_of_another_conversion_is_emptied(tmp_path):
    staging = tmp_path / "x.partial"
    with open_staging_log(staging, {"source": "a"}) as log:
        log.add("block", 1)
    (staging / "data").write_text("of a")
    with open_staging_log(staging, {"source": "a"}) as log:
        assert log.done == {"block": 1}
    assert (staging / "data").exists()
    with open_staging_log(staging, {"source": "b"}) as log:
        assert log.done == {}
    assert not (staging / "data").exists()
