# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Compilation of jobs in subprocesses, with a cache of the results by job digest."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from mesh_transformer.config import ConfigError
from mesh_transformer.plan.hardware.topologies import MissingCompilerError, parse_topology
from mesh_transformer.plan.job import CompiledStats, CompileJob

# Environment that lets several processes load libtpu on a machine without TPUs, with less logging.
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
PACKAGE_PARENT = Path(__file__).parents[2]  # a clone's root, or site-packages if installed


class CompileError(RuntimeError):
    """The compiler failed for a reason other than memory; the message ends with the compiler's last error."""


def environment(topology: str) -> dict[str, str]:
    """Return the environment of a subprocess that compiles for a topology."""
    env = dict(os.environ)
    is_installed = str(PACKAGE_PARENT) in map(sysconfig.get_path, ("purelib", "platlib"))
    if not is_installed:  # a clone or a copy
        env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [env.get("PYTHONPATH")])])
    if topology == "local":
        return env
    env["JAX_PLATFORMS"] = "cpu"
    parsed = parse_topology(topology)
    if parsed.chip is None:
        env["JAX_NUM_CPU_DEVICES"] = str(parsed.devices)
    else:
        env |= ABSENT_TPU
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # programs compiled for absent devices cannot be deserialized
    return env


def compile_job(job: CompileJob, *, cache: Path | None = None) -> CompiledStats:
    """Return the statistics of a job, from the folder `cache` if they are there; otherwise compile the job.

    Statistics and the text of the compiled program are added to `cache`. Raises ConfigError for a configuration that does
    not fit the topology, MissingCompilerError if its compiler is not installed, and CompileError if the compiler fails.
    """
    path = None if cache is None or job.topology == "local" else cache / f"{job.digest()}.json"
    if path is not None and path.exists():
        return CompiledStats.from_json(path.read_text(encoding="utf-8"))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    stats = _compile_in_subprocess(job, None if path is None else path.with_suffix(".hlo.gz"))
    if path is not None:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(stats.to_json(), encoding="utf-8")
        temporary.replace(path)
    return stats


def _compile_in_subprocess(job: CompileJob, text_path: Path | None) -> CompiledStats:
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mesh_transformer.plan.compile_worker",
                str(result),
                *([str(text_path)] if text_path else []),
            ],
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
            raise CompileError(f"--topology {job.topology}: compilation failed: {last.strip()}")
        answer = json.loads(result.read_text(encoding="utf-8"))
    match answer.get("error"):
        case "ConfigError":
            raise ConfigError(answer["message"])
        case "MissingCompilerError":
            raise MissingCompilerError(answer["message"])
    return CompiledStats.from_json(json.dumps(answer["stats"]))
