# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What a corpus is made of: one TOML file with its components, steps, duplicates, mixture and tokens, read strictly."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config import ConfigError, check_table, config_to_dict, read_toml
from mesh_transformer.config.field_types import STRICT, NonNegative, Positive, Rate

Kind = Literal["text", "source", "jsonl", "parquet", "warc", "mbox", "latex", "html", "man", "rst", "info"]
Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CorpusConfig:
    """The whole."""

    name: str
    about: str = ""  # for whom and what it was made; the first answer of its datasheet
    seed: NonNegative = 0  # of the order, of fractional epochs and of sampling by quality
    part_mb: Positive = 32  # of source files in one part, which is the unit of work and of going on after a stop
    # A longer text, or line of JSON, is left out and counted; a step may hold 61 bytes of memory for each of its bytes.
    max_document_mb: Positive = 10
    on_bad_document: Literal["skip", "error"] = "skip"  # damage is counted with file and line, or stops the build
    gaps: Names = ()  # what is known to be missing or one-sided, for the datasheet


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PublishedConfig:
    """What a paper says of a component, to lay beside what was built."""

    raw_gib: Rate
    weight: Rate  # per cent of the mixture
    epochs: Rate
    mean_kib: Rate  # of a document
    documents: Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComponentConfig:
    """One source of documents."""

    kind: Kind  # a row of sources.py: how a file becomes documents
    paths: Names = Field(min_length=1)  # files, folders, patterns ("/usr/share/doc/**/changelog*.gz"), "python-stdlib"
    exclude: Names = ()  # patterns of whole paths that are left out
    licence: str
    consent: str = ""  # whether authors and hosts agreed, as far as is known
    origin: str = ""  # where a user gets it today, or that it can no longer be had
    optional: bool = False  # without any file it is left out, and said to be; otherwise that is an error
    text_key: str = "text"  # field or column of JSON lines and Parquet
    encoding: str = ""  # of text files that are not UTF-8, for example "latin-1"; empty: they are damaged
    pieces_kb: NonNegative = (
        0  # files with a longer text are cut between paragraphs into documents of this size; 0: never
    )
    min_bytes: NonNegative = 0  # a shorter document is left out
    epochs: Rate = 1.0  # copies of every document in the mixture; a fraction copies this share of them once more
    weight: Rate | None = None  # instead of epochs: share of mixture.bytes, relative to the other weights
    published: PublishedConfig | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterConfig:
    """What every step of [[steps]] has; steps are taken in the order of the file."""

    components: Names = ()  # only these; empty: all
    without: Names = ()  # all but these


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Repair(FilterConfig):
    """Mojibake, control characters and the like, by ftfy with DataTrove's settings."""

    kind: Literal["repair"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Length(FilterConfig):
    """Bytes of a document."""

    kind: Literal["length"]
    min_bytes: NonNegative = 1
    max_bytes: Positive | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Language(FilterConfig):
    """Language of a document by py3langid, from its first characters."""

    kind: Literal["language"]
    keep: Names = ()  # ISO 639-1; empty: all are kept and only counted
    min_score: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    characters: Positive = 2000  # that are looked at


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GopherRepetition(FilterConfig):
    """Repeated lines, paragraphs and n-grams: Gopher, table A1, by DataTrove."""

    kind: Literal["gopher-repetition"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GopherQuality(FilterConfig):
    """Words, symbols, bullets, ellipses and stop words: Gopher, appendix A1.1, by DataTrove."""

    kind: Literal["gopher-quality"]
    min_words: NonNegative = 50
    max_words: Positive = 100_000
    min_stop_words: NonNegative = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class C4(FilterConfig):
    """Lines without an end, too few sentences, braces: the rules of C4, by DataTrove."""

    kind: Literal["c4"]
    min_sentences: Annotated[int, Field(ge=-1)] = 5
    needs_end_punctuation: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FineWeb(FilterConfig):
    """Short lines, missing punctuation, lists: the rules of FineWeb, by DataTrove."""

    kind: Literal["fineweb"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskPII(FilterConfig):
    """E-mail and public IP addresses become examples of such, by DataTrove."""

    kind: Literal["mask-pii"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Quality(FilterConfig):
    """A classifier trained on own positives; kept if a Pareto draw exceeds 1 - score (The Pile, appendix C)."""

    kind: Literal["quality"]
    positives: Names  # components whose documents are what is wanted
    negatives: Names  # components as they are before any step
    documents: Positive = 10_000  # at most so many of either
    alpha: Rate = 3.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Decontaminate(FilterConfig):
    """Overlap of n-grams of words with evaluation sets (GPT-3, appendix C)."""

    kind: Literal["decontaminate"]
    against: Names  # of [evaluation]
    n_gram: Positive = 13
    action: Literal["cut", "drop"] = "cut"  # cut: the n-gram and `margin` characters around it; or the whole document
    margin: NonNegative = 200
    min_piece: NonNegative = 200  # characters; a shorter rest between two cuts goes as well
    max_cuts: Positive = 10  # a document with more is dropped
    common: Positive = 10  # an n-gram in more documents of the evaluation sets than this is no sign of them


Step = Repair | Length | Language | GopherRepetition | GopherQuality | C4 | FineWeb | MaskPII | Quality | Decontaminate


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Texts that a model will be tested on."""

    path: str  # text or JSON lines
    text_keys: Names = ("text",)  # fields of JSON lines that are joined


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeldoutConfig:
    """Documents kept from training, drawn by a hash of their names before anything else is done."""

    one_in: NonNegative = 1000  # 0: none


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DuplicatesConfig:
    """Documents that are there already: the first in the order of the file's components stays, held-out ones before all."""

    exact: bool = True  # same text but for case and spaces
    # near: MinHash with bands x rows hashes; pile: 3 x 3 of its 10 hashes, the best cut at 0.5 as datasketch takes it
    near: Literal["none", "pile", "fineweb", "own"] = "fineweb"
    bands: Positive = 14  # of "own"
    rows: Positive = 8
    n_gram: Positive = 5  # words in a shingle
    across: bool = True  # also between components; false: only inside each
    components: Names = ()  # only these lose documents, but for what is held out elsewhere; empty: all

    @property
    def bands_and_rows(self) -> tuple[int, int]:
        """Bands, and hashes in each."""
        return {"none": (0, 0), "pile": (3, 3), "fineweb": (14, 8), "own": (self.bands, self.rows)}[self.near]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LinesConfig:
    """Lines that recur in many documents: menus, licence headers."""

    min_documents: NonNegative = 0  # a line in at least so many documents of training is cut from all; 0: off
    min_characters: Positive = 30  # shorter lines stay


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureConfig:
    """How much of each component."""

    bytes: Positive | None = None  # of text in the mixture; needed where components have weights
    max_epochs: Rate = 4.0  # a weight that needs more passes over its component cannot be met


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokensConfig:
    """What is written for training."""

    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json or its folder


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasheetConfig:
    """Answers that only who makes the corpus can give; the datasheet says which of them are not given."""

    made_by: str = ""
    paid_by: str = ""
    timeframe: str = ""  # of the texts, and of collecting them
    people: str = ""  # who is named or can be recognised, what is sensitive in it
    review: str = ""  # ethical review, what it may do to those who wrote or are named
    used_for: str = ""
    not_for: str = ""
    given_to: str = ""  # who gets it, how and under which terms
    kept_by: str = ""  # whom to ask, how mistakes are mended, whether there will be other versions


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A corpus."""

    corpus: CorpusConfig
    components: dict[str, ComponentConfig] = Field(min_length=1)
    heldout: HeldoutConfig = Field(default_factory=HeldoutConfig)
    steps: tuple[Annotated[Step, Field(discriminator="kind")], ...] = ()
    evaluation: dict[str, EvaluationConfig] = Field(default_factory=dict)
    duplicates: DuplicatesConfig = Field(default_factory=DuplicatesConfig)
    lines: LinesConfig = Field(default_factory=LinesConfig)
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    datasheet: DatasheetConfig = Field(default_factory=DatasheetConfig)

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        """Names that point nowhere, and weights without a sum; raises ValueError with the remedy."""
        for name in self.components:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"components.{name}: a name is letters, digits, - and _, for files are named after it")
        for place, step in enumerate(self.steps):
            for field, known in _names(step, self):
                for name in getattr(step, field):
                    if name not in known:
                        there = ", ".join(known) or "none"
                        raise ValueError(f"steps.{place}.{field}: {name!r} is not declared; there are: {there}")
        if unknown := [name for name in self.duplicates.components if name not in self.components]:
            there = ", ".join(self.components)
            raise ValueError(f"duplicates.components: {unknown[0]!r} is not declared; there are: {there}")
        several = ("jsonl", "parquet", "warc", "mbox")
        if uncut := [name for name, one in self.components.items() if one.pieces_kb and one.kind in several]:
            raise ValueError(
                f"components.{uncut[0]}.pieces_kb: files of this kind are many documents already; take it out"
            )
        weighted = [name for name, component in self.components.items() if component.weight is not None]
        if weighted and len(weighted) < len(self.components):
            missing = next(name for name in self.components if name not in weighted)
            raise ValueError(f"components.{missing} has no weight, but components.{weighted[0]} has; give all or none")
        if bool(weighted) != (self.mixture.bytes is not None):
            raise ValueError("weights share out mixture.bytes: set both, or neither and let epochs decide")
        return self


def _names(step: Step, recipe: Recipe) -> list[tuple[str, list[str]]]:
    """Fields of a step that hold names, and the names that there are."""
    components = [("components", list(recipe.components)), ("without", list(recipe.components))]
    if isinstance(step, Quality):
        components += [("positives", list(recipe.components)), ("negatives", list(recipe.components))]
    if isinstance(step, Decontaminate):
        components += [("against", list(recipe.evaluation))]
    return components


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The corpus that a file describes, with "section.field=value" merged in; ConfigError with a line per mistake."""
    path = Path(path)
    return check_table(Recipe, read_toml(path, overrides), where=str(path))


def steps_of(recipe: Recipe, component: str) -> list[tuple[int, Step]]:
    """Number and settings of every step that a component takes."""
    return [
        (place, step)
        for place, step in enumerate(recipe.steps)
        if (not step.components or component in step.components) and component not in step.without
    ]


def resolve_epochs(recipe: Recipe, sizes: dict[str, int]) -> dict[str, float]:
    """Passes over every component, given the bytes of its training text; ConfigError where a weight cannot be met."""
    if recipe.mixture.bytes is None:
        return {name: recipe.components[name].epochs for name in sizes}
    weights = {name: recipe.components[name].weight or 0.0 for name in sizes}
    epochs = {}
    for name, size in sizes.items():
        wanted = weights[name] / math.fsum(weights.values()) * recipe.mixture.bytes
        epochs[name] = wanted / size
        if epochs[name] > recipe.mixture.max_epochs:
            raise ConfigError(
                f"components.{name}.weight = {weights[name]} asks for {wanted / 1e6:.1f} MB, but {size / 1e6:.1f} MB "
                f"are left of it: {epochs[name]:.1f} passes, more than mixture.max_epochs = {recipe.mixture.max_epochs}; "
                "lower the weight or mixture.bytes, or add sources"
            )
    return epochs


def subset(recipe: Recipe, *sections: str) -> dict:
    """The plain values of some sections, for what depends on these alone."""
    table = config_to_dict(recipe)
    known = {field.name for field in dataclasses.fields(Recipe)}
    assert set(sections) <= known, sections
    return {section: table.get(section) for section in sections}


def text_settings(recipe: Recipe) -> dict:
    """What the text of documents depends on: not on what is said of them, nor on how many copies the mixture has."""
    said = ("name", "about", "gaps", "licence", "consent", "origin", "optional", "published", "epochs", "weight")
    tables = subset(recipe, "corpus", "components", "heldout", "steps", "evaluation")
    for table in (tables["corpus"], *tables["components"].values()):
        for field in said:
            table.pop(field, None)
    return tables
