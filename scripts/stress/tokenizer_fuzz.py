# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stress test of tokenizers: random difficult texts must be encoded and decoded as by transformers.

examples:
  python scripts/stress/tokenizer_fuzz.py models/llama models/t5 --texts 300
      compare the tokenizers in these folders with transformers' AutoTokenizer
  python scripts/stress/tokenizer_fuzz.py models/llama --reference file --seed 7 --json
      compare with PreTrainedTokenizerFast, which reads only tokenizer.json

Texts have spaces, tabs, line ends, CJK, emoji joined by U+200D, combining marks, right-to-left scripts, digits, code,
NUL, noncharacters, long runs, and special tokens written as text. The comparison covers: ids with and without added special
tokens, with special tokens parsed and as text; ids and token types of pairs of texts; errors at lone surrogates; decoded
texts with and without special tokens, of these ids and of random ids; incremental
decoding in random steps; prompts of random chats, if there is a chat template. Random ids exclude the tokens of single
bytes, which this project decodes differently on purpose (mesh_transformer/data/tokenizers.py).

AutoTokenizer builds some classes from the vocabulary alone, with a pre-tokenizer that differs from the file's
(mesh_transformer/data/tokenizer_files.py); for their folders, --reference auto reports differences.

exit status: 0 no differences, 1 differences, 2 wrong usage
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.cli import make_parser, run_command
from mesh_transformer.data.chat_template import ChatTemplate
from mesh_transformer.data.file_tokenizer import FileTokenizer
from mesh_transformer.data.stream_decoder import StreamDecoder
from mesh_transformer.data.tokenizers import Tokenizer, load_tokenizer
from mesh_transformer.data.vocabularies import TokenizerError

WORDS = (
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\0", "\x07", "\ufeff", "\u200b", "\u2581",
    "the", " the", "The", "don't", " I'm", "we'll", "'s", "HELLO", "camelCase", "snake_case", "e.g.", "...", "!?", " .", ",",
    "0", "7", "12", "123", "1234567890", " 3.14", "1,000", "\u0663\u0664", "\u00bd",
    "def f(x):\n    return x[0] + 1\n", "<a href=\"x\">", "{{ x }}", "//", "\\n", "<0x0A>", "<0x41>", "##ing", "[", "]",
    "\u4e2d\u6587", "\u65e5\u672c\u8a9e", "\ud55c\uad6d\uc5b4", "\u0e44\u0e17\u0e22", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629", "\u05e9\u05dc\u05d5\u05dd", "\u202e", "\u0440\u0443\u0441",
    "\U0001f600", "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\U00012000", "\U0010ffff",
    "e\u0301", "\u00e9", "\u0301", "a\u0308\u0323", "\ufb01", "\uff21", "\u2126", "\u1e9b\u0323", "\u00df", "\u0130",
    "\ufdd0", "\ufdef", "\ufffe", "\uffff", "\U0001fffe", "\ue000", "\u0085", "\u00ad", "\u2060",
    "\u200e", "\x7f", "\x1b[0m", "\v\f",
    "\ufdd0</s>", "</s", "<|im_", "\u2581\u2581", "\ufdfa", "\u2460", "\u01c5", "\u017f", "\u1112\u1161\u11ab", "\U0001d504",
    "z\u0335\u0310\u0342\u0489", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f", "1\ufe0f\u20e3",
    "na\u00efve", "\u00c5ngstr\u00f6m", "caf\u00e9", "``", "''", "~", "^", "\u201cquoted\u201d", "\u2014", "\u20ac",
)  # fmt: skip
LONG_RUNS = (
    " " * 5000,
    "a" * 5000,
    "\u4e2d" * 2000,
    "ab " * 2000,
    "\n" * 2000,
    "1" * 2000,
    "\U0001f600\u200d" * 700,
    "e" + "\u0301" * 900,
)
SURROGATES = ("\ud800", "a\ud83db", "\ude00\ud83d", "the \udfff</s>", "\ud83d" * 100)
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>")


class Difference(NamedTuple):
    """A result that differs from the reference's."""

    check: str
    given: str
    expected: str
    got: str


def main(arguments: list[str]) -> int:
    """Compare the tokenizer of every folder; print the differences."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("folder", nargs="+", type=Path, help="folder of a model with its tokenizer")
    parser.add_argument(
        "--texts", type=int, default=300, help="number of random texts for each folder; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts; default: %(default)s")
    parser.add_argument(
        "--reference",
        choices=("auto", "file"),
        default="auto",
        help="auto: AutoTokenizer; file: PreTrainedTokenizerFast; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    results = {}
    for folder in options.folder:
        found = compare(folder, load_reference(folder, options.reference), options.texts, options.seed)
        results[str(folder)] = {
            "differences": dict(Counter(each.check for each in found)),
            "examples": {each.check: each[1:] for each in reversed(found)},
        }
        if not options.json:
            print(f"{folder}: {len(found)} differences {results[str(folder)]['differences'] or ''}")
            for check, (given, expected, got) in results[str(folder)]["examples"].items():
                print(f"  {check}: {given}\n    expected {expected}\n    got      {got}")
    if options.json:
        print(json.dumps(results))
    return int(any(result["differences"] for result in results.values()))


def load_reference(folder: Path, kind: str) -> Any:
    """Return the tokenizer of a folder, loaded by transformers."""
    import transformers

    classes = {"auto": transformers.AutoTokenizer, "file": transformers.PreTrainedTokenizerFast}
    return classes[kind].from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def compare(folder: Path, reference: Any, texts: int, seed: int) -> list[Difference]:
    """Return the differences between this project's tokenizer of a folder and `reference` on random texts."""
    tokenizer, rng = load_tokenizer(folder), random.Random(seed)
    special = [token for token in reference.get_added_vocab() if token.strip()]
    found = []
    for text in make_texts(rng, texts, [*special[:20], *SPECIAL]):
        found += compare_text(tokenizer, reference, text, rng)
    found += compare_random_ids(tokenizer, reference, rng, texts)
    if reference.chat_template:
        found += compare_chats(folder, tokenizer, reference, rng, texts // 10)
    return found + compare_surrogates(tokenizer, reference)


def compare_surrogates(tokenizer: Tokenizer, reference: Any) -> list[Difference]:
    """Return the ways of encoding that accept lone surrogates; transformers rejects them."""
    found = []
    for text in SURROGATES:
        ways: dict[str, Callable[[], object]] = {
            "encode": lambda text=text: tokenizer.encode(text),
            "encode, special tokens parsed": lambda text=text: tokenizer.encode(text, parse_special=True),
            "encode_batch": lambda text=text: tokenizer.encode_batch(["a", text]),
            "reference": lambda text=text: reference.encode(text),
        }
        if isinstance(tokenizer, FileTokenizer):
            ways["encode_pair"] = lambda text=text: tokenizer.encode_pair("a", text)
        for way, call in ways.items():
            try:
                call()
                found.append(Difference(f"lone surrogates: {way}", ascii(text), "an error", "none"))
            except (TokenizerError, TypeError) as error:
                if way != "reference" and not isinstance(error, TokenizerError):
                    found.append(Difference(f"lone surrogates: {way}", ascii(text), "TokenizerError", repr(error)))
    return found


def make_texts(rng: random.Random, count: int, special: list[str]) -> Iterator[str]:
    """Yield texts of random words, one in five with special tokens; also single words and long runs."""
    yield ""
    yield from (*WORDS, *LONG_RUNS)[:count]
    for number in range(count - len(WORDS) - len(LONG_RUNS)):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(1, 25))]
        if number % 5 == 0:
            words.insert(rng.randrange(len(words)), rng.choice(special))
        if number % 20 == 1:
            words.append(rng.choice(WORDS) * rng.randrange(50, 300))
        if number % 7 == 0:
            words.append("".join(chr(rng.choice([*range(32, 0x3000), *range(0x1F300, 0x1FB00)])) for _ in range(15)))
        yield "".join(words)


def compare_text(tokenizer: Tokenizer, reference: Any, text: str, rng: random.Random) -> list[Difference]:
    """Compare encoding and decoding of one text."""
    found = []
    ids = []
    for added in (False, True):
        ids = reference.encode(text, add_special_tokens=added)
        own = tokenizer.encode(text, add_special_tokens=added, parse_special=True)
        if own != ids:
            found.append(Difference(f"ids, special tokens added: {added}", repr(text), str(ids), str(own)))
    as_text = reference.encode(text, add_special_tokens=False, split_special_tokens=True)
    own = tokenizer.encode(text)
    # transformers' word-level tokenizers find special tokens in a text even so; this project never does.
    if own != as_text and not set(as_text) & set(reference.all_special_ids) - {reference.unk_token_id}:
        found.append(Difference("ids, special tokens as text", repr(text), str(as_text), str(own)))
    if isinstance(tokenizer, FileTokenizer):
        second = rng.choice(WORDS)
        pair = reference(text, second, return_token_type_ids=True)
        expected, got = (pair["input_ids"], pair["token_type_ids"]), tokenizer.encode_pair(text, second)
        if got != expected:
            found.append(Difference("pair of texts", repr((text, second)), str(expected), str(got)))
    return found + compare_decoding(tokenizer, reference, ids, rng)


def compare_decoding(tokenizer: Tokenizer, reference: Any, ids: list[int], rng: random.Random) -> list[Difference]:
    """Compare the text of ids, at once and in random steps."""
    found = []
    for skip in (False, True):
        expected = reference.decode(ids, skip_special_tokens=skip)
        got = tokenizer.decode(ids, skip_special_tokens=skip)
        if got != expected:
            found.append(Difference(f"text, special tokens skipped: {skip}", str(ids), repr(expected), repr(got)))
        stream, at, text = StreamDecoder(tokenizer, skip_special_tokens=skip), 0, ""
        while at < len(ids):
            step = rng.randrange(1, 4)
            text += stream.push(ids[at : at + step])
            at += step
        if text + stream.finish() != got:
            found.append(Difference(f"incremental, special tokens skipped: {skip}", str(ids), repr(got), repr(text)))
    return found


def compare_random_ids(tokenizer: Tokenizer, reference: Any, rng: random.Random, count: int) -> list[Difference]:
    """Compare the text of random ids."""
    names = reference.get_vocab()
    is_byte = {i for name, i in names.items() if name.startswith("<0x") and len(name) == 6}
    ordinary = {
        i for i, token in reference.added_tokens_decoder.items() if not token.special and not token.content.isascii()
    }
    ids = sorted(set(names.values()) - is_byte - ordinary)
    chosen = [rng.choices(ids, k=rng.randrange(1, 30)) for _ in range(count)]
    return [each for some in chosen for each in compare_decoding(tokenizer, reference, some, rng)]


def compare_chats(
    folder: Path, tokenizer: Tokenizer, reference: Any, rng: random.Random, count: int
) -> list[Difference]:
    """Compare the prompts of random chats, whose messages have no special tokens."""
    texts = {path.name: path.read_bytes().decode() for path in folder.glob("*") if path.suffix in (".json", ".jinja")}
    template = ChatTemplate(tokenizer, {"carried": texts})
    special = list(reference.get_added_vocab())
    words = [word for word in WORDS if not any(token in word for token in special)]
    found = []
    for _ in range(count):
        turns = [("".join(rng.choices(words, k=8)), "".join(rng.choices(words, k=8))) for _ in range(rng.randrange(3))]
        chat = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        chat.append({"role": "user", "content": "".join(rng.choices(words, k=8))})
        if rng.randrange(2):
            chat.insert(0, {"role": "system", "content": "".join(rng.choices(words, k=5))})
        expected, got = prompt_of_reference(reference, chat), prompt_of_template(template, chat)
        if got != expected:
            found.append(Difference("chat prompt", str(chat), str(expected), str(got)))
    return found


def prompt_of_reference(reference: Any, chat: list[dict[str, str]]) -> Any:
    """Return the ids of a chat's prompt by transformers, or "error"."""
    try:
        return reference.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    except Exception:  # raised by the template
        return "error"


def prompt_of_template(template: ChatTemplate, chat: list[dict[str, str]]) -> Any:
    """Return the ids of a chat's prompt, or "error"."""
    try:
        return template.encode(template.render(chat))
    except ValueError:
        return "error"


if __name__ == "__main__":
    sys.exit(run_command(main))
