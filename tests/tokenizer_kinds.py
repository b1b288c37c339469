# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of every kind, trained here, in the files that their classes in transformers write or read."""

import base64
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mesh_transformer.data.token_bytes import make_byte_alphabet

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"
# Every third message is trimmed, and every role is a line of its own.
TEMPLATE = (
    "{% set mark = eos_token or sep_token %}{{ bos_token }}{% for m in messages %}{{ mark }}{{ m.role }}\n"
    "{{ m.content | trim if m.role == 'system' else m.content }}{{ mark }}\n{% endfor %}{{ mark }}assistant\n"
)


def corpus(words: Sequence[str]) -> Iterator[str]:
    """Yield texts of `words` and English sentences."""
    rng = random.Random(0)
    english = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split(" ")
    for _ in range(200):
        yield "".join(rng.choices(words, k=30)) + " ".join(rng.choices(english, k=30))


def train(model: Any, trainer: Any, words: Sequence[str], *, normalizer: Any = None, splitter: Any = None) -> Any:
    """Return the `model` section of the tokenizer.json of a trained vocabulary."""
    tokenizer = hf.Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(corpus(words), trainer)
    return json.loads(tokenizer.to_str())["model"]


def byte_level(words: Sequence[str], special: Sequence[str]) -> dict[str, Any]:
    """Return the vocabulary and merges of a byte-level BPE, as arguments of the classes of transformers."""
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = train(models.BPE(), trainer, words, splitter=splitter)
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def byte_fallback(words: Sequence[str], special: Sequence[str]) -> dict[str, Any]:
    """Return the vocabulary and merges of SentencePiece's BPE with byte tokens."""
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *BYTES], show_progress=False)
    splitter = pre_tokenizers.Metaspace(split=True)
    model = train(models.BPE(), trainer, words, splitter=splitter)
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def unigram(words: Sequence[str], special: Sequence[str], unknown: str) -> list[tuple[str, float]]:
    """Return the pieces and scores of SentencePiece's Unigram, without byte tokens."""
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(special), unk_token=unknown, show_progress=False
    )
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    model = train(models.Unigram(), trainer, words, splitter=splitter, normalizer=normalizers.NFKC())
    return [(piece, score) for piece, score in model["vocab"]]


def word_pieces(words: Sequence[str], lowercase: bool) -> dict[str, int]:
    """Return the vocabulary of BERT's WordPiece."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    return train(models.WordPiece(unk_token="[UNK]"), trainer, words, splitter=splitter, normalizer=normalizer)["vocab"]


def save(folder: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def save_backend(folder: Path, backend: hf.Tokenizer, **named: Any) -> None:
    """Write a tokenizer.json of the class TokenizersBackend, which uses the file unchanged."""
    from transformers import PreTrainedTokenizerFast

    save(folder, PreTrainedTokenizerFast(tokenizer_object=backend, **named))


def make_gpt2(folder: Path, words: Sequence[str]) -> None:
    from transformers import GPT2Tokenizer

    save(folder, GPT2Tokenizer(**byte_level(words, ["<|endoftext|>"])))


def make_neox(folder: Path, words: Sequence[str]) -> None:
    """NFC, and added tokens of several spaces."""
    import transformers

    tokenizer = transformers.GPTNeoXTokenizer(**byte_level(words, ["<|endoftext|>", "<|padding|>"]))
    for n in (8, 4, 2):
        tokenizer.add_tokens(transformers.AddedToken(" " * n, normalized=True))
    save(folder, tokenizer)


def make_llama3(folder: Path, words: Sequence[str]) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    arguments = byte_level(words, [])
    backend = hf.Tokenizer(models.BPE(**arguments, ignore_merges=True))
    split = pre_tokenizers.Split(hf.Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([hf.AddedToken(name, normalized=False, special=True) for name in special])
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(
        "<|begin_of_text|> $A", "<|begin_of_text|> $A <|begin_of_text|>:1 $B:1", special_tokens=[begin]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    save_backend(folder, backend, bos_token=special[0], eos_token=special[1])


def make_qwen2(folder: Path, words: Sequence[str]) -> None:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(**byte_level(words, []), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    save(folder, tokenizer)


def make_smollm(folder: Path, words: Sequence[str]) -> None:
    """GPT-2's BPE with digits apart."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = hf.Tokenizer(models.BPE(**byte_level(words, special)))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    save_backend(folder, backend, bos_token=special[1], eos_token=special[2], unk_token=special[0])


def make_llama2(folder: Path, words: Sequence[str]) -> None:
    from transformers import LlamaTokenizer

    save(folder, LlamaTokenizer(**byte_fallback(words, ["<unk>", "<s>", "</s>"]), add_bos_token=True))


def make_mistral(folder: Path, words: Sequence[str]) -> None:
    """The tokenizer.json of Llama 2 and Mistral 7B, in which a normalizer writes the space before the first word."""
    arguments = byte_fallback(words, ["<unk>", "<s>", "</s>"])
    backend = hf.Tokenizer(models.BPE(**arguments, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    save_backend(folder, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True)


def make_gemma(folder: Path, words: Sequence[str]) -> None:
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = GemmaTokenizer(**byte_fallback(words, special), add_bos_token=True)
    tokenizer.add_special_tokens({"extra_special_tokens": special[5:]})
    save(folder, tokenizer)


def make_t5(folder: Path, words: Sequence[str], sentinels: int = 100) -> None:
    """T5 and Flan-T5 with 100 sentinels; mT5 has none."""
    from transformers import T5Tokenizer

    pieces = unigram(words, ["<pad>", "</s>", "<unk>"], "<unk>")
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels))]
    save(folder, T5Tokenizer(vocab=pieces, extra_ids=sentinels))


def make_albert(folder: Path, words: Sequence[str]) -> None:
    from transformers import AlbertTokenizer

    pieces = unigram([word.lower() for word in words], ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>")
    save(folder, AlbertTokenizer(vocab=pieces))


def make_bert(folder: Path, words: Sequence[str], lowercase: bool = True) -> None:
    from transformers import BertTokenizer

    save(folder, BertTokenizer(vocab=word_pieces(words, lowercase), do_lower_case=lowercase))


def make_vocab_txt(folder: Path, words: Sequence[str]) -> None:
    names = sorted((vocabulary := word_pieces(words, True)), key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    write_json(folder / "config.json", {"model_type": "bert"})
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True, "chat_template": TEMPLATE})


def make_vocab_json(folder: Path, words: Sequence[str], model_type: str = "gpt2") -> None:
    arguments = byte_level(words, ["<|endoftext|>"])
    write_json(folder / "vocab.json", arguments["vocab"])
    merges = ["#version: 0.2", *map(" ".join, arguments["merges"])]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    write_json(folder / "config.json", {"model_type": model_type})
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", config)


def make_added_tokens(folder: Path, words: Sequence[str]) -> None:
    """A fine-tune on a base vocabulary: its own tokens stand only in tokenizer_config.json."""
    make_llama3(folder, words)
    (folder / "chat_template.jinja").unlink()
    size = max(hf.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 1
    tokens = {
        size: {"content": "<|im_start|>", "special": True},
        size + 1: {"content": "<|im_end|>", "special": True, "rstrip": True},
        size + 2: {"content": "<think>", "special": False, "lstrip": True},
        size + 3: {"content": "cafe", "special": False, "normalized": True, "single_word": True},
    }
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": tokens, "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", config)


def make_sentencepiece(folder: Path, words: Sequence[str], family: str, **options: Any) -> None:
    """A tokenizer.model alone, trained by SentencePiece."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs pip install 'mesh-transformer[tokenizers]'")
    written = io.BytesIO()
    texts = (text.replace("\0", "") for text in corpus(words))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=written, minloglevel=2, num_threads=1, hard_vocab_limit=False, **options
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    write_json(folder / "config.json", {"model_type": family})
    write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE})


def make_tiktoken(folder: Path, words: Sequence[str]) -> None:
    """The tokenizer.model of Llama 3 in tiktoken's format: a line for each token, its bytes in base64 and its rank."""
    pytest.importorskip("tiktoken", reason="needs pip install 'mesh-transformer[tokenizers]'")
    pytest.importorskip("sentencepiece", reason="needs pip install 'mesh-transformer[tokenizers]'")
    alphabet, vocabulary = make_byte_alphabet(), byte_level(words, [])["vocab"]
    lines = [
        base64.b64encode(bytes(alphabet[character] for character in name)).decode() + f" {rank}"
        for name, rank in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    write_json(folder / "config.json", {"model_type": "llama"})
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[1],
        "added_tokens_decoder": {
            len(vocabulary) + i: {"content": name, "special": True} for i, name in enumerate(names)
        },
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, table: Any) -> None:
    path.write_text(json.dumps(table), encoding="utf-8")


def with_options(make: Callable[..., None], *arguments: Any, **options: Any) -> Callable[[Path, Sequence[str]], None]:
    """Return `make` with more arguments."""
    return lambda folder, words: make(folder, words, *arguments, **options)


LLAMA_BPE = dict(model_type="bpe", vocab_size=700, byte_fallback=True, normalization_rule_name="identity")
T5_IDS = dict(vocab_size=500, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
KINDS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "gpt2": make_gpt2,
    "neox": make_neox,
    "llama3": make_llama3,
    "qwen2": make_qwen2,
    "smollm": make_smollm,
    "llama2": make_llama2,
    "mistral": make_mistral,
    "gemma": make_gemma,
    "t5": make_t5,
    "mt5": with_options(make_t5, sentinels=0),
    "albert": make_albert,
    "bert": make_bert,
    "bert-cased": with_options(make_bert, lowercase=False),
    "vocab.txt": make_vocab_txt,
    "vocab.json-gpt2": make_vocab_json,
    "vocab.json-qwen2": with_options(make_vocab_json, "qwen2"),
    "added_tokens_decoder": make_added_tokens,
    "tokenizer.model-llama": with_options(make_sentencepiece, "llama", **LLAMA_BPE, remove_extra_whitespaces=False),
    "tokenizer.model-t5": with_options(make_sentencepiece, "t5", **T5_IDS),
    "tiktoken": make_tiktoken,
}
