# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Stages as job arrays: on Slurm where it is installed, otherwise on scripts that imitate its commands."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
from test_stages import Write, made

from mesh_transformer.corpus import executors
from mesh_transformer.corpus.executors import Slurm
from mesh_transformer.corpus.stages import CorpusError, Executor, run_stage
from mesh_transformer.data.errors import DataError

ROOT = Path(__file__).parents[2]
SBATCH = r"""#!/bin/bash
# runs the tasks of the array sequentially in the background, and prints the job number as sbatch does
for last; do :; done
grep -q -- '--partition=cpu$' "$last" || { echo "invalid partition specified" >&2; exit 1; }
script=$JOBS/script; cp "$last" "$script"
count=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
( for i in $(seq 0 "$count"); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here RUN_OFFSET=0 setsid bash "$script"; done
  rm -f "$JOBS/7" ) >/dev/null 2>&1 &
echo $! >"$JOBS/7"
echo "Submitted batch job 7"
"""
SQUEUE = '#!/bin/bash\n[ -f "$JOBS/7" ] && echo RUNNING\nexit 0\n'
SCANCEL = '#!/bin/bash\nkill $(cat "$JOBS/7"); rm -f "$JOBS/7"; echo "$1" >>"$JOBS/canceled"\n'
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [ "$1" = -n ] && shift; shift; done\nexec "$@"\n'


def has_slurm() -> bool:
    """Return whether Slurm is running with a partition named cpu."""
    if not shutil.which("sinfo"):
        return False
    done = subprocess.run(["sinfo", "--noheader", "--partition", "cpu"], capture_output=True, text=True, timeout=20)
    return bool(done.stdout.strip())


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A partition whose jobs can import this project and these tests."""
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.1)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    if not has_slurm():
        programs = {
            "sbatch": SBATCH,
            "squeue": SQUEUE,
            "scancel": SCANCEL,
            "srun": SRUN,
            "scontrol": "#!/bin/sh\necho here\n",
        }
        (tmp_path / "bin").mkdir()
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("JOBS", str(tmp_path))
    return Slurm("cpu", {"time": "5"})


def test_parts_of_a_job_array(tmp_path, slurm):
    folder = tmp_path / "write-0"
    folder.mkdir()
    executor = Executor(2, slurm=slurm)
    with pytest.raises(CorpusError, match=r"stage write: 1 of 2 parts are incomplete \(1\); DataError: the source is"):
        run_stage("write", Write(folder, "raise"), 2, folder, executor)
    assert [record["number"] for record in run_stage("write", Write(folder), 2, folder, executor)] == [0, 1]
    assert made(folder) == [0, 1, 1], "a complete part was made again"
    script = (folder / "log" / "launch_script.slurm").read_text()
    assert "#SBATCH --partition=cpu\n" in script
    assert "#SBATCH --time=5\n" in script
    assert f'export PATH="{Path(sys.executable).parent}:$PATH"' in script
    assert not (folder / "slurm-job").exists()
    run_stage("write", Write(folder), 2, folder, executor)  # all parts are complete: nothing is submitted


def test_stopping_the_build_cancels_its_job(tmp_path, slurm, monkeypatch):
    folder = tmp_path / "write-0"
    folder.mkdir()

    def stop(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: threading.Event().wait(seconds))
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage("write", Write(folder), 2, folder, Executor(2, slurm=slurm))
    number = (folder / "slurm-job").read_text()
    assert not executors._is_queued(number)
    assert len(run_stage("write", Write(folder), 2, folder, Executor(2, slurm=slurm))) == 2


def test_a_job_that_slurm_refuses_is_an_error(tmp_path, slurm):
    folder = tmp_path / "write-0"
    folder.mkdir()
    with pytest.raises(DataError, match="sbatch failed with status 1"):
        run_stage("write", Write(folder), 2, folder, Executor(2, slurm=slurm._replace(partition="nowhere")))


def test_missing_slurm_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DataError, match="sbatch is not installed; run this command on a machine that can submit jobs"):
        run_stage("write", Write(tmp_path), 2, tmp_path, Executor(2, slurm=Slurm("cpu", {})))
