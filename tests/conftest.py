# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Every test sees eight CPU devices, checked shapes, and errors where JAX would promote ranks or warn."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled, others and the programs they start find: set before workers and programs inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time is compilation; what is compared here does not depend on how well LLVM optimised it.
jax.config.update("jax_disable_most_optimizations", True)
# Shape annotations are checked at every call, in tests only.
NUMERICS = ("loss", "noise_scale", "optimizer", "schedule", "step")
install_import_hook(
    ["mesh_transformer.model", "mesh_transformer.sample", *(f"mesh_transformer.train.{name}" for name in NUMERICS)],
    "beartype.beartype",
)


LONGEST = (
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


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def load_script():
    """A function from the name of a program in scripts/ to its module, made anew by every call."""
    scripts = Path(__file__).parents[1] / "scripts"
    sys.path.insert(0, str(scripts))  # programs import each other

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"{name.replace('/', '_')}_program", scripts / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where its classes are looked for when they are pickled
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(scripts))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 3 MB and 2,000 files; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m,nr_inodes=2000", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
