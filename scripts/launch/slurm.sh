#!/usr/bin/env bash
# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
#
# Slurm launcher: one process per task. The processes find each other through Slurm's environment variables.
#
#   sbatch --nodes=4 scripts/launch/slurm.sh run.toml --set mesh.fsdp=8
#   DRY_RUN=1 bash scripts/launch/slurm.sh run.toml      (print the commands)
#
# Two minutes before the end of the time limit or of the allocation, Slurm sends USR1: the run saves a checkpoint and exits
# with 75, and the job requeues itself. run.dir must be on a file system that all nodes share. For one process per GPU, add
# --ntasks-per-node=8 --gpus-per-task=1.
#SBATCH --job-name=mesh-transformer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

PREEMPTED=75
python=${PYTHON:-python}
folder=${SLURM_SUBMIT_DIR:-$PWD}

call() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

cd "$folder" || exit 1
call srun --kill-on-bad-exit=1 "$python" scripts/launch/supervise.py --no-restart-on-preemption -- \
  "$python" device_train.py "$@"
status=$?

if [ "$status" -eq "$PREEMPTED" ] || [ -n "${DRY_RUN:-}" ]; then
  call scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$status"
