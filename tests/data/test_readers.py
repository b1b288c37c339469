# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Dataset readers: damage is an error with file and line, or counted; compression does not change documents."""

import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mesh_transformer.data import compression, readers
from mesh_transformer.data.errors import DataError, Document, SkippedDocuments
from mesh_transformer.data.readers import (
    find_files,
    find_root,
    read_documents,
    read_file,
)

N = 1000
RANDOM = random.Random(0)
TEXTS = [f"Document {i}: \u4e2d\U0001f600é " + " ".join(RANDOM.choices("abcdefghij", k=300)) for i in range(N)]
LINES = "".join(json.dumps({"meta": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
UNDAMAGED = Document("undamaged", "a.txt")


def zst(data: bytes, *, checksum: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=3, write_checksum=checksum).compress(data)


def flip(data: bytes, where: float) -> bytes:
    position = int(len(data) * where)
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def lines(*objects: object) -> bytes:
    return b"".join(o if isinstance(o, bytes) else json.dumps(o).encode() + b"\n" for o in objects)


GOOD = {"text": "good"}
SKIPPABLE = (0x184D2A53).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"


class Bad(NamedTuple):
    file: str
    data: bytes
    line: str  # after the file's name, in the message
    kind: str
    message: str
    good: int | None  # documents used under on_bad="skip"; None: some, fewer than all
    count: int = 1


BAD = [
    Bad("half.jsonl.zst", zst(LINES)[: len(zst(LINES)) // 2], "", "truncated archive", "ends at byte", None),
    Bad("last.jsonl.zst", zst(LINES)[:-1], "", "truncated archive", f"byte {len(zst(LINES)) - 1:,}, ", N),
    Bad("header.jsonl.zst", zst(LINES)[:3], "", "truncated archive", "ends at byte 3", 0),
    Bad(
        "second.jsonl.zst", zst(LINES) + zst(LINES)[:-1], "", "truncated archive", f"at byte {len(zst(LINES)):,}", 2 * N
    ),
    Bad("trailing.jsonl.zst", zst(LINES) + b"garbage", "", "damaged archive", f"from byte {len(zst(LINES)):,}", N),
    Bad("skippable.jsonl.zst", zst(LINES) + SKIPPABLE[:-1], "", "truncated archive", "ends at", N),
    Bad("flip.jsonl.zst", flip(zst(LINES), 0.5), "", "damaged archive", "damaged archive near byte", None),
    Bad("half.jsonl.gz", gzip.compress(LINES)[: len(gzip.compress(LINES)) // 2], "", "truncated archive", "ends", None),
    Bad("last.jsonl.gz", gzip.compress(LINES)[:-1], "", "truncated archive", "ends at byte", N),
    Bad("crc.jsonl.gz", flip(gzip.compress(LINES), 0.9999), "", "damaged archive", "incorrect", None),
    Bad("trailing.jsonl.gz", gzip.compress(LINES) + b"garbage", "", "damaged archive", "from byte", N),
    Bad("plain.jsonl.gz", LINES, "", "damaged archive", "byte 0", 0),
    Bad("text.txt.zst", zst(b"words " * 99999)[:-2], "", "truncated archive", "ends at", 0),
    Bad("empty.jsonl", b"", "", "empty file", "the file is empty", 0),
    Bad("empty.jsonl.zst", b"", "", "empty file", "the archive is empty", 0),
    Bad("utf8.jsonl", lines(GOOD, b'{"text": "\xff"}\n', GOOD), ":2", "bad UTF-8", "byte 10 (0xff)", 2),
    Bad("utf8.txt", b"one\ntwo\nthr\xc3\x28ee", ":3", "bad UTF-8", "byte 11 (0xc3)", 0),
    Bad("cut.txt", "ends inside é".encode()[:-1], "", "bad UTF-8", "not valid UTF-8", 0),
    Bad("utf16.txt", "some text".encode("utf-16"), "", "bad UTF-8", "UTF-16", 0),
    Bad("surrogate.jsonl", lines(b'{"text": "a\\ud800b"}\n', GOOD), ":1", "lone surrogate", "U+D800 at character 1", 1),
    Bad("broken.jsonl", lines(GOOD, b'{"text": "a"\n', GOOD), ":2", "broken JSON", "column", 2),
    Bad("cut.jsonl", lines(GOOD, b'{"text": "the las'), ":2", "broken JSON", "each line must be one JSON object", 1),
    Bad("list.jsonl", lines(GOOD, ["text"]), ":2", "not an object", "got a list", 1),
    Bad("number.jsonl", lines(7, GOOD), ":1", "not an object", "got a number", 1),
    Bad("string.jsonl", lines("text", GOOD), ":1", "not an object", "got a string", 1),
    Bad("null.jsonl", lines(None, GOOD), ":1", "not an object", "got null", 1),
    Bad(
        "key.jsonl",
        lines(GOOD, {"content": "x", "id": 1}),
        ":2",
        "no text",
        "no key 'text'; set text_key to one of the keys: 'content', 'id'",
        1,
    ),
    Bad("nulltext.jsonl", lines({"text": None}, GOOD), ":1", "not text", "'text' is null, expected a string", 1),
    Bad("listtext.jsonl", lines(GOOD, GOOD, {"text": ["a"]}), ":3", "not text", "'text' is a list, expected", 2),
    Bad("nul.jsonl", lines(GOOD, {"text": "a\nb\0c"}), ":2", "NUL", "character 3 (line 2", 1),
    Bad("raw_nul.jsonl", lines(GOOD, b"\0" * 512 + b"\n", GOOD), ":2", "broken JSON", "column 1", 2),
    Bad("nul.txt", b"\0" * 4096, "", "NUL", "binary or damaged", 0),
    Bad("deep.jsonl", lines(b"[" * 200_000 + b"\n", GOOD), ":1", "broken JSON", "nested too deeply", 1),
    Bad("digits.jsonl", lines(b'{"n": ' + b"7" * 9999 + b"}\n", GOOD), ":1", "broken JSON", "cannot be parsed", 1),
    Bad(
        "pretty.json",
        json.dumps(GOOD, indent=1).encode(),
        ":1",
        "broken JSON",
        "each line must be one JSON object",
        0,
        3,
    ),
    Bad("coding.py", b"# coding: klingon\nx = 1\n", "", "bad encoding", "klingon", 0),
    Bad("latin.py", b"name = '\xe9'\n", "", "bad encoding", "cannot be decoded as Python source", 0),
    Bad("picture.png", b"\x89PNG\r\n\x1a\n\0\0", ":1", "bad UTF-8", "binary", 0),
    Bad("many.tar.gz", gzip.compress(b"x"), "", "unreadable type", "unpack it first", 0),
    Bad("many.zip", b"PK", "", "unreadable type", "unpack it first", 0),
    Bad("tokens.bin", b"\1\0", "", "unreadable type", "the prefix of the pair", 0),
    Bad("old.txt.xz", b"\xfd7zXZ", "", "unreadable type", "use .zst or .gz", 0),
    Bad("table.parquet", b"PAR1 and no more", "", "broken Parquet", "damaged or truncated Parquet file", 0),
    Bad("table.parquet.zst", zst(b"PAR1"), "", "unreadable type", "decompress it first", 0),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.file)
def test_damage_is_an_error_with_file_and_line_or_counted(tmp_path: Path, bad: Bad) -> None:
    file = tmp_path / bad.file
    file.write_bytes(bad.data)
    with pytest.raises(DataError) as caught:
        list(read_documents(tmp_path))
    assert str(caught.value).startswith(f"{file}{bad.line}: ")
    assert bad.message in str(caught.value)
    assert "\n" not in str(caught.value)

    (tmp_path / UNDAMAGED.name).write_text(UNDAMAGED.text)  # other documents are used
    count = SkippedDocuments()
    documents = list(read_documents(tmp_path, on_bad="skip", skipped=count))
    assert count.counts == {bad.kind: bad.count}
    assert count.examples[bad.kind][0] == str(caught.value)
    assert UNDAMAGED in documents
    used = len(documents) - 1
    if bad.good is None:
        assert 0 < used < N
        if bad.kind == "truncated archive":
            assert [d.text for d in documents if d != UNDAMAGED] == TEXTS[:used]
    else:
        assert used == bad.good


PACKED = {
    "plain.jsonl": LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "no_last_newline.jsonl": LINES.rstrip(),
    "blank.ndjson": LINES.replace(b"\n", b"\n\n \t\n"),
    "one.jsonl.zst": zst(LINES),
    "no_checksum.jsonl.zst": zst(LINES, checksum=False),
    "two.jsonl.zst": zst(LINES[:5000]) + zst(LINES[5000:]),
    "many.jsonl.zst": b"".join(zst(LINES[i : i + 977]) for i in range(0, len(LINES), 977)),
    "skippable.jsonl.zst": SKIPPABLE + zst(LINES[:70]) + SKIPPABLE + zst(b"") + zst(LINES[70:]) + SKIPPABLE,
    "one.jsonl.gz": gzip.compress(LINES),
    "two.json.gz": gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:]),
    "padded.JSONL.GZ": gzip.compress(LINES) + b"\0" * 3000,
}


@pytest.mark.parametrize("name", PACKED)
def test_packing_does_not_change_documents(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(PACKED[name])
    documents = list(read_documents(file))
    assert [d.text for d in documents] == TEXTS
    if name != "blank.ndjson":
        assert [d.name for d in documents] == [f"{name}:{i}" for i in range(1, len(TEXTS) + 1)]


def test_streams_without_a_size_in_the_frame(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    data = b"".join(compressor.compress(LINES[i : i + 1000]) for i in range(0, len(LINES), 1000)) + compressor.flush()
    assert data != zst(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert [d.text for d in read_documents(tmp_path)] == TEXTS


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """At each of these lengths, the stream readers of the zstandard package return partial data without an error."""
    few = LINES[:9000]
    for name, data in {"a.jsonl.zst": zst(few), "a.jsonl.gz": gzip.compress(few)}.items():
        for length in [*range(0, len(data), 37), *range(len(data) - 12, len(data))]:
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(DataError, match=r"ends at byte|the archive is empty"):
                list(read_documents(tmp_path / name))


def test_every_flipped_bit_that_matters_is_noticed(tmp_path: Path) -> None:
    """With the checksums of gzip and zstd. Both formats have a few header bits that do not affect the content."""
    few, rng = LINES[: LINES.rindex(b"\n", 0, 9000) + 1], random.Random(0)
    messages: list[str] = []
    for name, data in {"a.jsonl.zst": zst(few), "a.jsonl.gz": gzip.compress(few, mtime=0)}.items():
        file = tmp_path / name
        file.write_bytes(data)
        undamaged = list(read_documents(file))
        for _ in range(120):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            try:
                assert list(read_documents(file)) == undamaged
            except DataError as error:
                messages.append(str(error))
    assert all(str(tmp_path) in message for message in messages)
    assert len(messages) > 230


def test_text_files_have_unix_lines_and_no_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\rthree\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress("# Tïtle\r\n".encode()))
    (tmp_path / "c").write_bytes(b"no suffix")
    (tmp_path / "d.py").write_bytes("# -*- coding: latin-1 -*-\r\nx = 'é'\r\n".encode("latin-1"))
    assert list(read_documents(tmp_path)) == [
        Document("one\ntwo\r\rthree\n", "a.txt"),
        Document("# Tïtle\n", "b.md.gz"),
        Document("no suffix", "c"),
        Document("# -*- coding: latin-1 -*-\nx = 'é'\n", "d.py"),
    ]


def test_text_inside_json_stays_as_it_is(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\u2028\x85\x1c \U0001f600 "
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"body": text}) + "\n" + json.dumps({"body": text}, ensure_ascii=False)
    )
    assert [d.text for d in read_documents(tmp_path, text_key="body")] == [text, text]


def test_folders_are_read_in_one_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.txt", "a.txt", "b.txt", ".hidden", ".git/x.txt", "c/d/e.txt", "Ü.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}")
    names = [d.name for d in read_documents(tmp_path)]
    assert names == ["a.txt", "b.txt", "b/a.txt", "b/z.txt", "c/d/e.txt", "Ü.txt"]
    apart = [d for file in find_files(tmp_path) for d in read_file(file, find_root(tmp_path))]
    assert apart == list(read_documents(str(tmp_path)))
    assert [d.name for d in read_documents(tmp_path / "b" / "z.txt")] == ["z.txt"]


def test_links_are_followed_each_folder_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked")
    source = tmp_path / "source"
    source.mkdir()
    (source / "to").symlink_to(tmp_path / "elsewhere")
    (source / "again").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    assert [d.name for d in read_documents(source)] == ["again/a.txt"]
    (source / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        list(read_documents(source))


def test_missing_path_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"corpus\.json: no such file or folder; did you mean .*corpus\.jsonl\?"):
        read_documents(tmp_path / "corpus.json")
    with pytest.raises(DataError, match="did you mean python-stdlib"):
        read_documents("python-stdlb")
    with pytest.raises(DataError, match="no such file or folder"):
        read_documents(tmp_path / "no" / "folder" / "here")
    with pytest.raises(DataError, match="the dataset path is empty"):
        read_documents("")
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(DataError, match="empty: this folder has no files"):
        read_documents(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="this is a device or socket"):
        read_documents(tmp_path / "pipe")


def test_empty_texts_are_counted_and_a_dataset_of_them_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": ""}, GOOD, {"text": ""}))
    (tmp_path / "b.txt").write_bytes(b"")
    count = SkippedDocuments()
    assert [d.name for d in read_documents(tmp_path, skipped=count)] == ["a.jsonl:2"]
    assert count.counts == {"empty text": 3}
    with pytest.raises(
        DataError, match=r"b\.txt: this dataset has no usable document: skipped 1 documents \(empty text\)"
    ):
        list(read_documents(tmp_path / "b.txt"))
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="only blank lines"):
        list(read_documents(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(lines([], []))
    with pytest.raises(
        DataError, match=r"no usable document: skipped 2 documents \(not an object\); first: .*a\.jsonl:1"
    ):
        list(read_documents(tmp_path / "a.jsonl", on_bad="skip", skipped=SkippedDocuments()))


def test_skipping_needs_a_counter(tmp_path: Path) -> None:
    mode: Any = "ignore"
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match="needs skipped"):
        read_documents(tmp_path, on_bad="skip")
    with pytest.raises(ValueError, match="on_bad='ignore'"):
        read_file(tmp_path / "a.jsonl", tmp_path, on_bad=mode)


def test_counts_of_processes_add_up(tmp_path: Path) -> None:
    single, total = SkippedDocuments(), SkippedDocuments()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(lines(GOOD, [], [], {}))
    list(read_documents(tmp_path, on_bad="skip", skipped=single))
    for file in find_files(tmp_path):
        part = SkippedDocuments()
        list(read_file(file, tmp_path, on_bad="skip", skipped=part))
        assert part.total == 3
        total.merge(pickle.loads(pickle.dumps(part)))
    assert total.counts == single.counts == {"not an object": 6, "no text": 3}
    assert total.examples == single.examples
    assert total.summary_lines() == single.summary_lines()
    assert [len(examples) for examples in total.examples.values()] == [3, 3]
    assert total.summary_lines()[0].startswith(
        f"skipped 6 documents (not an object); first: {tmp_path}/a.jsonl:2: got a list"
    )


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    texts = [*TEXTS, None, "", "a\0b"]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file, row_group_size=90)
    with pytest.raises(DataError, match=rf"a\.parquet:{N + 1}: 'text' is null, expected a string"):
        list(read_documents(file))
    count = SkippedDocuments()
    documents = list(read_documents(file, on_bad="skip", skipped=count))
    assert documents == [Document(text, f"a.parquet:{i}") for i, text in enumerate(TEXTS, 1)]
    assert count.counts == {"not text": 1, "empty text": 1, "NUL": 1}
    with pytest.raises(DataError, match="no column 'body'; set text_key to one of the columns: 'id', 'text'"):
        list(read_documents(file, text_key="body"))
    with pytest.raises(DataError, match=r"a\.parquet:1: 'id' is a number, expected a string"):
        list(read_documents(file, text_key="id"))


def test_damaged_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, file, use_dictionary=False, write_page_checksum=True, compression="zstd")
    data = file.read_bytes()
    assert [d.text for d in read_documents(file)] == TEXTS
    for damaged in (flip(data, 0.3), flip(data, 0.5), data[:-1], data[: len(data) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet.*damaged or truncated Parquet file"):
            list(read_documents(file))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'mesh-transformer\[parquet\]'"):
        list(read_documents(tmp_path, on_bad="skip", skipped=SkippedDocuments()))


def test_long_lines_and_bounded_memory(tmp_path: Path) -> None:
    """Read a 100 MB line among short ones, and 150 MB of lines from a few KB in bounded memory."""
    long = "x" * 100_000_000
    frame = zst(lines({"text": long}))
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines(GOOD)) + frame + zst(lines(GOOD)))
    assert [len(d.text) for d in read_documents(tmp_path)] == [4, 100_000_000, 4]
    del long
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines({"text": "y" * 99_990}) * 1500))
    tracemalloc.start()
    try:
        assert sum(len(d.text) for d in read_documents(tmp_path)) == 1500 * 99_990
        assert tracemalloc.get_traced_memory()[1] < 75_000_000
    finally:
        tracemalloc.stop()


def test_endless_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_MAX_DOCUMENT_BYTES", 1_000_000)
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines(GOOD) + b" " * 5_000_000))
    with pytest.raises(DataError, match="the document has more than 1,000,000 bytes"):
        list(read_documents(tmp_path))
    (tmp_path / "a.jsonl.zst").rename(tmp_path / "a.txt.zst")
    with pytest.raises(DataError, match=r"use \.jsonl with one document per line"):
        list(read_documents(tmp_path))


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [file.relative_to(find_root("python-stdlib")).as_posix() for file in find_files("python-stdlib")]
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert len(names) > 400
    assert names == sorted(names)
    assert not [n for n in names if re.search(r"(^|/)(tests?|site-packages|dist-packages|__pycache__)/", n)]
    first = next(iter(read_documents("python-stdlib")))
    assert first == Document((find_root("python-stdlib") / first.name).read_text(encoding="utf-8"), names[0])

    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "notes.txt").write_text("not source")
    monkeypatch.setattr(readers.sysconfig, "get_path", lambda name: str(tmp_path))
    count = SkippedDocuments()
    assert [d.name for d in read_documents("python-stdlib", skipped=count)] == ["good.py"]
    assert count.counts == {"bad encoding": 1}


def test_file_names_that_are_not_unicode_are_escaped(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt"))).write_text("text")
    documents = list(read_documents(tmp_path))
    assert documents == [Document("text", "a\\xff.txt")]
    documents[0].name.encode()


def test_reading_text_does_not_import_numpy() -> None:
    code = "import sys, mesh_transformer.data.readers; sys.exit(bool({'jax', 'numpy', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_kind_of_dataset_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset without files, given as a row of DATASETS, is listed, read, split and cached like files."""
    from mesh_transformer.data.shard_builder import build_shards
    from mesh_transformer.data.shards import TokenShard
    from mesh_transformer.data.tokenizers import ByteTokenizer

    texts = [[f"text {i} of {part}" for i in range(20)] for part in range(3)]

    def read(partition, options, skipped):
        assert options.path == "memory://texts"
        yield from (Document(text, f"{partition.location}:{i}") for i, text in enumerate(texts[partition.version]))

    memory = readers.DatasetReader(
        matches=lambda path: path.startswith("memory://"),
        list_partitions=lambda path: [readers.Partition(f"part{i}", 100, i) for i in range(3)],
        read_documents=read,
        read_tokens=lambda partition: iter(()),
        holds_tokens=lambda partition: False,
    )
    monkeypatch.setattr(readers, "DATASETS", (memory, *readers.DATASETS))
    assert [document.text for document in read_documents("memory://texts")] == [text for part in texts for text in part]
    assert not readers.holds_tokens("memory://texts")
    built = build_shards("memory://texts", ByteTokenizer(), tmp_path, holdout=4)
    assert built["train"].n_documents + built["heldout"].n_documents == 60
    assert built["heldout"].n_documents > 0
    shard = TokenShard(built["train"].prefix)
    decoded = {ByteTokenizer().decode(shard.document(i)) for i in range(shard.n_documents)}
    assert decoded < {text for part in texts for text in part}
