# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""recipe.json of a run folder: everything that its numbers follow from, so that they can be made again.

    {"config": {...}, "seed": 0, "data_fingerprint": ..., "tokenizer": <digest>, "starts": [
       {"step": 0, "time": <unix seconds>, "versions": {"python": ..., "jax": ..., ...}, "backend": "cpu",
        "devices": {<kind>: <count>}, "mesh": {"data": 8, ...}, "processes": 1, "xla_flags": "",
        "git": {"commit": ..., "changed": <digest of git diff, or null>} or null}, ...]}

The seed gives the weights a run begins with, the order of its data and its dropout. Each start of the program adds an
entry, because versions and devices may change between two; a checkpoint's meta holds the one that made it.
"""

import collections
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import xxhash

from mesh_transformer.config import Config, config_to_dict
from mesh_transformer.data.dataset import Data
from mesh_transformer.mesh import Layout
from mesh_transformer.storage.atomic_files import replace_file

FILE = "recipe.json"
MAX_STARTS = 1000  # kept; the first always is
PACKAGES = (
    "mesh-transformer", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "dm-haiku", "optax", "flax",
    "numpy", "tensorstore", "grain", "tokenizers",
)  # fmt: skip


class RecipeError(ValueError):
    """A run folder without a recipe, or with one that cannot be read."""


def describe_start(layout: Layout) -> dict[str, Any]:
    """Versions, devices and the code's state, as they are now."""
    mesh = layout.mesh
    return {
        "versions": _versions(),
        "backend": jax.default_backend(),
        "devices": dict(collections.Counter(device.device_kind for device in mesh.devices.flat)),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": _git_state(Path(__file__).parents[2]),
    }


def write_recipe(run_dir: Path, config: Config, data: Data, start: Mapping[str, Any], step: int) -> None:
    """The recipe of a run that now starts from `step`; earlier starts stay in it."""
    path = run_dir / FILE
    earlier = read_recipe(run_dir)["starts"] if path.exists() else []
    starts = [*earlier, {"step": step, "time": round(time.time(), 3), **start}]
    recipe = {
        "config": config_to_dict(config),
        "seed": config.run.seed,
        "data_fingerprint": data.train.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "starts": starts if len(starts) <= MAX_STARTS else [starts[0], *starts[1 - MAX_STARTS :]],
    }
    replace_file(path, json.dumps(recipe, indent=1).encode())


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """The recipe of a run; RecipeError if there is none."""
    path = run_dir / FILE
    try:
        recipe = json.loads(path.read_bytes())
        if not (isinstance(recipe["config"], dict) and isinstance(recipe["starts"], list) and recipe["starts"]):
            raise ValueError("config and starts are missing")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is none; is {run_dir} the folder of a run?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: not a recipe: {error}; remove it") from error
    return recipe


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two starts, a line each."""
    changes = []
    for name in ("backend", "devices", "mesh", "processes", "xla_flags", "git"):
        if before.get(name) != now.get(name):
            changes.append(f"{name}: {before.get(name)} then, {now.get(name)} now")
    old, new = before.get("versions", {}), now["versions"]
    changes += [
        f"{name}: {old.get(name)} then, {new.get(name)} now" for name in {*old, *new} if old.get(name) != new.get(name)
    ]
    return sorted(changes)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_state(root: Path) -> dict[str, str | None] | None:
    """The commit of the code and a digest of what was changed since; None where the code is not in a repository."""
    if not (root / ".git").exists():
        return None
    said = []
    for command in (("rev-parse", "HEAD"), ("diff", "HEAD", "--no-ext-diff")):
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        said.append(done.stdout)
    commit, diff = said
    return {"commit": commit.decode().strip(), "changed": xxhash.xxh3_64_hexdigest(diff) if diff else None}
