#!/usr/bin/env bash
# Pretrains on every host of a hostfile, through DeepSpeed's launcher over ssh (pdsh).
#
#   bash launchers/pretrain.sh [--env FILE] HOSTFILE RECIPE [KEY=VALUE ...]
#   bash launchers/pretrain.sh --env launchers/rdma/infiniband.env hosts pretrain-6b run_dir=/shared/runs/6b
#
# HOSTFILE   one "[USER@]HOST slots=N" a line (launchers/hostfile.example); checked before anything starts
# RECIPE     a TOML file or a shipped name, with KEY=VALUE overrides, as in `ofa-ds pretrain`
# --env      a shell script of network settings such as launchers/rdma/*.env, which fill in what nothing else sets;
#            it is sourced: this shell runs whatever it holds, so it must be a file you trust
#
# The same command with a hostfile of fewer or more hosts goes on from the newest checkpoint of run_dir: nothing to convert.
#
# Every host needs this directory, the current directory and the data at the same path, and ssh by key from here.
# What the ranks see of the environment: NCCL_ GLOO_ UCX_ FI_ MV2_ TORCH_ PYTORCH_ TRITON_ OMP_ DS_ OFA_ MLFLOW_ PYTHON*
# CUDA_DEVICE_ORDER TMPDIR, then ~/.deepspeed_env and ./.deepspeed_env (left as they are), then --env: the first to set a
# variable wins. Arguments, directory and values arrive byte for byte, whatever they hold: no shell reads them on the way.
# MASTER_ADDR, MASTER_PORT choose the rendezvous (else the first host's first address, 29500); PYTHON the interpreter.
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "pretrain.sh: $1" >&2; exit "${2:-2}"; }

env_file=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --env) [ $# -ge 2 ] || fail "--env: want a file"; env_file=$2; shift 2 ;;
    --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) fail "$1: unknown option; want [--env FILE] HOSTFILE RECIPE [KEY=VALUE ...]" ;;
  esac
done
[ $# -ge 2 ] || fail "want [--env FILE] HOSTFILE RECIPE [KEY=VALUE ...]"
hostfile=$1 recipe=$2
shift 2
[ -z "$env_file" ] || [ -r "$env_file" ] || fail "--env $env_file: no such file; launchers/rdma/ has two"

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
fi
PYTHON=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON: no such program"
case $PYTHON in /*) ;; *) PYTHON=$PWD/$PYTHON ;; esac
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}

size=$("$PYTHON" -m ofa_ds.cluster.hostfile "$hostfile") || exit 2
read -r num_hosts num_ranks <<<"$size"
"$PYTHON" -m ofa_ds.cluster.check_recipe "$num_ranks" "$recipe" "$@" || exit 2
command -v pdsh >/dev/null || fail "want pdsh to start ranks over ssh; on Debian and Ubuntu: apt-get install pdsh" 1

plan=$("$PYTHON" -m ofa_ds.cluster.launch prepare "$hostfile" "$env_file" "$recipe" "$@") || exit $?
read -r address port word <<<"$plan"
echo "pretrain.sh: $recipe on $num_hosts hosts, $num_ranks ranks"
"$PYTHON" -m ofa_ds.cluster.launch start "$hostfile" "$address" "$port" "$word" </dev/null &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM
trap 'kill -INT "$child" 2>/dev/null' INT
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
[ "$code" -eq 0 ] || fail "the job on $num_hosts hosts ended with exit code $code; the first error above says why" 1
echo "pretrain.sh: done on $num_hosts hosts, $num_ranks ranks"
