# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every kind of source yields its texts; damage is counted with file and line, and no document is lost silently."""

import gzip
import json
import mailbox
import os
import random
import tracemalloc

import pytest
import zstandard

from mesh_transformer.corpus.sources import KINDS, ReadStats, find_parts, read_part
from mesh_transformer.data.errors import DataError

pytest.importorskip("resiliparse")
pytest.importorskip("pylatexenc")
from mesh_transformer.corpus.latex import nodes_to_text


def read(recipe):
    """Return texts by file name, and the read statistics."""
    parts, _ = find_parts(recipe)
    stats = ReadStats()
    found = [document for part in parts for document in read_part(part, recipe, stats)]
    return {document.name.rpartition("/")[2]: document.text for document in found}, stats


@pytest.fixture
def read_one(tmp_path, make_recipe):
    """Return a function that writes one file and reads it as a kind of source."""

    def read_it(kind, name, data, **component):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        corpus = component.pop("corpus", {})
        return read(make_recipe({"a": {"kind": kind, "paths": [str(tmp_path / name)], **component}}, corpus=corpus))

    return read_it


PAGE = (
    "<html><body><nav><a href=x>menu</a></nav><main><h1>Head</h1><p>Cats &amp; dogs live here.</p></main></body></html>"
)


def warc(*pages: str) -> bytes:
    data = b""
    for page in pages:
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page.encode()
        head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a/\r\nContent-Type: application/http\r\n"
        data += head + b"Content-Length: %d\r\n\r\n" % len(http) + http + b"\r\n\r\n"
    return data


def parquet(texts: list[str]) -> bytes:
    arrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = arrow.BufferOutputStream()
    written.write_table(arrow.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


MAN = """.TH LS 1
.SH NAME
ls \\- list \\fIfiles\\fR
.SH OPTIONS
.TP
.BR \\-a ", " \\-\\-all
all of
them
.nf
one
two
.fi
"""
RST = """Title
=====

.. index:: hidden

Use :func:`the_call` and `a link <http://a>`_ with ``code``::

    kept as it is

.. note:: Mind this.
"""
INFO = """This is a.info, made by hand.
\x1f
File: a.info,  Node: Top,  Next: One,  Up: (dir)

The top
*******

* Menu:

* One::                       What one
                              is.
* Index: The index.           Words

\x1f
File: a.info,  Node: One,  Prev: Top,  Up: Top

One is this.\0\x08[image src="a.png"\0\x08]

* it counts
\x1f
Tag Table:
Node: Top\x7f31
\x1f
End Tag Table
"""
MAIL = """From a@b Thu Jan  1 00:00:00 2004
Subject: One

First body
>From here

From c@d Thu Jan  1 00:00:00 2004
Subject: Two

Second
"""
LATEX = r"\documentclass{a}\begin{document}Hello \emph{big} $x^2$ world.\end{document}"

FLIPPED = bytearray(gzip.compress(b"".join(b'{"text": "line %d"}\n' % n for n in range(9)), 0))  # stored as it is
FLIPPED[FLIPPED.index(b"line 5")] ^= 2
LINES = zstandard.compress(b'{"text": "one"}\n\n{"text": "two"}\n')
MAN_TEXT = "NAME\n\nls - list files\n\nOPTIONS\n\n-a, --all all of them\n\none\ntwo"
RST_TEXT = "Title\n=====\n\nUse the_call and a link with code:\n\n    kept as it is\n\nMind this."
CASES = {
    "text": ("a.txt", "Grüße\r\nzwei\n", {"a.txt": "Grüße\nzwei\n"}),
    "code": ("a.py", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", {"a.py": "# -*- coding: latin-1 -*-\nx = 'é'\n"}),
    "jsonl": ("a.jsonl.zst", LINES, {"a.jsonl.zst:1": "one", "a.jsonl.zst:3": "two"}),
    "parquet": ("a.parquet", lambda: parquet(["one", "two"]), {"a.parquet:1": "one", "a.parquet:2": "two"}),
    "warc": ("a.warc.gz", gzip.compress(warc(PAGE)), {"a.warc.gz:1": "Head\n\nCats & dogs live here."}),
    "mbox": ("a.mbox", MAIL, {"a.mbox:1": "One\n\nFirst body\nFrom here\n", "a.mbox:2": "Two\n\nSecond\n"}),
    "latex": ("a.tex", LATEX, {"a.tex": "Hello big $x^2$ world."}),
    "html": ("a.html", PAGE, {"a.html": "Head\n\nCats & dogs live here."}),
    "man": ("a.1.gz", gzip.compress(MAN.encode()), {"a.1.gz": MAN_TEXT}),
    "rst": ("a.rst", RST, {"a.rst": RST_TEXT}),
    "info": ("a.info", INFO, {"a.info": "The top\n*******\n\nOne is this.\n\n* it counts"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_yields_its_texts(read_one, kind):
    name, data, expected = CASES[kind]
    texts, stats = read_one(kind, name, data() if callable(data) else data)
    assert texts == expected
    assert stats.bad.total == 0


def test_mail_agrees_with_the_standard_library(tmp_path, read_one):
    box = mailbox.mbox(tmp_path / "box.mbox")
    for number in range(5):
        message = mailbox.mboxMessage()
        message["Subject"] = f"number {number}"
        message.set_payload(f"line {number}\nFrom the start\n")
        box.add(message)
    box.close()
    texts, _ = read_one("mbox", "box.mbox", (tmp_path / "box.mbox").read_bytes())
    assert list(texts.values()) == [f"number {n}\n\nline {n}\nFrom the start\n" for n in range(5)]


@pytest.mark.parametrize(
    ("kind", "name", "data", "good", "message"),
    [
        ("text", "a.txt", b"PK\x03\x04\0\0rest", 0, "a.txt: contains NUL bytes: a binary file"),
        ("text", "a.txt", b"caf\xe9\n", 0, "a.txt:1: byte 3 .0xe9. is not valid UTF-8"),
        ("text", "a.txt.gz", gzip.compress(b"x" * 99_999)[:-20], 0, "a.txt.gz: truncated archive"),
        ("jsonl", "a.jsonl", b'{"text": "good"}\n{"text": 3}\n{"te', 1, "a.jsonl:2: 'text' is a number, expected a string"),
        ("jsonl", "a.jsonl.gz", bytes(FLIPPED), 0, "a.jsonl.gz: damaged archive .*; the whole file is skipped"),
        ("jsonl", "a.txt", b"x", 0, "a.txt: unexpected file extension '.txt' for kind jsonl"),
        ("mbox", "a.mbox", b"From a\nSubject: x\nContent-Type: image/png\n\nabc\n", 0, "a.mbox:1: the mail message has no text"),
        ("warc", "a.warc", warc(PAGE, PAGE)[:-60], 1, "a.warc:2: the last .* bytes of the page are missing"),
        ("warc", "a.warc", b"no archive at all\n", 0, "a.warc: invalid WARC data"),
    ],
)  # fmt: skip
def test_damage_is_counted_with_its_position(read_one, kind, name, data, good, message):
    texts, stats = read_one(kind, name, data)
    assert len(texts) == good
    assert stats.bad.total >= 1
    with pytest.raises(DataError, match=message):
        read_one(kind, name, data, corpus={"on_bad_document": "error"})


def test_empty_texts_are_counted(read_one):
    texts, stats = read_one("text", "a.txt", b" \n", corpus={"on_bad_document": "error"})
    assert not texts
    assert stats.bad.counts == {"empty text": 1}


def test_files_are_decoded_by_the_encoding_of_the_recipe(read_one):
    texts, stats = read_one("text", "a.txt", b"caf\xe9\n", encoding="latin-1")
    assert texts == {"a.txt": "café\n"}
    assert stats.decoded == {"latin-1": 1}


def test_long_lines_are_skipped(read_one):
    line = json.dumps({"text": "x" * 1_100_000})
    texts, stats = read_one(
        "jsonl", "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n', corpus={"max_document_mb": 1}
    )
    assert list(texts) == ["a.jsonl:1", "a.jsonl:3"]
    assert stats.bad.counts == {"too long": 1}
    assert read_one("text", "a.txt", "x" * 1_100_000, corpus={"max_document_mb": 1})[1].bad.counts == {"too long": 1}


@pytest.mark.parametrize("kind", ["jsonl", "mbox"])
def test_long_lines_are_skipped_in_bounded_memory(tmp_path, read_one, kind):
    with gzip.GzipFile(tmp_path / "a.gz", "wb", 1) as file:
        file.write(b'From a\n\n{"text": "one"}\n\nFrom b\n\n{"text": "')
        for _ in range(40):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n\nFrom c\n\n{"text": "three"}\n')
    data = (tmp_path / "a.gz").read_bytes()
    name = "a.jsonl.gz" if kind == "jsonl" else "a.mbox.gz"
    tracemalloc.start()
    texts, stats = read_one(kind, name, data, corpus={"max_document_mb": 1})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    numbers, lost = (["3", "11"], "7") if kind == "jsonl" else (["1", "3"], "2")
    assert list(texts) == [f"{name}:{number}" for number in numbers]
    assert stats.bad.counts["too long"] == 1
    where = f"{tmp_path}/{name}:{lost}: more than 1,000,000 bytes in one document: more than corpus.max_document_mb"
    assert stats.bad.examples["too long"][0].startswith(where)
    assert peak < 12e6


def test_a_long_file_may_be_split_into_documents(read_one):
    text = "word " * 300_000
    texts, stats = read_one("text", "a.txt", text, chunk_kb=500, corpus={"max_document_mb": 1})
    assert "".join(texts.values()) == text
    assert stats.bad.total == 0


LATEX_BITS = [
    "word ", " ", ", ", "\n", "\n\n", "\t", "*", "#1", "^", "_", "é", "\u2003", "&", "~", "``", "''", "`", "'", "-", "--", "---",
    "!", "?", "!`", "?`", "\\", "{", "}", "[", "]", "$", "$$", "\\(", "\\)", "\\[", "\\]", "%", "% a\n", "\\\\[2pt]", "\\'e",
    "\\begin{itemize}", "\\end{itemize}", "\\item", "\\item[x]", "\\begin {equation}", "\\end{equation}", "\\emph", "\\emph{b}",
    "\\section*{T}", "\\verb+x%+", "\\begin{verbatim}", "\\end{verbatim}", "\\textbf", "\\begin", "\\cite[p. 3]{k}", "\\sqrt[3]{x}",
]  # fmt: skip


def test_latex_agrees_with_the_library():
    from pylatexenc.latex2text import LatexNodes2Text

    rng = random.Random(0)
    different = set()
    for _ in range(500):
        source = "".join(rng.choices(LATEX_BITS, k=rng.randint(1, 40)))
        library = LatexNodes2Text(math_mode="verbatim", strict_latex_spaces=False)
        try:
            expected = library.latex_to_text(source, tolerant_parsing=True)
        except (LookupError, ValueError) as error:  # both must reject the same source
            with pytest.raises(type(error)):
                nodes_to_text(source)
            continue
        assert nodes_to_text(source) == expected, source
        different.add(expected)
    assert len(different) > 400


@pytest.mark.parametrize(
    "end", ["verb", "title", "sqrt"]
)  # these cause IndexError, AttributeError and KeyError in the library
def test_truncated_latex_is_counted(read_one, end):
    texts, stats = read_one("latex", "a.tex", f"A text that ends in \\{end}")
    assert not texts
    assert stats.bad.counts == {"broken LaTeX": 1}


def test_latex_text_does_not_depend_on_the_date(read_one):
    begin, end = r"\title{A}\begin{document}", r"It is \today.\end{document}"
    assert read_one("latex", "a.tex", rf"{begin}\maketitle {end}")[0] == {"a.tex": "It is ."}
    given = rf"{begin}\title{{One}}\date{{1991}}\maketitle {end}"
    assert read_one("latex", "a.tex", given)[0] == {"a.tex": "One\n1991\n\nIt is ."}


def test_components_without_files(tmp_path, make_recipe):
    present = {"kind": "text", "paths": [__file__]}
    absent = {"kind": "text", "paths": [str(tmp_path / "*.txt")], "origin": "the library"}
    with pytest.raises(
        DataError, match=r"component b: no files match .*; origin: the library; correct .* or set components.b.optional"
    ):
        find_parts(make_recipe({"a": present, "b": absent}))
    assert find_parts(make_recipe({"a": present, "b": absent | {"optional": True}}))[1] == ["b"]
    with pytest.raises(DataError, match="is in the components a and b"):
        find_parts(make_recipe({"a": present, "b": present}))


def test_links_and_overlapping_patterns_count_once(tmp_path, write_texts, make_recipe):
    folder = write_texts("texts", ["one", "two"])
    (tmp_path / "link").symlink_to(folder)
    paths = [str(folder), f"{tmp_path}/**/*.txt"]
    parts, _ = find_parts(make_recipe({"a": {"kind": "text", "paths": paths, "exclude": ["*/001.txt"]}}))
    assert [os.path.basename(file.path) for part in parts for file in part.files] == ["000.txt"]


def test_sources_that_change_or_disappear_during_the_build(write_texts, make_recipe):
    folder = write_texts("texts", ["one", "two"])
    recipe = make_recipe({"a": {"kind": "text", "paths": [str(folder)]}})
    parts, _ = find_parts(recipe)
    (folder / "001.txt").write_text("two, longer")
    with pytest.raises(DataError, match=r"001.txt: changed during the build"):
        list(read_part(parts[0], recipe, ReadStats()))
    (folder / "001.txt").unlink()
    with pytest.raises(DataError, match=r"001.txt: removed during the build .No such file"):
        list(read_part(parts[0], recipe, ReadStats()))


def test_long_texts_are_split_into_chunks(read_one):
    text = "".join(f"word {n}\nmore of it\n\n" for n in range(200)) + "x" * 2500
    texts, _ = read_one("text", "a.txt", text, chunk_kb=1)
    assert "".join(texts.values()) == text
    assert list(texts) == [f"a.txt:{n}" for n in range(1, len(texts) + 1)]
    assert all(len(chunk) <= 1000 for chunk in texts.values())
    assert [chunk.endswith("\n\n") for chunk in texts.values()] == [True] * (len(texts) - 3) + [False] * 3
    assert read_one("text", "a.txt", text, chunk_kb=10)[0] == {"a.txt": text}
    with pytest.raises(ValueError, match=r"components.a.chunk_kb = .*: files of kind warc already hold many documents"):
        read_one("warc", "a.warc", warc(PAGE), chunk_kb=1)


@pytest.mark.parametrize("pattern", ["", "/*.txt"])
def test_broken_links_are_counted(tmp_path, write_texts, make_recipe, pattern):
    folder = write_texts("texts", ["one"])
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    component = {"kind": "text", "paths": [f"{folder}{pattern}"]}
    texts, stats = read(make_recipe({"a": component}))
    assert list(texts) == ["000.txt"]
    assert stats.bad.counts == {"broken link": 1}
    assert list(stats.digests) == [str(folder / "000.txt")]
    with pytest.raises(DataError, match=r"component a: .*gone.txt: broken link; restore its target or exclude it"):
        read(make_recipe({"a": component}, corpus={"on_bad_document": "error"}))
    assert list(read(make_recipe({"a": component | {"exclude": ["*/gone.txt"]}}))[0]) == ["000.txt"]


def test_unreadable_files_are_counted(write_texts, make_recipe, monkeypatch):
    folder = write_texts("texts", ["one", "two"])
    monkeypatch.setattr("mesh_transformer.corpus.sources.digest_file", refuse_second)
    texts, stats = read(make_recipe({"a": {"kind": "text", "paths": [str(folder)]}}))
    assert list(texts) == ["000.txt"]
    assert stats.bad.examples == {
        "unreadable file": [f"{folder}/001.txt: cannot be read: Permission denied; check its permissions or exclude it"]
    }


def refuse_second(path: str) -> str:
    """Raise PermissionError for one file; file permissions would not stop root."""
    if path.endswith("001.txt"):
        raise PermissionError(13, "Permission denied")
    return "0" * 32
