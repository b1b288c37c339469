# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Build a corpus from its recipe: run the stages in order, each only if its inputs have changed.

OUT/work has the folders of the stages, with the documents that they dropped; OUT/documents has the final text by split
and component, and OUT/tokens the shards. OUT/manifest.json has the digest of every output and is written last: without
it the corpus is incomplete. The manifest does not depend on time, output path or number of workers: the same sources
and recipe give the same manifest.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mesh_transformer.config import config_to_dict
from mesh_transformer.corpus.parts import digest_file
from mesh_transformer.corpus.recipe import (
    QualityFilter,
    Recipe,
    filters_for,
    identify_filter,
    resolve_epochs,
    section_tables,
    text_tables,
)
from mesh_transformer.corpus.sources import Part, find_parts
from mesh_transformer.corpus.stage_dedup import (
    RANGE_ENTRIES,
    BandMatchStage,
    ExactMatchStage,
    RemovalStage,
    SignatureStage,
)
from mesh_transformer.corpus.stage_filter import SPLITS, ClassifierStage, FilterStage
from mesh_transformer.corpus.stage_mix import ShardStage, TokenizationStage, describe_tokenizer
from mesh_transformer.corpus.stage_select import SelectionStage, check_disjoint
from mesh_transformer.corpus.stages import CorpusError, Executor, ProgressFn, ignore_progress, reuse_parts, run_stage
from mesh_transformer.corpus.survey import SurveyStage, describe_survey
from mesh_transformer.storage.atomic_files import link_file, replace_file

VERSION = 2  # of the files that the stages write; a new version rebuilds all stages

Records = list[dict[str, Any]]


class Corpus(NamedTuple):
    """Result of a build: the records of its stages, and the statistics computed from them."""

    recipe: Recipe
    missing: list[str]  # optional components without files
    parts: list[Part]
    filtered: Records
    matrix: dict[str, list[list[Any]]]  # "exact" and "near" -> [removed from, retained in, count] by component
    selected: Records
    tokenized: Records
    epochs: dict[str, float]
    survey: dict[str, Any]  # topics, profanity and pronouns
    split_check: dict[str, int]  # comparison of held-out and training texts
    manifest: dict[str, Any]


class CorpusBuilder:
    """Runs the stages of one corpus, each in a folder of OUT/work."""

    def __init__(self, recipe: Recipe, out: Path, executor: Executor, on_progress: ProgressFn):
        self.recipe = recipe
        self.out = out
        self.executor = executor
        self.on_progress = on_progress
        self.used: set[Path] = set()

    def folder(self, name: str, *depends: Any) -> Path:
        """Create and return the folder of a stage; the folder is named after a digest of the stage's inputs."""
        key = hashlib.sha256(json.dumps([VERSION, name, *map(str, depends)]).encode()).hexdigest()[:12]
        path = self.out / "work" / f"{name}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        self.used.add(path)
        return path

    def run(self, task: Any, tasks: int) -> Records:
        """Make the missing parts of a stage and return the records of all parts."""
        name = task.folder.name.rpartition("-")[0]
        return run_stage(name, task, tasks, task.folder, self.executor, self.on_progress)


def build_corpus(recipe: Recipe, out: Path, executor: Executor, on_progress: ProgressFn = ignore_progress) -> Corpus:
    """Build the corpus in `out`, or resume an interrupted build.

    Raises DataError for unusable sources, ConfigError for weights that need too many epochs, and CorpusError if a part is
    incomplete, a component has no training text, the disk is full, or another build runs in `out`.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        (out / "manifest.json").unlink(missing_ok=True)  # marks the corpus as incomplete during the build
        builder = CorpusBuilder(recipe, out, executor, on_progress)
        parts, missing = find_parts(recipe)
        try:
            corpus, selected, shards = _run_stages(builder, parts, missing)
            _publish(selected, out / "documents", SPLITS)
            _publish(shards, out / "tokens", ("",))
        except OSError as error:
            if _is_disk_full(error):
                raise CorpusError(
                    f"{out}: the disk or quota is full ({error}); free some space and run the same command again: complete parts "
                    "are retained"
                ) from None
            raise
        finally:
            executor.close()
        for folder in (out / "work").iterdir():
            if folder not in builder.used:  # left by an earlier recipe
                shutil.rmtree(folder)
        replace_file(out / "manifest.json", json.dumps(corpus.manifest, indent=1, sort_keys=True).encode())
    return corpus


def _is_disk_full(error: OSError) -> bool:
    """Return whether the disk or quota is full. NumPy's error has no errno, but a message with the bytes written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error))


def _run_stages(builder: CorpusBuilder, parts: list[Part], missing: list[str]) -> tuple[Corpus, Path, Path]:
    """Return the corpus, the folder of its documents and the folder of its shards."""
    recipe = builder.recipe
    components = tuple(part.component for part in parts)
    filtered, filter_records = _run_filters(builder, parts)

    signed = builder.folder("signatures", filtered, section_tables(recipe, "duplicates", "lines"))
    signatures = builder.run(SignatureStage(recipe, filtered, signed), len(parts))
    entries = sum(max(record["documents"], record["lines"]) for record in signatures)
    ranges = 1 + entries // RANGE_ENTRIES
    bands = builder.folder("match-bands", signed)
    if recipe.duplicates.near != "none":
        builder.run(BandMatchStage(recipe, signed, len(parts), bands), recipe.duplicates.bands_and_rows[0])
    matched = builder.folder("match-exact", signed, ranges)
    builder.run(ExactMatchStage(recipe, signed, len(parts), ranges, matched), ranges)
    removals = builder.folder("removals", matched, bands)
    removal_records = builder.run(RemovalStage(recipe, components, signed, bands, matched, ranges, removals), 1)

    selected = builder.folder("select", removals)
    selection_records = builder.run(
        SelectionStage(recipe, components, filtered, matched, removals, ranges, selected), len(parts)
    )
    split_check = check_disjoint(selected, len(parts))
    surveyed = builder.folder("survey", selected)
    survey = describe_survey(builder.run(SurveyStage(recipe, components, selected, surveyed), len(parts)), surveyed)
    epochs = resolve_epochs(recipe, _train_bytes(recipe, missing, filter_records, selection_records))
    tokenized = builder.folder(
        "tokenize", selected, describe_tokenizer(recipe), sorted(epochs.items()), recipe.corpus.seed
    )
    token_records = builder.run(TokenizationStage(recipe, components, epochs, selected, tokenized), len(parts))
    shards = builder.folder("shards", tokenized)
    plan = _plan_shards(token_records)
    builder.run(ShardStage(recipe, plan, tokenized, shards), len(plan))

    corpus = Corpus(
        recipe=recipe,
        missing=missing,
        parts=parts,
        filtered=filter_records,
        matrix=removal_records[0]["matrix"],
        selected=selection_records,
        tokenized=token_records,
        epochs=epochs,
        survey=survey,
        split_check=split_check,
        manifest=_manifest(recipe, filter_records, selection_records, shards),
    )
    return corpus, selected, shards


def _run_filters(builder: CorpusBuilder, parts: list[Part]) -> tuple[Path, Records]:
    """Train the quality classifiers, then filter all parts; return the stage's folder and records."""
    recipe = builder.recipe
    parts_digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    text = text_tables(recipe)
    numbers = tuple(i for i, config in enumerate(recipe.filters) if isinstance(config, QualityFilter))
    trained = builder.folder("train-quality", parts_digest, text)
    builder.run(ClassifierStage(recipe, tuple(parts), numbers, trained), len(numbers))
    classifiers = {number: trained / f"quality-{number}.bin" for number in numbers}
    evaluation_digests = {name: _digest_set(config.path) for name, config in recipe.evaluation.items()}
    folder = builder.folder("filter", parts_digest, text, evaluation_digests)
    inputs = _describe_inputs(recipe, parts, classifiers, evaluation_digests)
    reuse_parts(folder, inputs, sorted(set(folder.parent.glob("filter-*")) - {folder}))
    return folder, builder.run(FilterStage(recipe, tuple(parts), classifiers, inputs, folder), len(parts))


def _describe_inputs(
    recipe: Recipe, parts: list[Part], classifiers: dict[int, Path], evaluation_digests: dict[str, str]
) -> tuple[str, ...]:
    """Return for every part of the filter stage a digest of its files and of the fields that concern its component.

    The digested string has the format and the names of version 1.0, so that parts filtered by that version are reused.
    """
    text = text_tables(recipe)
    common = repr([VERSION, text["corpus"], text["heldout"], text["evaluation"], evaluation_digests])
    inputs = []
    for part in parts:
        configs = filters_for(recipe, part.component)
        filters = ", ".join(f"({number}, {identify_filter(config)})" for number, config in configs)
        models = [classifiers[number].parent.name for number, _ in configs if number in classifiers]
        part_fields = f"[{part!r}, {text['components'][part.component]!r}, [{filters}], {models!r}]"
        inputs.append(hashlib.sha256(f"[{part_fields}, {common}]".encode()).hexdigest()[:32])
    return tuple(inputs)


def _train_bytes(recipe: Recipe, missing: list[str], filtered: Records, selected: Records) -> dict[str, int]:
    """Return the bytes of training text of every component; raise CorpusError if a component has no training text."""
    train_bytes = {name: 0 for name in recipe.components if name not in missing}
    for record in selected:
        train_bytes[record["component"]] += record["splits"]["train"]["bytes"]
    for name in (name for name, n_bytes in train_bytes.items() if not n_bytes):
        component_records = [record for record in filtered if record["component"] == name]
        if any(record["raw"]["documents"] for record in component_records):
            raise CorpusError(
                f"component {name}: no training text is left after filtering and deduplication; `python "
                f"scripts/inspect_corpus.py OUT --dropped --component {name}` prints the reasons; add {name} to "
                "`exclude_components` of the filters that drop its documents, or remove the component"
            )
        errors = (messages[0] for record in component_records for messages in record["bad_examples"].values())
        first = next(errors, "its files are empty")
        raise CorpusError(
            f"component {name}: none of its documents could be read; first error: {first}; correct "
            f"components.{name}.paths or the files, or remove the component"
        )
    return train_bytes


def _plan_shards(records: Records) -> tuple[tuple[str, tuple[str, ...], int], ...]:
    """Return (name, runs, number of tokens) of the training shard and of one held-out shard per component."""
    train = tuple(run for record in records for run in record["train_runs"])
    shards = [("train", train, sum(record["train"]["copied_tokens"] for record in records))]
    for component in dict.fromkeys(record["component"] for record in records):
        component_records = [record for record in records if record["component"] == component]
        if runs := tuple(run for record in component_records for run in record["heldout_runs"]):
            shards.append(
                (f"heldout-{component}", runs, sum(record["heldout"]["tokens"] for record in component_records))
            )
    return tuple(shards)


def _digest_set(path: str) -> str:
    """Return the digests of the files of an evaluation set, joined by commas."""
    root = Path(os.path.expanduser(path))
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return ",".join(digest_file(file) for file in files if file.is_file())


def _manifest(recipe: Recipe, filtered: Records, selected: Records, shards: Path) -> dict[str, Any]:
    """Return the content of manifest.json: the recipe and the digests of all inputs and outputs."""
    outputs = {f"documents/{name}": output for record in selected for name, output in record["outputs"].items()}
    outputs = {name: output for name, output in outputs.items() if name.split("/")[1] in SPLITS}
    for path in sorted(shards.glob("*.bin")) + sorted(shards.glob("*.idx")):
        outputs[f"tokens/{path.name}"] = {"size": path.stat().st_size, "digest": digest_file(path)}
    inputs = {name: digest for record in filtered for name, digest in record["source_digests"].items()}
    table: dict[str, Any] = {
        "version": VERSION,
        "recipe": config_to_dict(recipe),
        "inputs": inputs,
        "outputs": outputs,
    }
    return table | {"digest": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()}


def _publish(stage: Path, target: Path, folders: tuple[str, ...]) -> None:
    """Replace `target` by the given folders of `stage`; files are hard links where the file system supports them."""
    fresh = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    for folder in folders:
        (fresh / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((stage / folder).iterdir()):
            if path.is_file():
                link_file(path, fresh / folder / path.name)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(fresh, target)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"{out}: another build is running in this folder; wait until it ends, or choose another OUT"
            ) from None
        yield
