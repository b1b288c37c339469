# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer of a Hugging Face model folder: its vocabulary, and the additions in its other files.

The vocabulary is read from the first of these files that the folder has:

- tokenizer.json, which is used unchanged. (AutoTokenizer of transformers 5 builds some classes from the vocabulary alone,
  with the pre-tokenizer of the class that tokenizer_config.json names, which may differ from the pre-tokenizer of the file.)
- vocab.json with merges.txt of GPT-2 or Qwen2, or vocab.txt of BERT, completed as by their classes in transformers.
- The vocabulary files of any other class, such as SentencePiece's and tiktoken's, which transformers converts.

Other files add to the vocabulary, as in transformers: tokens in tokenizer_config.json or added_tokens.json that the
vocabulary lacks, special tokens named in tokenizer_config.json or special_tokens_map.json, and the end of text: the
eos_token in these files, else the eos_token_id in config.json. `FolderTokenizer.additions` has all additions, as a
checkpoint stores them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf

from mesh_transformer.data.vocabularies import (
    TokenizerError,
    find_end_of_text,
    list_added,
    make_deterministic,
    make_library,
    read_json,
)
from mesh_transformer.data.vocabulary_files import (
    CLASS_TOKENS,
    MODEL_CLASSES,
    make_affix_processor,
    read_bert,
    read_byte_level,
)

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
MODEL_CONFIG = "config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Files that are read in addition to the vocabulary.
CONFIG_FILES = (CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, MODEL_CONFIG)
_BYTE_LEVEL = {"GPT2Tokenizer", "Qwen2Tokenizer"}
_BERT = {"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"}
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    ".model",
    ".tiktoken",
)  # ends of file names


class FolderTokenizer(NamedTuple):
    """The vocabulary of a model folder, and the additions in its other files."""

    table: dict[str, Any]  # content of a tokenizer.json
    # some of end_of_text, added_tokens, post_processor, clean_up_tokenization_spaces; and in named_tokens the special tokens,
    # such as bos_token, that the tokenizer's class has although the files do not name them
    additions: dict[str, Any]
    where: Path  # path of the vocabulary, for error messages


def read_folder(folder: Path) -> FolderTokenizer:
    """Read the tokenizer of a folder. Raises TokenizerError if the folder has no tokenizer, or the files are damaged."""
    config = read_optional(folder / CONFIG)
    name = _find_class(folder, config)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        table = make_deterministic(read_json(path), str(path))
        return FolderTokenizer(table, read_additions(folder, table, path, _find_declared_class(folder, config)), path)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and name in _BYTE_LEVEL:
        table = make_deterministic(read_byte_level(folder, name, config), str(folder))
        additions = read_additions(folder, table, folder, name)
        return FolderTokenizer(table, additions | _make_post_processor(folder, table, additions), folder)
    if (folder / "vocab.txt").is_file() and name in _BERT:
        table = make_deterministic(read_bert(folder, config), str(folder))
        return FolderTokenizer(table, read_additions(folder, table, folder, name), folder)
    if holds_vocabulary(path.name for path in folder.iterdir()):
        table, named = convert_with_transformers(folder)
        known = find_end_of_text(table, make_library(table, str(folder)).get_vocab())
        end = named.get("eos_token")
        additions = {} if end in (None, known) else {"end_of_text": end}
        return FolderTokenizer(table, additions | _select_unnamed(folder, named), folder)
    raise TokenizerError(
        f"{folder}: this folder has no tokenizer; add tokenizer.json, vocab.json with merges.txt, vocab.txt, tokenizer.model "
        "or another vocabulary that transformers reads"
    )


def holds_vocabulary(names: Iterable[str]) -> bool:
    """Return whether a folder with files of the given names has a tokenizer."""
    return any(name.endswith(_VOCABULARIES) for name in names)


def is_tokenizer_file(name: str) -> bool:
    """Return whether `read_folder` may read a file with the given name."""
    return name in CONFIG_FILES or name.endswith((*_VOCABULARIES, "merges.txt"))


def read_additions(folder: Path, table: Mapping[str, Any], where: Path, class_name: str | None) -> dict[str, Any]:
    """Return the additions of a folder's other files to its tokenizer.json `table`, which was read from `where`.

    They include the special tokens of the tokenizer's class, unless the files mention them.

    Raises TokenizerError for damaged files.
    """
    config = read_optional(folder / CONFIG)
    files = {CONFIG: config, SPECIAL_TOKENS_MAP: read_optional(folder / SPECIAL_TOKENS_MAP)}
    class_tokens = {name: t for name, t in CLASS_TOKENS.get(str(class_name), {}).items() if t in token_ids(table)}
    library = make_library(table, str(where))
    known = json.loads(library.to_str())["added_tokens"]
    for token in _list_tokens(table, {**class_tokens, **_merge_config(files)}, read_optional(folder / ADDED_TOKENS)):
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    added = [token for token in json.loads(library.to_str())["added_tokens"] if token not in known]
    ids = library.get_vocab(with_added_tokens=True)
    end = name_special_tokens(files).get("eos_token")
    if end not in ids:
        end = _find_by_id(library, read_optional(folder / MODEL_CONFIG).get("eos_token_id"))
    additions: dict[str, Any] = {"added_tokens": added} if added else {}
    if end is not None and end != find_end_of_text(table, ids):
        additions["end_of_text"] = end
    if config.get("clean_up_tokenization_spaces") and table["model"].get("type") != "BPE":
        additions["clean_up_tokenization_spaces"] = True
    return additions | _select_unnamed(folder, class_tokens)


def name_special_tokens(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the special tokens by the names that transformers gives them: {"eos_token": "</s>", ...}.

    `files` maps names of files to their content.
    """
    named = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in _merge_config(files).items()
    }
    return {name: value for name, value in named.items() if name.endswith("_token") and isinstance(value, str)}


def token_ids(table: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json."""
    vocabulary = table["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in list_added(table)}}


def read_optional(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty object if the file does not exist. Raises TokenizerError."""
    return read_json(path) if path.is_file() else {}


def convert_with_transformers(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tokenizer.json that transformers makes of a folder's vocabulary, and its special tokens by name.

    No code from the folder is run. Raises TokenizerError.
    """
    try:
        import transformers
    except ImportError:
        raise TokenizerError(
            f"{folder}: reading this vocabulary needs transformers: pip install 'mesh-transformer[tokenizers]'"
        ) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        table = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the type of the error depends on the tokenizer class
        raise TokenizerError(
            f"{folder}: transformers cannot convert this vocabulary: {' '.join(str(error).split())}; add a "
            "tokenizer.json"
        ) from None
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name in NAMED_TOKENS}
    return make_deterministic(table, str(folder)), named


def _find_declared_class(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the class in transformers, without the suffix "Fast", that a folder's files name or that its model type implies."""
    model = read_optional(folder / MODEL_CONFIG)
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    return str(name).removesuffix("Fast") if name else MODEL_CLASSES.get(str(model.get("model_type")))


def _find_class(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the class in transformers, without the suffix "Fast", that reads a folder without tokenizer.json."""
    model = read_optional(folder / MODEL_CONFIG)
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name and not name.startswith("PreTrainedTokenizer"):
        return name.removesuffix("Fast")
    if (folder / "vocab.txt").is_file():
        return "BertTokenizer"
    return "Qwen2Tokenizer" if str(model.get("model_type", "")).startswith("qwen") else "GPT2Tokenizer"


def _select_unnamed(folder: Path, named: Mapping[str, str]) -> dict[str, Any]:
    """Return {"named_tokens": ...} with the special tokens that the folder's files do not mention, or an empty dict."""
    files = {name: read_optional(folder / name) for name in (CONFIG, SPECIAL_TOKENS_MAP)}
    unnamed = {name: token for name, token in named.items() if name not in _merge_config(files)}
    return {"named_tokens": unnamed} if unnamed else {}


def _merge_config(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return tokenizer_config.json; without an added_tokens_decoder, special_tokens_map.json overrides its values."""
    config = dict(files.get(CONFIG, {}))
    return config if "added_tokens_decoder" in config else config | dict(files.get(SPECIAL_TOKENS_MAP, {}))


def _list_tokens(
    table: Mapping[str, Any], merged: Mapping[str, Any], added_tokens: Mapping[str, int]
) -> Iterator[hf.AddedToken]:
    """Yield the tokens that transformers adds to a vocabulary or makes special, in the order of TokenizersBackend.__init__.

    `merged` is the result of `_merge_config` with the special tokens of the class.
    """
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    other_named = {
        name: value for name, value in merged.items() if name.endswith("_token") and name not in NAMED_TOKENS
    }
    named = [merged[name] for name in NAMED_TOKENS if merged.get(name)]
    named += [value for value in other_named.values() if isinstance(value, str)]
    special = {_content(token) for token in [*named, *extra]}
    known = {token["content"]: token for token in list_added(table)}
    if "added_tokens_decoder" in merged:
        listed = {int(i): _make_token(token, False) for i, token in merged["added_tokens_decoder"].items()}
    else:
        listed = {
            i: hf.AddedToken(name, normalized=name not in special, special=name in special)
            for name, i in added_tokens.items()
            if name not in known
        }
    for _, token in sorted(listed.items()):
        token.special = token.special or token.content in {_content(token) for token in named}
        yield token
    done = {token.content for token in listed.values()} | {name for name, token in known.items() if token["special"]}
    for token in [*named, *extra]:
        if _content(token) not in done:
            done.add(_content(token))
            yield _make_token(known.get(_content(token), token), True)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _make_token(token: Any, special: bool) -> hf.AddedToken:
    if not isinstance(token, dict):
        return hf.AddedToken(str(token), special=special)
    flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return hf.AddedToken(token["content"], special=special or bool(token.get("special")), **flags)


def _make_post_processor(folder: Path, table: Mapping[str, Any], additions: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"post_processor": ...} with the bos and eos tokens that tokenizer_config.json requests, or an empty dict."""
    config = read_optional(folder / CONFIG)
    names = name_special_tokens({CONFIG: config, SPECIAL_TOKENS_MAP: read_optional(folder / SPECIAL_TOKENS_MAP)})
    before = names.get("bos_token", "<|endoftext|>") if config.get("add_bos_token") else None
    after = names.get("eos_token", "<|endoftext|>") if config.get("add_eos_token") else None
    ids = {token["content"]: token["id"] for token in [*list_added(table), *additions.get("added_tokens", [])]}
    if before is None and after is None:
        return {}
    return {"post_processor": make_affix_processor(ids | table["model"]["vocab"], before, after)}


def _find_by_id(library: hf.Tokenizer, wanted: Any) -> str | None:
    """Return the special token with the id `wanted`, or with the first id of a list; None for an ordinary token."""
    first = wanted[0] if isinstance(wanted, list) and wanted else wanted
    token = library.get_added_tokens_decoder().get(first) if isinstance(first, int) else None
    return token.content if token is not None and token.special else None
