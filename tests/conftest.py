# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Test setup: eight CPU devices, shape annotations checked at each call, implicit rank promotion is an error."""

import atexit
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are shared by all tests and their subprocesses; set before test workers and subprocesses inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Halves the time of compilation. Other versions of jaxlib end the process at a flag that they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

# Compilation takes most of the suite's time, and the results under test do not depend on LLVM's optimizations. An environment
# variable, because the tests start programs too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest
from jaxtyping import install_import_hook
from slow_tier import is_slow

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Annotations of shapes are checked in tests only, because the checks slow tracing down.
TRAIN_MODULES = ("loss", "noise_scale", "optimizer", "pipeline", "schedule", "state", "step")
install_import_hook(
    [
        "mesh_transformer.model",
        "mesh_transformer.sample",
        *(f"mesh_transformer.train.{name}" for name in TRAIN_MODULES),
    ],
    "beartype.beartype",
)


SLOWEST_FILES = (
    "test_resume",
    "test_processes",
    "test_journey",
    "test_decoder_only",
    "test_sharding",
    "test_step",
    "test_server",
    "test_chat_server",
    "test_notebooks",
)


@pytest.hookimpl(tryfirst=True)  # before the marker expression of -m selects
def pytest_collection_modifyitems(items: list) -> None:
    """Mark the slow tier; run the slowest files first, so that no test worker runs one alone at the end."""
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    items.sort(
        key=lambda item: SLOWEST_FILES.index(item.path.stem) if item.path.stem in SLOWEST_FILES else len(SLOWEST_FILES)
    )


@pytest.fixture(scope="session")
def load_script():
    """Return a function that loads a program of scripts/, such as "stress/resume", as a new module at each call."""
    scripts = Path(__file__).parents[1] / "scripts"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name.replace('/', '_')}_program", scripts / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # pickle looks up classes here
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a file system of 3 MB and 2,000 files; skip the test if mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m,nr_inodes=2000", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
