#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run on a TPU slice of GKE: fills in launch/gke/tpu.yaml and applies it.
#
#   IMAGE=... launch/gke.sh [--dry-run] --config=... --workdir=/data/run
#
# IMAGE must have drnet_jax and jax[tpu], and its configs in the working folder.
# CLAIM (data) is a volume claim for data and workdir, mounted at /data. NAME (drnet), ACCELERATOR
# (tpu-v5p-slice), TOPOLOGY (2x2x4), HOSTS (4) and CHIPS of a host (4) choose the
# slice. The cluster needs the JobSet controller. --dry-run prints the manifest
# and the command instead.
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=1
  shift
fi
if (($# == 0)); then
  echo "usage: IMAGE=... launch/gke.sh [--dry-run] flags..." >&2
  exit 2
fi
declare -A value=(
  [NAME]=${NAME:-drnet}
  [CLAIM]=${CLAIM:-data}
  [IMAGE]=${IMAGE:?name the container image}
  [ACCELERATOR]=${ACCELERATOR:-tpu-v5p-slice}
  [TOPOLOGY]=${TOPOLOGY:-2x2x4}
  [HOSTS]=${HOSTS:-4}
  [CHIPS]=${CHIPS:-4}
)
printf -v flags '%q ' "$@"
# Within single quotes of YAML a quote is written twice.
value[FLAGS]=${flags//\'/\'\'}

manifest=$(<"$(dirname "$0")/gke/tpu.yaml")
for key in "${!value[@]}"; do
  manifest=${manifest//"\${$key}"/"${value[$key]}"}
done
if [[ -n $dry_run ]]; then
  echo "$manifest"
  echo '# kubectl apply -f -'
else
  kubectl apply -f - <<<"$manifest"
fi
