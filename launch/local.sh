#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command as N processes of one run on this machine.
#
#   launch/local.sh [--dry-run] [--devices D] N command...
#   launch/local.sh 2 python -m drnet_jax.main --config=... --workdir=...
#
# --devices D gives each process D virtual CPU devices, for trying things out;
# without it the processes share the machine's GPUs, one each.
# When one process fails the others are stopped; the status is the first's that
# failed. SIGTERM is passed on: the run saves, and all exit with 75.
set -euo pipefail

dry_run='' devices=''
while [[ ${1-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=1; shift ;;
    --devices) devices=$2; shift 2 ;;
    *) echo "error: unknown option $1" >&2; exit 2 ;;
  esac
done
if [[ ! ${1-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: launch/local.sh [--dry-run] [--devices D] N command..." >&2
  exit 2
fi
count=$1
shift

port=${JAX_COORDINATOR_PORT:-$((20000 + RANDOM % 12000))}
pids=() stopped=''
# Before they start: what they print may bring the signal at once, when the last
# of them runs and is not among the pids yet.
trap 'stopped=1; kill -TERM $(jobs -p) 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  [[ -z $stopped ]] || break
  process=(
    env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i"
  )
  if [[ -n $devices ]]; then
    process+=("JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=$devices")
  else
    process+=("JAX_LOCAL_DEVICE_IDS=$i")
  fi
  process+=("$@")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${process[@]}"
    echo
  else
    "${process[@]}" &
    pids+=($!)
  fi
done
[[ -z $dry_run ]] || exit 0

status=0
((${#pids[@]})) || status=75 # stopped before any began
for ((left = ${#pids[@]}; left > 0; left--)); do
  one=0
  wait -n || one=$?
  # A signal to this script ends a wait early, too.
  if ((one > 128)) && (($(jobs -rp | wc -l) == left)); then
    left=$((left + 1))
    continue
  fi
  if ((one != 0 && status == 0)); then
    status=$one
    # Those that wait for the lost one; JAX's own time-out would take longer.
    if ((one != 75)); then
      kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
  fi
done
exit "$status"
