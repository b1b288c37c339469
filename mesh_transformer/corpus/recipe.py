# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Schema of a corpus recipe: one TOML file with components, filters, deduplication, mixture and tokenizer, checked strictly."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

from mesh_transformer.config import ConfigError, check_table, config_to_dict, read_toml
from mesh_transformer.config.field_types import STRICT
from mesh_transformer.config.renamed import find_renamed, translate_stored
from mesh_transformer.corpus.renamed import RECIPE, to_stored_names

Kind = Literal["text", "code", "jsonl", "parquet", "warc", "mbox", "latex", "html", "man", "rst", "info"]
Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CorpusConfig:
    """Options that apply to all components."""

    name: str
    about: str = ""  # purpose and audience; the first answer of the datasheet
    seed: NonNegativeInt = 0  # of the shuffle, of fractional epochs and of sampling by quality
    part_mb: PositiveInt = 32  # source files in one part, the unit of work and of resuming
    # A longer text, or line of JSON, is skipped and counted; a filter may need 61 bytes of memory per byte of text.
    max_document_mb: PositiveInt = 10
    on_bad_document: Literal["skip", "error"] = "skip"  # skip: count damage with file and line; error: stop the build
    gaps: Names = ()  # known omissions and biases, for the datasheet


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PublishedConfig:
    """Figures that a paper reports for a component, shown next to the figures of the build."""

    raw_gib: PositiveFloat
    weight: PositiveFloat  # percent of the mixture
    epochs: PositiveFloat
    mean_kib: PositiveFloat  # mean document size
    documents: PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComponentConfig:
    """One collection of source files."""

    kind: Kind  # file format: a key of KINDS in sources.py
    paths: Names = Field(min_length=1)  # files, folders, patterns ("/usr/share/doc/**/changelog*.gz"), "python-stdlib"
    exclude: Names = ()  # patterns of full paths to leave out
    license: str
    consent: str = ""  # whether authors and hosts agreed, as far as is known
    origin: str = ""  # where the files can be downloaded, or a note that they are no longer available
    optional: bool = False  # true: a component without files is reported and left out instead of being an error
    text_key: str = "text"  # field or column of JSON lines and Parquet
    encoding: str = (
        ""  # encoding of text files that are not UTF-8, for example "latin-1"; empty: such files are skipped
    )
    chunk_kb: NonNegativeInt = 0  # split longer files between paragraphs into documents of this size; 0: never
    min_bytes: NonNegativeInt = 0  # a shorter document is dropped
    # copies of every document in the mixture; a fraction is the share of documents with one more copy
    epochs: PositiveFloat = 1.0
    weight: PositiveFloat | None = None  # replaces epochs: share of mixture.bytes, relative to the other weights
    published: PublishedConfig | None = None  # figures of a paper, for comparison


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterConfig:
    """Fields common to all entries of [[filters]]; filters run in the order of the file."""

    components: Names = ()  # components that the filter runs on; empty: all
    exclude_components: Names = ()  # components that the filter does not run on


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RepairFilter(FilterConfig):
    """Repair mojibake and other damaged characters with ftfy and DataTrove's options."""

    kind: Literal["repair"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LengthFilter(FilterConfig):
    """Drop documents by their size in bytes."""

    kind: Literal["length"]
    min_bytes: NonNegativeInt = 1
    max_bytes: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LanguageFilter(FilterConfig):
    """Identify the language of a document from its first characters by py3langid, and drop other languages."""

    kind: Literal["language"]
    keep: Names = ()  # ISO 639-1 codes; empty: keep all languages and only count them
    min_score: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    characters: PositiveInt = 2000  # length of the prefix that the classifier reads


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GopherRepetitionFilter(FilterConfig):
    """Drop documents with repeated lines, paragraphs and n-grams (Gopher, table A1), by DataTrove."""

    kind: Literal["gopher-repetition"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GopherQualityFilter(FilterConfig):
    """Drop documents by words, symbols, bullets, ellipses and stop words (Gopher, appendix A1.1), by DataTrove."""

    kind: Literal["gopher-quality"]
    min_words: NonNegativeInt = 50
    max_words: PositiveInt = 100_000
    min_stop_words: NonNegativeInt = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class C4Filter(FilterConfig):
    """Apply the rules of C4 by DataTrove: lines without end punctuation, too few sentences, braces."""

    kind: Literal["c4"]
    min_sentences: Annotated[int, Field(ge=-1)] = 5
    needs_end_punctuation: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FineWebFilter(FilterConfig):
    """Apply the rules of FineWeb by DataTrove: short lines, missing punctuation, lists."""

    kind: Literal["fineweb"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskPIIFilter(FilterConfig):
    """Replace e-mail and public IP addresses by placeholders, by DataTrove."""

    kind: Literal["mask-pii"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QualityFilter(FilterConfig):
    """Keep a document if a Pareto sample exceeds 1 - its classifier score (The Pile, appendix C)."""

    kind: Literal["quality"]
    positives: Names  # components whose unfiltered documents are examples of good text
    negatives: Names  # components whose unfiltered documents are the other class
    documents: PositiveInt = 10_000  # maximum number of training documents of each class
    alpha: PositiveFloat = 3.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecontaminateFilter(FilterConfig):
    """Remove text that shares word n-grams with evaluation sets (GPT-3, appendix C)."""

    kind: Literal["decontaminate"]
    against: Names  # names of [evaluation] sections
    n_gram: PositiveInt = 13  # words
    action: Literal["cut", "drop"] = "cut"  # cut: the n-gram and `margin` characters on each side; drop: the document
    margin: NonNegativeInt = 200
    min_fragment: NonNegativeInt = 200  # characters; a shorter fragment between two cuts is removed as well
    max_cuts: PositiveInt = 10  # a document with more cuts is dropped
    max_ngram_documents: PositiveInt = 10  # an n-gram in more evaluation documents is ignored as a common phrase


Filter = (
    RepairFilter
    | LengthFilter
    | LanguageFilter
    | GopherRepetitionFilter
    | GopherQualityFilter
    | C4Filter
    | FineWebFilter
    | MaskPIIFilter
    | QualityFilter
    | DecontaminateFilter
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """An evaluation set that training text must not contain."""

    path: str  # text or JSON lines
    text_keys: Names = ("text",)  # fields of JSON lines that are joined


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HeldoutConfig:
    """Held-out documents, selected by a hash of their names before any other stage."""

    one_in: NonNegativeInt = 1000  # about one of `one_in` documents is held out; 0: none


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DuplicatesConfig:
    """Deduplication: of several duplicates, a held-out document is retained, or else the first by component and position."""

    exact: bool = True  # same text except for case and spaces
    # MinHash with bands x rows hashes. pile: 3 x 3, the split of The Pile's 10 hashes that datasketch finds for similarity 0.5
    near: Literal["none", "pile", "fineweb", "custom"] = "fineweb"
    bands: PositiveInt = 14  # number of bands if near = "custom"
    rows: PositiveInt = 8  # hashes in a band if near = "custom"
    n_gram: PositiveInt = 5  # words in a shingle
    across_components: bool = True  # false: only within each component
    # components from which duplicates are removed; empty: all. Copies of held-out text are removed from all components
    components: Names = ()

    @property
    def bands_and_rows(self) -> tuple[int, int]:
        """Number of bands, and of hashes in each band; zeros without near-duplicate removal."""
        return {"none": (0, 0), "pile": (3, 3), "fineweb": (14, 8), "custom": (self.bands, self.rows)}[self.near]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LinesConfig:
    """Removal of lines that recur in many documents, such as menus and license headers."""

    # a line that occurs in at least `min_documents` training documents is removed from all documents; 0: disabled
    min_documents: NonNegativeInt = 0
    min_characters: PositiveInt = 30  # shorter lines are retained


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureConfig:
    """Size of the training mixture."""

    bytes: PositiveInt | None = None  # bytes of text in the mixture; required if components have weights
    max_epochs: PositiveFloat = 4.0  # limit on the epochs that a weight may require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokensConfig:
    """Tokenizer of the training shards."""

    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json or its folder


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DatasheetConfig:
    """Answers that only the author of a corpus can give; the datasheet marks missing answers."""

    made_by: str = ""
    paid_by: str = ""
    timeframe: str = ""  # when the texts were written, and when they were collected
    people: str = ""  # who is named or identifiable, and which information is sensitive
    review: str = ""  # ethical review; effects on authors and on people who are named
    used_for: str = ""
    not_for: str = ""
    given_to: str = ""  # who receives the corpus, how and under which terms
    kept_by: str = ""  # contact, how errors are corrected, whether there will be other versions


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """Complete description of a corpus."""

    corpus: CorpusConfig
    components: dict[str, ComponentConfig] = Field(min_length=1)
    heldout: HeldoutConfig = Field(default_factory=HeldoutConfig)
    filters: tuple[Annotated[Filter, Field(discriminator="kind")], ...] = ()
    evaluation: dict[str, EvaluationConfig] = Field(default_factory=dict)
    duplicates: DuplicatesConfig = Field(default_factory=DuplicatesConfig)
    lines: LinesConfig = Field(default_factory=LinesConfig)
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    datasheet: DatasheetConfig = Field(default_factory=DatasheetConfig)

    @model_validator(mode="after")
    def check(self) -> "Recipe":
        """Raise ValueError for invalid or undeclared names, an unsupported chunk_kb, and inconsistent weights."""
        for name in self.components:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"components.{name}: invalid name; use letters, digits, - and _, since files are named after it"
                )
        for number, config in enumerate(self.filters):
            for field, declared in _referenced_names(config, self):
                for name in getattr(config, field):
                    _check_declared(f"filters.{number}.{field}", name, declared)
        for name in self.duplicates.components:
            _check_declared("duplicates.components", name, list(self.components))
        for name, component in self.components.items():
            if component.chunk_kb and component.kind in ("jsonl", "parquet", "warc", "mbox"):
                raise ValueError(
                    f"components.{name}.chunk_kb = {component.chunk_kb}: files of kind {component.kind} already hold many "
                    "documents; remove chunk_kb"
                )
        weighted = [name for name, component in self.components.items() if component.weight is not None]
        if weighted and len(weighted) < len(self.components):
            missing = next(name for name in self.components if name not in weighted)
            raise ValueError(
                f"components.{missing} has no weight, but components.{weighted[0]} has; set `weight` in all components or in none"
            )
        if weighted and self.mixture.bytes is None:
            raise ValueError(
                f"components.{weighted[0]}.weight = {self.components[weighted[0]].weight}, but mixture.bytes is not set; set "
                "both, or neither to use epochs"
            )
        if self.mixture.bytes is not None and not weighted:
            raise ValueError(
                f"mixture.bytes = {self.mixture.bytes}, but no component has a weight; set both, or neither to use epochs"
            )
        return self


def _check_declared(field: str, name: str, declared: list[str]) -> None:
    if name not in declared:
        raise ValueError(
            f"{field}: {name!r} is not declared; declared: {', '.join(declared) or 'none'}; correct the name, or add its section"
        )


def _referenced_names(config: Filter, recipe: Recipe) -> list[tuple[str, list[str]]]:
    """Return the fields of a filter that refer to other sections, with the names declared there."""
    components = list(recipe.components)
    fields = [("components", components), ("exclude_components", components)]
    if isinstance(config, QualityFilter):
        fields += [("positives", components), ("negatives", components)]
    if isinstance(config, DecontaminateFilter):
        fields += [("against", list(recipe.evaluation))]
    return fields


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe file and merge in "section.field=value" overrides; raise ConfigError with one line for each error."""
    path = Path(path)
    table = read_toml(path, overrides)
    if renamed := find_renamed(table, RECIPE):
        raise ConfigError("\n".join(f"{path}: {message}" for message in renamed))
    return check_table(Recipe, table, where=str(path))


def load_stored_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """Return the recipe stored with a corpus by this or an earlier version; `where` names its file in errors."""
    return check_table(Recipe, translate_stored(table, RECIPE), where=where)


def filters_for(recipe: Recipe, component: str) -> list[tuple[int, Filter]]:
    """Return number and configuration of every filter that runs on a component."""
    return [
        (number, config)
        for number, config in enumerate(recipe.filters)
        if (not config.components or component in config.components) and component not in config.exclude_components
    ]


def resolve_epochs(recipe: Recipe, train_bytes: dict[str, int]) -> dict[str, float]:
    """Return the epochs of every component, given the bytes of its training text.

    Raises ConfigError if a weight needs more than mixture.max_epochs.
    """
    if recipe.mixture.bytes is None:
        return {name: recipe.components[name].epochs for name in train_bytes}
    weights = {name: recipe.components[name].weight or 0.0 for name in train_bytes}
    epochs = {}
    for name, n_bytes in train_bytes.items():
        target = weights[name] / math.fsum(weights.values()) * recipe.mixture.bytes
        epochs[name] = target / n_bytes
        if epochs[name] > recipe.mixture.max_epochs:
            raise ConfigError(
                f"components.{name}.weight = {weights[name]} requires {target / 1e6:.1f} MB, but only {n_bytes / 1e6:.1f} MB "
                f"remain after filtering: {epochs[name]:.1f} epochs, more than mixture.max_epochs = "
                f"{recipe.mixture.max_epochs}; lower the weight or mixture.bytes, or add sources"
            )
    return epochs


def section_tables(recipe: Recipe, *sections: str) -> dict[str, Any]:
    """Return the plain values of some sections, to identify the stages that depend on only these sections."""
    table = config_to_dict(recipe)
    known = {field.name for field in dataclasses.fields(Recipe)}
    assert set(sections) <= known, sections
    return {section: table.get(section) for section in sections}


def text_tables(recipe: Recipe) -> dict[str, Any]:
    """Return the fields that the filtered text depends on, with the field names of version 1.0.

    Descriptions of the sources, and the epochs and weights of the mixture, are excluded.
    """
    descriptive = ("name", "about", "gaps", "license", "consent", "origin", "optional", "published", "epochs", "weight")
    tables = section_tables(recipe, "corpus", "components", "heldout", "filters", "evaluation")
    for table in (tables["corpus"], *tables["components"].values()):
        for field in descriptive:
            table.pop(field, None)
    return to_stored_names(tables)


def identify_filter(config: Filter) -> str:
    """Return the values of a filter as one string, with the field names of version 1.0."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    stored = to_stored_names({"filters": {"0": values}})["steps"]["0"]
    fields = (f"{name}={value!r}" for name, value in zip(stored, values.values(), strict=True))
    return f"{type(config).__name__.removesuffix('Filter')}({', '.join(fields)})"
