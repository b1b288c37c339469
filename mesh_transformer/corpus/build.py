# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""A corpus from its recipe: the stages in their order, each made anew only if something it depends on has changed.

OUT/work holds the stages, OUT/documents the final text by side and component, OUT/tokens the shards, OUT/dropped what
was left out and why. OUT/manifest.json has the digest of every output and is written last: without it there is no
corpus. Nothing in it depends on time, place or number of workers: the same sources and recipe give the same manifest.
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
from mesh_transformer.corpus.recipe import Quality, Recipe, resolve_epochs, steps_of, subset, text_settings
from mesh_transformer.corpus.sources import Part, find_parts
from mesh_transformer.corpus.stage_dedup import RANGE_ENTRIES, RemovalStage, BandMatchStage, ExactMatchStage, SignatureStage
from mesh_transformer.corpus.stage_filter import SPLITS, FilterStage, ClassifierStage
from mesh_transformer.corpus.stage_mix import TokenizationStage, ShardStage, describe_tokenizer
from mesh_transformer.corpus.stage_select import SelectionStage, check_disjoint
from mesh_transformer.corpus.stages import CorpusError, Executor, ProgressFn, reuse_parts, run_stage
from mesh_transformer.corpus.survey import SurveyStage, describe_survey
from mesh_transformer.storage.atomic_files import link_file, replace_file

VERSION = 2  # of what stages write; a change of it makes all of them anew

Records = list[dict[str, Any]]


class Corpus(NamedTuple):
    """What a build came to."""

    recipe: Recipe
    missing: list[str]  # optional components without files
    parts: list[Part]
    filtered: Records
    matrix: dict[str, list[list[Any]]]  # exact and near: component, component of the one that stays, documents
    selected: Records
    tokenized: Records
    epochs: dict[str, float]
    survey: dict[str, Any]  # what the text speaks of
    split_check: dict[str, int]
    manifest: dict[str, Any]


class CorpusBuilder:
    """Runs stages below one folder."""

    def __init__(self, recipe: Recipe, out: Path, machines: Executor, report: ProgressFn):
        self.recipe, self.out, self.machines, self.report = recipe, out, machines, report
        self.used: set[Path] = set()

    def folder(self, name: str, *depends: Any) -> Path:
        """Where a stage lies, given all that it depends on."""
        key = hashlib.sha256(json.dumps([VERSION, name, *map(str, depends)]).encode()).hexdigest()[:12]
        path = self.out / "work" / f"{name}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        self.used.add(path)
        return path

    def run(self, task: Any, tasks: int) -> Records:
        """All parts of a stage."""
        name = task.folder.name.rpartition("-")[0]
        return run_stage(name, task, tasks, task.folder, self.machines, self.report)


def build_corpus(
    recipe: Recipe, out: Path, executor: Executor, on_progress: ProgressFn = lambda name, done, total: None
) -> Corpus:
    """Build, or go on building, the corpus in `out`.

    Raises DataError for sources that cannot be used, ConfigError for weights that cannot be met, CorpusError if
    anything is missing in the end.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        (out / "manifest.json").unlink(missing_ok=True)  # until this build is whole, there is no corpus
        builder = CorpusBuilder(recipe, out, executor, on_progress)
        parts, missing = find_parts(recipe)
        try:
            corpus, selected, shards = _run_stages(builder, parts, missing)
            _publish(selected, out / "documents", SPLITS)
            _publish(shards, out / "tokens", None)
        except OSError as error:
            if _is_disk_full(error):
                raise CorpusError(
                    f"{out}: its disk is full; free some room and build again, what is whole stays"
                ) from None
            raise
        finally:
            executor.close()
        for folder in (out / "work").iterdir():  # of recipes before this one
            if folder not in builder.used:
                shutil.rmtree(folder)
        manifest = corpus.manifest
        replace_file(out / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
    return corpus


def _is_disk_full(error: OSError) -> bool:
    """NumPy gives no number, but says how much was written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error))


def _run_stages(builder: CorpusBuilder, parts: list[Part], missing: list[str]) -> tuple[Corpus, Path, Path]:
    recipe, components = builder.recipe, tuple(part.component for part in parts)
    plan = hashlib.sha256(repr(parts).encode()).hexdigest()
    text = text_settings(recipe)
    places = tuple(i for i, step in enumerate(recipe.steps) if isinstance(step, Quality))
    trained = builder.folder("train-quality", plan, text)
    builder.run(ClassifierStage(recipe, tuple(parts), places, trained), len(places))
    classifiers = {place: trained / f"quality-{place}.bin" for place in places}
    sets = {name: _fingerprint(config.path) for name, config in recipe.evaluation.items()}
    filtered = builder.folder("filter", plan, text, sets)
    inputs = _describe_inputs(recipe, parts, classifiers, sets)
    reuse_parts(filtered, inputs, sorted(set(filtered.parent.glob("filter-*")) - {filtered}))
    read = builder.run(FilterStage(recipe, tuple(parts), classifiers, inputs, filtered), len(parts))

    signed = builder.folder("sign", filtered, subset(recipe, "duplicates", "lines"))
    signatures = builder.run(SignatureStage(recipe, filtered, signed), len(parts))
    entries = sum(max(record["documents"], record["lines"]) for record in signatures)
    ranges = 1 + entries // RANGE_ENTRIES
    bands = builder.folder("match-bands", signed)
    if recipe.duplicates.near != "none":
        builder.run(BandMatchStage(recipe, signed, len(parts), bands), recipe.duplicates.bands_and_rows[0])
    equal = builder.folder("match-exact", signed, ranges)
    builder.run(ExactMatchStage(recipe, signed, len(parts), ranges, equal), ranges)
    decided = builder.folder("decide", equal, bands)
    decision = builder.run(RemovalStage(recipe, components, signed, bands, equal, ranges, decided), 1)

    selected = builder.folder("select", decided)
    kept = builder.run(SelectionStage(recipe, components, filtered, equal, decided, ranges, selected), len(parts))
    proof = check_disjoint(selected, len(parts))
    surveyed = builder.folder("survey", selected)
    survey = describe_survey(builder.run(SurveyStage(recipe, components, selected, surveyed), len(parts)), surveyed)
    epochs = resolve_epochs(recipe, _sizes(recipe, missing, read, kept))
    tokenised = builder.folder(
        "tokenise", selected, describe_tokenizer(recipe), sorted(epochs.items()), recipe.corpus.seed
    )
    counts = builder.run(TokenizationStage(recipe, components, epochs, selected, tokenised), len(parts))
    shards = builder.folder("shards", tokenised)
    builder.run(ShardStage(recipe, _shards(counts), tokenised, shards), len(_shards(counts)))

    manifest = _manifest(builder, read, kept, shards)
    matrix = decision[0]["matrix"]
    return Corpus(recipe, missing, parts, read, matrix, kept, counts, epochs, survey, proof, manifest), selected, shards


def _describe_inputs(
    recipe: Recipe, parts: list[Part], classifiers: dict[int, Path], sets: dict[str, str]
) -> tuple[str, ...]:
    """For every part of the filter stage a digest of its files, and of the settings of its component alone."""
    text = text_settings(recipe)
    inputs = []
    for part in parts:
        steps = steps_of(recipe, part.component)
        models = [classifiers[place].parent.name for place, _ in steps if place in classifiers]
        own = [part, text["components"][part.component], steps, models]
        common = [VERSION, text["corpus"], text["heldout"], text["evaluation"], sets]
        inputs.append(hashlib.sha256(repr([own, common]).encode()).hexdigest()[:32])
    return tuple(inputs)


def _sizes(recipe: Recipe, missing: list[str], read: Records, selected: Records) -> dict[str, int]:
    """Bytes of training text of every component; CorpusError for one that nothing is left of."""
    sizes = {name: 0 for name in recipe.components if name not in missing}
    for record in selected:
        sizes[record["component"]] += record["sides"]["train"]["bytes"]
    for name in (name for name, size in sizes.items() if not size):
        own = [record for record in read if record["component"] == name]
        if any(record["raw"]["documents"] for record in own):
            raise CorpusError(
                f"component {name}: nothing is left of it for training; look at work/filter-*/dropped for the reasons, "
                "and take steps off it with their `without`, or remove it"
            )
        first = next((found[0] for record in own for found in record["bad_examples"].values()), "its files are empty")
        raise CorpusError(
            f"component {name}: no document of it could be read, first {first}; mend its files, or remove it"
        )
    return sizes


def _shards(counts: Records) -> tuple[tuple[str, tuple[str, ...], int], ...]:
    """The mixture, and what is held out of each component."""
    train = tuple(run for record in counts for run in record["train_runs"])
    shards = [("train", train, sum(record["train"]["copied_tokens"] for record in counts))]
    for component in dict.fromkeys(record["component"] for record in counts):
        own = [record for record in counts if record["component"] == component]
        if runs := tuple(run for record in own for run in record["heldout_runs"]):
            shards.append((f"heldout-{component}", runs, sum(record["heldout"]["tokens"] for record in own)))
    return tuple(shards)


def _fingerprint(path: str) -> str:
    """Digest of an evaluation set, which is small."""
    root = Path(os.path.expanduser(path))
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return ",".join(digest_file(file) for file in files if file.is_file())


def _manifest(builder: CorpusBuilder, read: Records, kept: Records, shards: Path) -> dict[str, Any]:
    """Digests of all inputs and outputs."""
    outputs = {f"documents/{name}": found for record in kept for name, found in record["outputs"].items()}
    outputs = {name: found for name, found in outputs.items() if name.split("/")[1] in SPLITS}
    for path in sorted(shards.glob("*.bin")) + sorted(shards.glob("*.idx")):
        outputs[f"tokens/{path.name}"] = {"size": path.stat().st_size, "digest": digest_file(path)}
    inputs = {name: digest for record in read for name, digest in record["source_digests"].items()}
    recipe = config_to_dict(builder.recipe)
    table: dict[str, Any] = {"version": VERSION, "recipe": recipe, "inputs": inputs, "outputs": outputs}
    return table | {"digest": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()}


def _publish(stage: Path, place: Path, folders: tuple[str, ...] | None) -> None:
    """What a stage made under the name that it is known by, without copying it where the file system can."""
    fresh = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    for folder in folders or ("",):
        (fresh / folder).mkdir(parents=True, exist_ok=True)
        for path in sorted((stage / folder).iterdir()):
            if path.is_file():
                link_file(path, fresh / folder / path.name)
    shutil.rmtree(place, ignore_errors=True)
    os.rename(fresh, place)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{out}: another build is at work there") from None
        yield
