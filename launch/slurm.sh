#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run on several GPU nodes under SLURM, one process for each GPU.
#
#   launch/slurm.sh [--dry-run] [sbatch options...] -- drnet_jax.main's flags...
#   launch/slurm.sh --nodes=4 -- --config=configs/in1k.py --workdir=/shared/in1k
#
# The workdir and the data must be on a disk that all nodes share. SLURM warns
# with SIGTERM three minutes before the time limit: the run saves and exits with
# 75, and the job queues itself again, at most 100 times. JAX finds its peers in
# SLURM's variables.
#
# GPUS_PER_NODE (8), PYTHON (python): set them to what the nodes have. Images are
# decoded on the nodes' processors: ask for these with --cpus-per-task=... (of a GPU).
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=1
  shift
fi
options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if (($# < 2)); then
  echo "usage: launch/slurm.sh [--dry-run] [sbatch options] -- flags..." >&2
  exit 2
fi
shift

gpus=${GPUS_PER_NODE:-8}
printf -v run '%q ' "${PYTHON:-python}" -m drnet_jax.main "$@"
# 2 is for a person to mend, 0 the end; after all else the run can go on. srun
# returns the highest status, and those it kills have 137: so it kills none. The
# processes leave together, with one status (drnet_jax/processes.py).
# srun takes over sbatch's GPUs, but not how many cores a process has.
job="srun --kill-on-bad-exit=0 \${SLURM_CPUS_PER_TASK:+--cpus-per-task=\$SLURM_CPUS_PER_TASK} $run
status=\$?
if [ \$status -ne 0 ] && [ \$status -ne 2 ] && [ \${SLURM_RESTART_COUNT:-0} -lt 100 ]
then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$status"
command=(
  sbatch --job-name=drnet_jax --requeue --open-mode=append
  "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus"
  --signal=TERM@180 "${options[@]}" --wrap "$job"
)
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
