#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One run on a Cloud TPU slice: ask for it, install, train, give it back.
#
#   launch/tpu_pod.sh [--dry-run] create|install|train|delete [flags...]
#
#   launch/tpu_pod.sh create        a queued resource; --spot may be preempted,
#                                   --valid-until-duration=6h gives up waiting
#   launch/tpu_pod.sh install       this source tree (without .venv, .git, runs)
#                                   and JAX, on every host
#   launch/tpu_pod.sh train --config=configs/in1k.py --workdir=/mnt/disk/in1k
#   launch/tpu_pod.sh delete
#
# NAME (drnet), ZONE (us-west4-a), TYPE (v5litepod-8; v5p-32, ...) and VERSION
# (v2-alpha-tpuv5-lite; v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e) choose the
# slice. A preempted slice does not come back: delete and create it. `train` may be
# repeated, on another slice too: it goes on from the workdir, which has to lie on
# a disk that all hosts have mounted (Filestore, or a bucket by Cloud Storage FUSE).
set -euo pipefail

NAME=${NAME:-drnet}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-8}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}

run() { "$@"; }
if [[ ${1-} == --dry-run ]]; then
  run() {
    printf '%q ' "$@"
    echo
  }
  shift
fi
action=${1-}
shift || true

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "--zone=$ZONE" --worker=all \
    "--command=$1"
}

case $action in
  create)
    run gcloud compute tpus queued-resources create "$NAME" \
      "--node-id=$NAME" "--zone=$ZONE" "--accelerator-type=$TYPE" \
      "--runtime-version=$VERSION" "$@"
    ;;
  install)
    root=$(cd "$(dirname "$0")/.." && pwd)
    packed=${TMPDIR:-/tmp}/drnet_jax.tgz
    # All but what is large and not needed there; your own networks are.
    run tar -czf "$packed" --exclude=./.venv --exclude=./.git --exclude=./runs \
      --exclude=__pycache__ -C "$root" .
    run gcloud compute tpus tpu-vm scp "$packed" "$NAME:" "--zone=$ZONE" --worker=all
    # Nobody's runs in an older one are deleted.
    on_all_hosts '[ ! -e drnet_jax ] || mv drnet_jax "drnet_jax.$(date +%s)"
      mkdir drnet_jax && tar -xzf drnet_jax.tgz -C drnet_jax'
    # The image's own Python may be older than JAX takes.
    on_all_hosts 'python3 -m pip install -q uv &&
      python3 -m uv venv -q --clear --python=3.12 drnet_env &&
      python3 -m uv pip install -q --python=drnet_env/bin/python ./drnet_jax "jax[tpu]>=0.10"'
    ;;
  train)
    printf -v flags '%q ' "$@"
    # JAX finds the other hosts in the metadata of the slice.
    on_all_hosts "cd drnet_jax && ~/drnet_env/bin/python -m drnet_jax.main $flags"
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$NAME" "--zone=$ZONE" \
      --force --quiet
    ;;
  *)
    echo "usage: launch/tpu_pod.sh [--dry-run] create|install|train|delete" >&2
    exit 2
    ;;
esac
