#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The accelerator suite on this machine: numbers in at most eight minutes.
#
#   launch/gpu_suite.sh [--dry-run] PACKED [flags of benchmark_accelerator...]
#
# PACKED is a file by launch/pack_imagenette.py. OUT (runs/accelerator) gets
# accelerator.csv, row by row, and at the end index.html and report.md. Cut off
# after eight minutes whatever happens.
set -euo pipefail

run() { "$@"; }
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
  file=${flag#--weights=}
  [[ $flag == "$file" || ! -e $file ]] || flag=--weights=$(realpath -- "$file")
  flags+=("$flag")
done

cd "$(dirname "$0")/.."
# PyTorch is timed in the same process and wants memory, too.
run env XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.65}" \
  timeout --kill-after=10 480 "${PYTHON:-python}" -m drnet_jax benchmark_accelerator \
  "--out=${OUT:-runs/accelerator}" --config=configs/accelerator.py \
  "--config.data.data_dir=$packed" "${flags[@]}"
