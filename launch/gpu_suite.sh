#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The accelerator suite on this machine: numbers in at most eight minutes.
#
#   launch/gpu_suite.sh [--dry-run] PACKED [--weights=FILE]
#     [flags of benchmark_accelerator...]
#
# PACKED is a file by launch/pack_imagenette.py; with weights of a ResNet-50 a
# training from these follows the one from scratch. OUT (runs/accelerator) gets
# accelerator.csv, row by row, and at the end index.html and report.md. Cut off
# after eight minutes whatever happens; what a part found stays if another is
# run again by --parts=g.
set -euo pipefail

run() { exec "$@"; }  # so that a signal to this script reaches the suite
if [[ ${1-} == --dry-run ]]; then
  run() {
    printf '%q ' "$@"
    echo
  }
  shift
fi
if (($# == 0)); then
  echo "usage: launch/gpu_suite.sh [--dry-run] PACKED [flags...]" >&2
  exit 2
fi
packed=$(realpath -m -- "$1")
[[ -z ${OUT-} ]] || OUT=$(realpath -m -- "$OUT")
shift
flags=()
for flag in "$@"; do
  if [[ $flag == --weights=* ]]; then
    flags+=(--finetune=configs/accelerator.py:weights
      "--finetune.init_from=$(realpath -m -- "${flag#--weights=}")"
      "--finetune.data.data_dir=$packed")
  else
    flags+=("$flag")
  fi
done

cd "$(dirname "$0")/.."
# PyTorch is timed in the same process and wants memory, too.
run env XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.65}" \
  timeout --kill-after=10 480 "${PYTHON:-python}" -m drnet_jax benchmark_accelerator \
  "--out=${OUT:-runs/accelerator}" --config=configs/accelerator.py \
  "--config.data.data_dir=$packed" "${flags[@]}"
