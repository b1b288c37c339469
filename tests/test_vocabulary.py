# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The field's vocabulary: retired words as identifiers, archaic prose and British spelling are rejected."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*(ROOT / "mesh_transformer").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *ROOT.glob("device_*.py")]
)
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.toml")])

# Words that had several meanings, or none that the field uses, with the standard words. A word is rejected as a whole
# identifier and as a part of one between underscores.
RETIRED_WORDS = {
    "place": "path, position, index, axes, device_put or slot",
    "places": "paths, positions, MeshAxes or capacity",
    "placed": "sharded or located",
    "seat": "slot",
    "seats": "slots",
    "seated": "active, or dispatched to an expert",
    "piece": "chunk, shard, microbatch or delta",
    "pieces": "chunks, shards, microbatches or deltas",
    "told": "logged or reported",
    "tell": "log, report or on_progress",
    "wish": "parameter",
    "wishes": "params",
    "asked": "requested",
    "guess": "draft token",
    "guesses": "draft_tokens",
    "guessed": "speculative",
    "anew": "again",
    "theirs": "external",
    "ours": "native",
    "foreign": "external",
    "behind": "after",
    "beside": "with or next_to",
    "widen": "dequantize",
    "narrow": "quantized",
    "remedy": "suggestion",
    "remedies": "suggestions",
    "verdict": "fit",
    "flaw": "error",
    "accumulation": "grad_accum_steps",
    "everywhere": "replicated or on_all",
    "newest": "latest",
    "seen": "visited or used",
    "asking": "requesting",
    "settings": "config or options",
    "journal": "resume_log",
    "proof": "check",
    "prove": "verify",
    "rewriting": "encoder_decoder",
    "nats": "loss, with the unit in the documentation",
}
# Whole identifiers.
RETIRED_NAMES = {
    "AddRow", "Asked", "Attempts", "BadDocuments", "Bound", "ChatWire", "Choices", "CommonStop", "Composed", "Drawn",
    "Foreign", "Found", "Given", "Grammars", "HeadNorm", "Held", "Lazy", "Left", "Measures", "NarrowParams",
    "NgramProposer", "Pace", "Place", "Placed", "Places", "Prefixes", "Proposer", "Reading", "Remedy", "Replayed",
    "RewritingEngine", "Seats", "Sight", "Silicon", "Subject", "Terminal", "TextRow", "Ticket", "Told", "Trained",
    "Watch", "Wire", "Writing", "abandon", "add_up", "attend_by", "attend_in_ring", "batch_pieces", "compare_steps",
    "describe_routing", "draw_burst", "draw_proposals", "empty_routing", "find_capacity", "find_uneven",
    "from_ring_order", "grain_of", "head_of", "hide_spans", "is_here", "last_words", "lay_out", "list_debris",
    "load_trained", "look_at_step", "look_up", "make_row", "meet_compiled", "normalise", "old_config", "poison_batches",
    "put_aside", "put_row", "rank_tokens", "read_chunk", "read_on", "read_trained_config", "room_behind",
    "rotary_frequencies", "rows_per_token", "run_side_by_side", "run_v1", "score_chunk", "score_experts",
    "show_samples", "source_segments", "split_layers", "start_devices", "take_in", "take_row", "take_turns",
    "to_ring_order", "train_measured", "unless_left", "verify_proposed", "wait_until_gone", "what_counts",
}  # fmt: skip
# External names that contain a retired word: keys of other projects' files, command-line tools, Python's own.
ALLOWED_NAMES: set[str] = {"in_place", "inplace", "placeholder", "replace"}

# Prose: docstrings, comments, messages and documents.
ARCHAIC = (
    r"anew|in vain|lest|nobody|somebody|whoever|all the same|for ever|likeliest|again and again|so many of|"
    r"stands? before|goes on where|are told|is told|of ours|of theirs|come to nothing|comes? to \d|lies on|as said"
)
BRITISH = (
    r"(?:normal|initial|optim|token|serial|parallel|random|quant|penal|summar|organ|recogn|minim|maxim|general|special|"
    r"real|final|util|synchron|vector|custom|author|emphas|categor|capital|central|regular|visual|memor|factor|material)"
    r"is(?:e|es|ed|ing|er|ers|ation|ations)"
    r"|licence[sd]?|centre[sd]?|colour\w*|behaviour\w*|neighbour\w*|favour\w*|honour\w*|labell\w+|modell\w+|cancell(?:ed|ing)"
    r"|catalogue\w*|programme[sd]?|grey|artefact\w*|judgement|travell\w+|fulfil|whilst|analyse[sd]?"
)
ALLOWED_PROSE = re.compile(
    r"CancelledError|LICENCE|components\.\*\.licence|cancelled\(|\.cancelled|grey(?:hound)|anew in every pass"
)
RIDDLE = re.compile(r"^(What|Which|Where|Who|Whose|How|Whether|Whatever|Of which|Such)\b")


def identifiers(tree: ast.AST):
    """Every name that a module defines or uses, with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield line, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield line, node.attr
        elif isinstance(node, ast.arg):
            yield line, node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield line, node.target.id


def retired(name: str) -> str | None:
    if name in ALLOWED_NAMES:
        return None
    if name in RETIRED_NAMES:
        return f"{name} is retired"
    parts = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    word = next((part for part in parts if part in RETIRED_WORDS), None)
    return word and f"{name}: {word} -> {RETIRED_WORDS[word]}"


def find_identifiers(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sorted({f"{path.name}:{line}: {why}" for line, name in identifiers(tree) if (why := retired(name))})


def prose_of(path: Path):
    """(line, text) of every docstring, comment and string of a module."""
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def find_prose(path: Path) -> list[str]:
    found = []
    lines = prose_of(path) if path.suffix == ".py" else enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    for line, text in lines:
        for pattern in (ARCHAIC, BRITISH):
            for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
                if not ALLOWED_PROSE.search(text):
                    found.append(f"{path.name}:{line + text[: match.start()].count(chr(10))}: {match.group()!r}")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                if RIDDLE.match(first) or (first and len(first) < 12):
                    found.append(f"{path.name}:{getattr(node, 'lineno', 1)}: summary line {first!r}")
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_retired_identifiers(path):
    assert find_identifiers(path) == []


@pytest.mark.parametrize("path", SOURCES + TEXTS, ids=name_of)
def test_prose_is_plain_and_american(path):
    assert find_prose(path) == []


def test_the_checks_find_what_they_are_for(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""What a thing does, lest it be normalised."""\n\nclass Sight:\n    def at(self, place): ...\n')
    assert len(find_identifiers(module)) == 2
    assert len(find_prose(module)) == 3


if __name__ == "__main__":  # python tests/test_vocabulary.py FILE_OR_FOLDER...
    for name in sys.argv[1:]:
        for file in sorted(Path(name).rglob("*.py")) if Path(name).is_dir() else [Path(name)]:
            for line in (find_identifiers(file) if file.suffix == ".py" else []) + find_prose(file):
                print(f"{file.parent}/{line}")
