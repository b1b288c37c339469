#!/usr/bin/env bash
# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
#
# A run under Slurm: one process per task, which finds the others by Slurm's own variables.
#
#   sbatch --nodes=4 scripts/launch/slurm.sh run.toml --set mesh.fsdp=8
#   DRY_RUN=1 bash scripts/launch/slurm.sh run.toml      (print what would be run)
#
# Two minutes before the end of the time limit, or of the allocation, Slurm sends USR1: the run saves, exits with 75, and
# the job puts itself back into the queue. run.dir must lie where all nodes see the same files. For a process per GPU say
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
call srun --kill-on-bad-exit=1 "$python" scripts/launch/supervise.py --leave-preempted -- \
  "$python" device_train.py "$@"
status=$?

if [ "$status" -eq "$PREEMPTED" ] || [ -n "${DRY_RUN:-}" ]; then
  call scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$status"
