# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Provenance of a run: the configuration, data and environments that determine its results (recipe.json).

    {"config": {...}, "seed": 0, "data_fingerprint": ..., "tokenizer": <digest>, "starts": [
       {"step": 0, "time": <unix seconds>, "versions": {"python": ..., "jax": ..., ...}, "backend": "cpu",
        "devices": {<kind>: <count>}, "mesh": {"data": 8, ...}, "processes": 1, "xla_flags": "",
        "git": {"commit": ..., "changed": <digest of git diff, or null>} or null}, ...]}

The seed determines the initial weights, the order of the data and the dropout. Each start of the program adds an entry,
because versions and devices may change between starts; a checkpoint's metadata holds the entry of the start that saved it.
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
from mesh_transformer.mesh import MeshLayout
from mesh_transformer.storage.atomic_files import replace_file

FILE = "recipe.json"
MAX_STARTS = 1000  # entries kept: the first and the latest
PACKAGES = (
    "mesh-transformer", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "dm-haiku", "optax", "flax",
    "numpy", "tensorstore", "grain", "tokenizers",
)  # fmt: skip


class ProvenanceError(ValueError):
    """A missing or damaged recipe.json, or data that differs from its record."""


def environment_info(layout: MeshLayout) -> dict[str, Any]:
    """Return the current package versions, devices, mesh and commit."""
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


def write_provenance(run_dir: Path, config: Config, data: Data, environment: Mapping[str, Any], step: int) -> None:
    """Write recipe.json of a run that now starts from `step`; earlier starts are kept."""
    path = run_dir / FILE
    earlier = read_provenance(run_dir)["starts"] if path.exists() else []
    starts = [*earlier, {"step": step, "time": round(time.time(), 3), **environment}]
    provenance = {
        "config": config_to_dict(config),
        "seed": config.run.seed,
        "data_fingerprint": data.train.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "starts": starts if len(starts) <= MAX_STARTS else [starts[0], *starts[1 - MAX_STARTS :]],
    }
    replace_file(path, json.dumps(provenance, indent=1).encode())


def read_provenance(run_dir: Path) -> dict[str, Any]:
    """Return the contents of recipe.json. Raises ProvenanceError if it is missing or damaged."""
    path = run_dir / FILE
    try:
        provenance = json.loads(path.read_bytes())
        config = provenance["config"]
        starts = provenance["starts"]
        if not (isinstance(config, dict) and isinstance(starts, list) and starts):
            raise ValueError("`config` or `starts` is missing")
    except FileNotFoundError:
        raise ProvenanceError(f"{path}: no such file; check that {run_dir} is a run folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ProvenanceError(
            f"{path}: damaged: {error}; restore the file, or remove it to start a new record"
        ) from error
    return provenance


def diff_environments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two environments, one line each."""
    changes = []
    for name in ("backend", "devices", "mesh", "processes", "xla_flags", "git"):
        if before.get(name) != now.get(name):
            changes.append(f"{name}: was {_format(before.get(name))}, now {_format(now.get(name))}")
    old, new = before.get("versions", {}), now["versions"]
    changes += [
        f"{name}: was {old.get(name, 'not installed')}, now {new.get(name, 'not installed')}"
        for name in {*old, *new}
        if old.get(name) != new.get(name)
    ]
    return sorted(changes)


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state(root: Path) -> dict[str, str | None] | None:
    """Return the commit and a digest of uncommitted changes; None if the code is not in a Git repository."""
    if not (root / ".git").exists():
        return None
    outputs = []
    for command in (("rev-parse", "HEAD"), ("diff", "HEAD", "--no-ext-diff")):
        try:
            done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        outputs.append(done.stdout)
    commit, diff = outputs
    return {"commit": commit.decode().strip(), "changed": xxhash.xxh3_64_hexdigest(diff) if diff else None}
