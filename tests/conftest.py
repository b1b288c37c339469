# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Test setup: eight CPU devices, shape annotations checked at each call, implicit rank promotion is an error."""

import atexit
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
from tiers import is_nightly, is_slow

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


@pytest.fixture(scope="session", autouse=True)
def library_in_this_process():
    """Run transformers in the test's process when a conversion is verified, which saves the imports of a new process.

    Programs that tests start, and tests/convert/test_conversion.py, run it as users do.
    """
    from mesh_transformer.convert import library_logits

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                library_logits.main(*command[3:])
            except Exception as error:
                return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_logits, "subprocess", SimpleNamespace(run=run))
        yield


SLOWEST_FILES = (
    "test_docs_commands",
    "test_resume",
    "test_processes",
    "test_journey",
    "test_decoder_only",
    "test_sharding",
    "test_step",
    "test_server",
    "test_chat_server",
    "test_notebooks",
    "test_real_model",
    "test_model_defaults",
    "test_ray",
)


@pytest.hookimpl(tryfirst=True)  # before the marker expression of -m selects
def pytest_collection_modifyitems(items: list) -> None:
    """Mark the slow and nightly tiers; run the slowest files first, so that no test worker runs one alone at the end."""
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and is_nightly(item.nodeid):
            item.add_marker(pytest.mark.nightly)
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
