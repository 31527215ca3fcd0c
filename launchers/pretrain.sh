#!/usr/bin/env bash
# Pretrains on every host of a hostfile: `ofa-ds launch` with the interpreter of this checkout.
#
#   bash launchers/pretrain.sh [OPTION ...] HOSTFILE RECIPE [KEY=VALUE ...]
#   bash launchers/pretrain.sh --env launchers/rdma/infiniband.env hosts pretrain-6b run_dir=/shared/runs/6b
#   bash launchers/pretrain.sh [OPTION ...] HOSTFILE finetune RECIPE [KEY=VALUE ...]
#   bash launchers/pretrain.sh [OPTION ...] HOSTFILE predict CHECKPOINT --task TASK --shards DIR --out FILE [...]
#
# HOSTFILE   one "[USER@]HOST slots=N" a line (launchers/hostfile.example); checked before anything starts
# RECIPE     a TOML file or a shipped name, with KEY=VALUE overrides, as in `ofa-ds pretrain`
# OPTION     those of `ofa-ds launch` (its --help has them all), such as --env FILE, --retries N, --runner torchrun
# --env      a shell script of network settings such as launchers/rdma/*.env, which fill in what nothing else sets; without
#            it the one that fits the first host's adapters. It is sourced: this shell runs whatever it holds, so it must
#            be a file you trust
#
# The same command with a hostfile of fewer or more hosts goes on from the newest checkpoint of run_dir: nothing to convert.
#
# Every host needs this directory, the current directory and the data at the same path, and ssh by key from here.
# What the ranks see of the environment: NCCL_ GLOO_ UCX_ FI_ MV2_ TORCH_ PYTORCH_ TRITON_ OMP_ DS_ OFA_ MLFLOW_ PYTHON*
# CUDA_DEVICE_ORDER TMPDIR, then ~/.deepspeed_env and ./.deepspeed_env (left as they are), then --env: the first to set a
# variable wins. Arguments, directory and values arrive byte for byte, whatever they hold: no shell reads them on the way.
# MASTER_ADDR, MASTER_PORT choose the rendezvous (else the first host's first address, a free port); PYTHON the interpreter.
# The exit code is that of the first rank that failed, 128 + N where signal N ended it.
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "pretrain.sh: $1" >&2; exit 2; }
usage="want [OPTION ...] HOSTFILE RECIPE [KEY=VALUE ...]"

options=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --dry-run | --*=*) options+=("$1"); shift ;;
    --hostfile | -H) fail "$1: the hostfile is the first argument; $usage" ;;
    *) [ $# -ge 2 ] || fail "$1: want a value"; options+=("$1" "$2"); shift 2 ;;
  esac
done
[ $# -ge 2 ] || fail "$usage"
hostfile=$1
shift
case $1 in pretrain | finetune | predict) ;; *) set -- pretrain "$@" ;; esac

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
PYTHON=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON: no such program"
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}

exec "$PYTHON" -m ofa_ds.cli launch --hostfile "$hostfile" ${options[@]+"${options[@]}"} -- "$@" </dev/null
