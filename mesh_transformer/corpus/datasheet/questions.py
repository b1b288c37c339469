# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Questions of Datasheets for Datasets (Gebru et al. 2021), abridged, with answers from the build and its recipe."""

from typing import Any

from mesh_transformer.corpus.recipe import Recipe

Answers = dict[str, list[tuple[str, str]]]  # chapter -> (question, answer); an empty answer means "not answered"


def answer_questions(sheet: dict[str, Any], recipe: Recipe) -> Answers:
    """Return all questions with their answers; `sheet` is the datasheet without the answers."""
    answers = recipe.datasheet
    parts = sheet["components"]
    documents = sum(part["train_documents"] for part in parts.values())
    heldout = sum(part["heldout_documents"] for part in parts.values())
    raw = sum(part["raw_bytes"] for part in parts.values()) / 1e6
    retained = sum(part["train_bytes"] for part in parts.values()) / 1e6
    removed = sum(part["exact_duplicates"] + part["near_duplicates"] for part in parts.values())
    skipped = sum(sum(part["skipped"].values()) for part in parts.values())
    profanity = sheet["survey"]["profanity"].values()
    share = sum(count["profane"] for count in profanity) / max(sum(count["sentences"] for count in profanity), 1)
    kinds = ", ".join(dict.fromkeys(config.kind for config in recipe.filters)) or "none"
    masked = any(config.kind == "mask-pii" for config in recipe.filters)
    tested = {name for config in recipe.filters if config.kind == "decontaminate" for name in config.against}
    consent = "; ".join(f"{name}: {part['consent']}" for name, part in parts.items() if part["consent"])
    licenses = "; ".join(f"{name}: {part['license']}" for name, part in parts.items())
    origins = "; ".join(f"{name}: {part['origin']}" for name, part in parts.items() if part["origin"])
    return {
        "Motivation": [
            ("For what purpose was it created?", recipe.corpus.about),
            ("Who created it, on whose behalf?", answers.made_by),
            ("Who funded it?", answers.paid_by),
        ],
        "Composition": [
            ("What do the instances represent?", f"Documents: files, pages, messages or lines of {len(parts)} components."),
            ("How many instances are there?",
             f"{documents:,} for training, {heldout:,} held out; {retained:.1f} MB of {raw:.1f} MB raw."),
            ("Is it a sample of a larger set?", "No: it has all documents of the sources, after filtering."),
            ("What does each instance consist of?", "Text (UTF-8), an id from its file and position, its component; tokens."),
            ("Is there a label or target?", "None except the component and, where measured, language and quality."),
            ("Is any information missing?", " ".join([*recipe.corpus.gaps, f"{skipped:,} documents could not be read."])),
            ("Are relations between instances explicit?", "Chunks and lines of a file share its name; other relations are not."),
            ("Are there recommended splits?", f"Held out: one in {recipe.heldout.one_in} by a hash of the name, 0 texts in both."
             if recipe.heldout.one_in else "None: no documents are held out."),
            ("Are there errors, noise or redundancies?", f"{removed:,} duplicates were removed; near duplicates that MinHash did "
             "not find remain. Markup is converted to text by rules, with errors; see the samples."),
            ("Does it rely on external resources?", "No: the text is stored. Links in it are not resolved."),
            ("Does it contain confidential data?", answers.people),
            ("Does it contain offensive data?", f"{share:.2%} of sampled sentences are classified as profane, see Profanity."),
            ("Can individuals be identified?", answers.people),
            ("How was personal data handled?", "E-mail and public IP addresses are masked, names are not." if masked
             else "It was not handled: no filter masks personal data."),
        ],
        "Collection": [
            ("How was the data acquired?", origins),
            ("How was it selected?", f"All files of the paths in the recipe; filters: {kinds}."),
            ("Who collected it?", answers.made_by),
            ("Over what timeframe?", answers.timeframe),
            ("Was there an ethical review or an impact analysis?", answers.review),
            ("Did individuals consent, and can they revoke it?", consent),
        ],
        "Preprocessing": [
            ("What preprocessing was done?", f"Filters: {kinds}. Exact duplicates "
             f"{'removed' if recipe.duplicates.exact else 'retained'}; "
             f"near duplicates: {recipe.duplicates.near}. See Filters and deduplication."),
            ("Is the raw data available?", "Not as a copy: the manifest has name and digest of every source file."),
            ("Is the software available?", "Yes: scripts/build_corpus.py with the recipe at the end of this page."),
        ],
        "Uses": [
            ("What has it been used for?", answers.used_for),
            ("What else could it be used for?", answers.used_for),
            ("Does its composition affect future uses?", " ".join(recipe.corpus.gaps)),
            ("Was it decontaminated?", f"Shared n-grams were cut or dropped against {', '.join(sorted(tested))}."
             if tested else "No: no filter compares it with evaluation sets."),
            ("What should it not be used for?", answers.not_for),
        ],
        "Distribution": [
            ("To whom, how and when is it distributed?", answers.given_to),
            ("Under which license or terms?", licenses),
        ],
        "Maintenance": [
            ("Who maintains it, and can be contacted?", answers.kept_by),
            ("Will it be updated?", answers.kept_by),
            ("Can others extend it?", "Yes: add components or filters to the recipe and build again."),
        ],
    }  # fmt: skip
