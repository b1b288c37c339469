# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Jobs compiled in processes of their own, and their results kept by digest."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mesh_transformer.config import ConfigError
from mesh_transformer.plan.hardware.topologies import MissingCompilerError, parse_topology
from mesh_transformer.plan.job import CompiledStats, CompileJob

# Several processes may load libtpu at once where no TPU is; and it says less.
ABSENT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
ROOT = Path(__file__).parents[2]


class CompileError(RuntimeError):
    """The compiler failed for another reason than memory; the message is its last line."""


def environment(topology: str) -> dict[str, str]:
    """The environment of a process that compiles for a topology."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if topology == "local":
        return env
    env["JAX_PLATFORMS"] = "cpu"
    found = parse_topology(topology)
    if found.chip is None:
        env["JAX_NUM_CPU_DEVICES"] = str(found.devices)
    else:
        env |= ABSENT_TPU
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is compiled for absent devices cannot be read back
    return env


def compile_job(job: CompileJob, *, cache: Path | None = None) -> CompiledStats:
    """What was measured of a job, from `cache` if it is there; the compiled program's text lies there beside it.

    Raises ConfigError and MissingCompilerError as the worker does, and CompileError where the compiler fails.
    """
    place = None if cache is None or job.topology == "local" else cache / f"{job.digest()}.json"
    if place is not None and place.exists():
        return CompiledStats.from_json(place.read_text(encoding="utf-8"))
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
    measured = _compile_apart(job, None if place is None else place.with_suffix(".hlo.gz"))
    if place is not None:
        part = place.with_suffix(f".{os.getpid()}")
        part.write_text(measured.to_json(), encoding="utf-8")
        part.replace(place)
    return measured


def _compile_apart(job: CompileJob, keep: Path | None) -> CompiledStats:
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", "mesh_transformer.plan.compile_worker", str(result), *([str(keep)] if keep else [])],
            input=job.to_json(),
            env=environment(job.topology),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            last = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception): ", line)), lines[-1])
            raise CompileError(f"{job.topology}: compiling failed: {last.strip()}")
        answer = json.loads(result.read_text(encoding="utf-8"))
    match answer.get("error"):
        case "ConfigError":
            raise ConfigError(answer["message"])
        case "MissingCompilerError":
            raise MissingCompilerError(answer["message"])
    return CompiledStats.from_json(json.dumps(answer["measured"]))
