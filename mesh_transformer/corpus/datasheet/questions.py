# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""The questions of Datasheets for Datasets (Gebru et al. 2021), in short, with what the build and its recipe answer."""

from typing import Any

from mesh_transformer.corpus.recipe import Recipe

Answers = dict[str, list[tuple[str, str]]]  # chapter -> question, answer; "" where nobody has given one


def answer_questions(sheet: dict[str, Any], recipe: Recipe) -> Answers:
    """All of them; `sheet` is what datasheet.describe_corpus has found so far."""
    said, parts = recipe.datasheet, sheet["components"]
    documents = sum(part["train_documents"] for part in parts.values())
    heldout = sum(part["heldout_documents"] for part in parts.values())
    raw, kept = (sum(part[key] for part in parts.values()) / 1e6 for key in ("raw_bytes", "train_bytes"))
    removed = sum(part["exact_duplicates"] + part["near_duplicates"] for part in parts.values())
    unread = sum(sum(part["left_out"].values()) for part in parts.values())
    profanity = sheet["survey"]["profanity"].values()
    share = sum(one["profane"] for one in profanity) / max(sum(one["sentences"] for one in profanity), 1)
    kinds = ", ".join(dict.fromkeys(step.kind for step in recipe.filters)) or "none"
    masked = any(step.kind == "mask-pii" for step in recipe.filters)
    tested = {name for step in recipe.filters if step.kind == "decontaminate" for name in step.against}
    consent = "; ".join(f"{name}: {part['consent']}" for name, part in parts.items() if part["consent"])
    licences = "; ".join(f"{name}: {part['licence']}" for name, part in parts.items())
    origins = "; ".join(f"{name}: {part['origin']}" for name, part in parts.items() if part["origin"])
    return {
        "Motivation": [
            ("What was it made for?", recipe.corpus.about),
            ("Who made it, on whose behalf?", said.made_by),
            ("Who paid for it?", said.paid_by),
        ],
        "Composition": [
            ("What does an instance stand for?", f"One document: a file, page, message or line of {len(parts)} components."),
            ("How many are there?", f"{documents:,} for training, {heldout:,} held out; {kept:.1f} MB of {raw:.1f} MB raw."),
            ("Is it a sample of a larger set?", "All that the sources below held on the day of the build, less what steps took."),
            ("What does an instance consist of?", "Text (UTF-8), an id with its place in the source, its component; tokens."),
            ("Is there a label or target?", "None, but the component and, where measured, language and quality."),
            ("Is anything missing?", " ".join([*recipe.corpus.gaps, f"{unread:,} places could not be read."])),
            ("Are relations between instances explicit?", "Pieces and lines of one file share its name; nothing else is kept."),
            ("Are there splits?", f"Held out: one in {recipe.heldout.one_in} by a hash of the name, 0 texts in both."
             if recipe.heldout.one_in else "None are held out."),
            ("Are there errors, noise, redundancies?", f"{removed:,} duplicates were removed; near ones below the bands' "
             "reach stay. Markup is turned to text by rules, not always well: see the samples."),
            ("Does it depend on anything outside?", "No: text is stored. Links in it lead where they lead."),
            ("Is anything confidential?", said.people),
            ("Is anything offensive?", f"{share:.2%} of sampled sentences are taken for profane, see Profanity."),
            ("Can groups or persons be told?", said.people),
            ("What was done about personal data?", "E-mail and public IP addresses are masked, names are not." if masked
             else "Nothing: no step masks personal data."),
        ],
        "Collection": [
            ("Where is it from, and how was it acquired?", origins),
            ("How was it chosen?", f"All files of the paths in the recipe; steps: {kinds}."),
            ("Who collected it?", said.made_by),
            ("Over what time?", said.timeframe),
            ("Was there an ethical review, a study of its effect on people?", said.review),
            ("Did people know and consent, and can they withdraw?", consent),
        ],
        "Preprocessing": [
            ("What was done to it?", f"Steps: {kinds}. Duplicates: exact {'removed' if recipe.duplicates.exact else 'kept'}, "
             f"near ones {recipe.duplicates.near}. See what each step took."),
            ("Is the raw text kept?", "No copy: the manifest has name and digest of every source file."),
            ("Is the software available?", "Yes: scripts/build_corpus.py with the recipe at the end of this page."),
        ],
        "Uses": [
            ("What has it been used for?", said.used_for),
            ("What else might it be used for?", said.used_for),
            ("Does its making bear on later use?", " ".join(recipe.corpus.gaps)),
            ("Was it kept apart from test sets?", f"Overlap of n-grams cut or dropped against {', '.join(sorted(tested))}."
             if tested else "No: no step compares it with any."),
            ("What should it not be used for?", said.not_for),
        ],
        "Distribution": [
            ("Who gets it, how and when?", said.given_to),
            ("Under which licence or terms?", licences),
        ],
        "Maintenance": [
            ("Who keeps it, and can be asked?", said.kept_by),
            ("Will it be corrected and updated?", said.kept_by),
            ("Can others extend it?", "Yes: a component or step more in the recipe, then build again."),
        ],
    }  # fmt: skip
