# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Building shards: the same bytes after any interruptions, and never stale."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mesh_transformer.config import ConfigError, load_config
from mesh_transformer.data import shard_builder
from mesh_transformer.data.dataset import open_data, preview_sequences
from mesh_transformer.data.errors import DataError
from mesh_transformer.data.shards import TokenShard
from mesh_transformer.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
BYTES = load_tokenizer("bytes")


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    for i in range(60):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {i}: " + "é" * i)
    return folder


def make(source, tmp_path, **options):
    return shard_builder.build_shards(str(source), BYTES, tmp_path / "cache", **options)


def decode_all(prefix) -> list[str]:
    shard = TokenShard(prefix)
    assert all(shard.document(i)[-1] == BYTES.end_of_text for i in range(shard.n_documents))
    return [BYTES.decode(shard.document(i)[:-1]) for i in range(shard.n_documents)]


def test_documents_are_split_by_the_documented_rule(texts, tmp_path):
    built = make(texts, tmp_path, holdout=5)
    names = sorted(path.relative_to(texts).as_posix() for path in texts.rglob("*.txt"))
    expected = {"train": [], "heldout": []}
    for name in names:
        split = "heldout" if xxhash.xxh3_64_intdigest(name.encode()) % 5 == 0 else "train"
        expected[split].append((texts / name).read_text())
    assert expected["heldout"]
    for split, documents in expected.items():
        assert decode_all(built[split].prefix) == documents
        assert built[split].n_documents == len(documents)
        assert built[split].n_bytes == sum(len(text.encode()) for text in documents)
        assert built[split].n_tokens == built[split].n_bytes + len(documents)
    (texts / "part0" / "new.txt").write_text("another")
    again = make(texts, tmp_path, holdout=5)
    assert set(decode_all(built["heldout"].prefix)) <= set(decode_all(again["heldout"].prefix))


def test_the_cache_is_used_until_something_changes(texts, tmp_path):
    first = make(texts, tmp_path)["train"].prefix
    stamp = os.stat(f"{first}.bin").st_mtime_ns
    assert make(texts, tmp_path)["train"].prefix == first
    assert os.stat(f"{first}.bin").st_mtime_ns == stamp
    (texts / "part1" / "1.txt").write_text("changed")
    changed = make(texts, tmp_path)["train"]
    assert changed.prefix != first
    assert "changed" in decode_all(changed.prefix)
    assert make(texts, tmp_path, holdout=5)["train"].prefix != changed.prefix


def test_workers_and_parts_do_not_change_the_bytes(texts, tmp_path, monkeypatch):
    single = make(texts, tmp_path / "one")["train"].prefix
    monkeypatch.setattr(shard_builder, "PART_BYTES", 500)
    parts = make(texts, tmp_path / "many", workers=2)["train"].prefix
    for suffix in ("bin", "idx"):
        assert Path(f"{single}.{suffix}").read_bytes() == Path(f"{parts}.{suffix}").read_bytes()


def test_builders_at_the_same_time_share_one_result(texts, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(make(texts, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len({str(result["train"].prefix) for result in results}) == 1
    assert len(decode_all(results[0]["train"].prefix)) == 60


def test_an_empty_split_and_a_shard_with_holdout_are_refused(texts, tmp_path):
    with pytest.raises(DataError, match=r"the validation split is empty.*data\.holdout_one_in=100000"):
        make(texts, tmp_path, holdout=100_000)
    prefix = make(texts, tmp_path)["train"].prefix
    used = make(prefix, tmp_path)["train"]
    assert (used.n_tokens, used.n_bytes) == (
        make(texts, tmp_path)["train"].n_tokens,
        make(texts, tmp_path)["train"].n_bytes,
    )
    with pytest.raises(DataError, match="stores no document names"):
        make(prefix, tmp_path, holdout=5)


def test_bad_documents_stop_or_are_counted(texts, tmp_path):
    (texts / "part2" / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"bad\.txt"):
        make(texts, tmp_path)
    built = make(texts, tmp_path, on_bad="skip")["train"]
    assert built.n_documents == 60
    assert any("bad.txt" in note for note in built.notes)


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        lines = (json.dumps({"text": rng.bytes(3000).hex()}) for _ in range(700))
        (source / f"{i:02}.jsonl").write_text("\n".join(lines))
    reference = shard_builder.build_shards(str(source), BYTES, tmp_path / "reference")["train"].prefix

    def start() -> subprocess.Popen:
        program = f"""
from mesh_transformer.data import shard_builder
from mesh_transformer.data.tokenizers import load_tokenizer
shard_builder.PART_BYTES = 5_000_000
print("go", flush=True)
shard_builder.build_shards({str(source)!r}, load_tokenizer("bytes"), {str(tmp_path / "cache")!r})
"""
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=-1, stderr=-1)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    killed = 0
    for seconds in (0.05, 0.2, 0.35):
        process = start()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 1
    process = start()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    prefix = shard_builder.build_shards(str(source), BYTES, tmp_path / "cache")["train"].prefix
    for suffix in ("bin", "idx"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == Path(f"{reference}.{suffix}").read_bytes()
    assert not list((tmp_path / "cache").glob("*.parts"))


def test_workers_end_with_a_killed_builder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(4):
        (source / f"{i}.txt").write_text("x" * 100_000)
    program = f"""
from pathlib import Path
from mesh_transformer.data import shard_builder
from mesh_transformer.data.tokenizers import load_tokenizer
if __name__ == "__main__":
    shard_builder.PART_BYTES = 1000
    shard_builder.build_shards({str(source)!r}, load_tokenizer("bytes"), {str(tmp_path / "cache")!r}, workers=2,
        on_progress=lambda *_: (print("part", flush=True), input()))
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stdin=-1, stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"part\n"
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(child) for child in tasks.read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(_is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker survived its builder"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_leftovers_of_a_killed_join_are_removed_and_a_part_without_its_shard_is_made_again(
    texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_builder, "PART_BYTES", 500)
    reference = make(texts, tmp_path / "reference")["train"].prefix
    with monkeypatch.context() as patch:
        patch.setattr(shard_builder, "_join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(texts, tmp_path)
    cache = tmp_path / "cache"
    (parts,) = cache.glob("*.parts")
    records = sorted(parts.glob("*.json"))
    assert len(records) > 1
    records[1].with_name(records[1].stem + "-train.bin").unlink()
    leftover = cache / f"{parts.stem}-train.tmp-123.bin"
    leftover.write_bytes(b"partial")
    made = make(texts, tmp_path)["train"].prefix
    assert not leftover.exists()
    for suffix in ("bin", "idx"):
        assert Path(f"{made}.{suffix}").read_bytes() == Path(f"{reference}.{suffix}").read_bytes()


def test_make_shards_program(texts, tmp_path):
    arguments = [texts, tmp_path / "out", "--holdout", "5", "--cache-dir", tmp_path / "cache", "--workers", "1"]
    call = [sys.executable, "scripts/make_shards.py", *map(str, arguments)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MB/s" in done.stdout
    assert len(decode_all(tmp_path / "out-train")) + len(decode_all(tmp_path / "out-heldout")) == 60
    again = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_a_run_opens_its_data_and_previews_it(texts, tmp_path):
    config_file = tmp_path / "run.toml"
    config_file.write_text(f"""
[model]
n_layers = 1
d_model = 8
n_heads = 1
n_vocab = 257
seq_len = 16
[data]
holdout_one_in = 5
cache_dir = "{tmp_path / "cache"}"
[data.train.texts]
path = "{texts}"
[train]
steps = 10
batch_size = 4
""")
    config = load_config(config_file)
    data = open_data(config)
    text = preview_sequences(config, data, 2)
    assert "sequence 1: texts" in text
    assert BYTES.decode(data.train.batch(0, 1).tokens[0]) in text
    assert f"{10 * 4 * 16:,} tokens" in text
    held_out = decode_all(make(texts, tmp_path, holdout=5)["heldout"].prefix)
    assert data.validation["texts"].text().decode() == "".join(held_out)
    with pytest.raises(ConfigError, match=r"n_vocab=256 is smaller than the tokenizer's 257.*model\.n_vocab=320"):
        open_data(load_config(config_file, ["model.n_vocab=256"]))
    with pytest.raises(ConfigError, match=r"data\.max_epochs=0\.1"):
        open_data(load_config(config_file, ["data.max_epochs=0.1"]))
    with pytest.raises(DataError, match=r"dataset 'texts': .*did you mean"):
        open_data(load_config(config_file, [f'data.train.texts.path="{tmp_path / "text"}"']))
