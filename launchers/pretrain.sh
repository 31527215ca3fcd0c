#!/usr/bin/env bash
# Pretrains on every host of a hostfile, through DeepSpeed's launcher over ssh (pdsh).
#
#   bash launchers/pretrain.sh [--env FILE] HOSTFILE RECIPE [KEY=VALUE ...]
#   bash launchers/pretrain.sh --env launchers/rdma/infiniband.env hosts pretrain-6b run_dir=/shared/runs/6b
#
# HOSTFILE   one "HOST slots=N" a line (launchers/hostfile.example); checked before anything starts
# RECIPE     a TOML file or a shipped name, with KEY=VALUE overrides, as in `ofa-ds pretrain`
# --env      network settings such as launchers/rdma/*.env; they fill in what nothing else sets
#
# The same command with a hostfile of fewer or more hosts goes on from the newest checkpoint of run_dir: nothing to convert.
#
# Every host needs this directory, the current directory and the data at the same path, and ssh by key from here.
# What the ranks see of the environment: NCCL_ GLOO_ UCX_ FI_ TORCH_ PYTORCH_ TRITON_ OMP_ DS_ OFA_ CUDA_DEVICE_ORDER TMPDIR,
# then ~/.deepspeed_env and ./.deepspeed_env (left as they are), then --env: the first to set a variable wins.
# MASTER_ADDR, MASTER_PORT choose the rendezvous (else the first host's first address, 29500); PYTHON the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

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
export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}

size=$("$PYTHON" -m ofa_ds.cluster.hostfile "$hostfile") || exit 2
read -r num_hosts num_ranks <<<"$size"
"$PYTHON" -m ofa_ds.cluster.check_recipe "$num_ranks" "$recipe" "$@" || exit 2
command -v pdsh >/dev/null || fail "want pdsh to start ranks over ssh; on Debian and Ubuntu: apt-get install pdsh" 1

# DeepSpeed reads one more environment file, named by DS_ENV_FILE; its parser fails on blank lines and comments.
# It gets a file of our own making, so the user's files may have both and are never written.
forward='^(NCCL_|GLOO_|UCX_|FI_|TORCH_|PYTORCH_|TRITON_|OMP_|DS_|OFA_|CUDA_DEVICE_ORDER$|TMPDIR$)'
names=$(compgen -e | grep -E "$forward" | grep -v '^DS_ENV_FILE$' || true)
user_file=${DS_ENV_FILE:-.deepspeed_env}
case $user_file in /*) user_files=$user_file ;; *) user_files="./$user_file"$'\n'"$HOME/$user_file" ;; esac
while IFS= read -r file; do
  [ -f "$file" ] || continue
  number=0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line#"${line%%[![:space:]]*}"}
    [[ -z $line || $line == \#* ]] && continue
    name=${line%%=*}
    name=${name#export }
    [[ $line == *=* && $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "$file:$number: '$line': want NAME=VALUE"
    value=${line#*=}
    value=${value%$'\r'}
    [ -n "${!name+set}" ] || export "$name=$value"
    names+=$'\n'$name
  done <"$file"
done <<<"$user_files"
if [ -n "$env_file" ]; then
  set -a
  # shellcheck disable=SC1090
  source "$env_file"
  set +a
  names+=$'\n'$(compgen -e | grep -E "$forward" | grep -v '^DS_ENV_FILE$' || true)
fi

ranks_env=$(mktemp "${TMPDIR:-/tmp}/ofa-ds-env.XXXXXX")
trap 'rm -f "$ranks_env"' EXIT
for name in $(sort -u <<<"$names"); do
  value=${!name}
  case $value in
    *[\"\\\`$]*|*$'\n'*) fail "$name: DeepSpeed's launcher cannot carry quotes, \$, \\ or line ends; got $value" ;;
  esac
  echo "$name=$value" >>"$ranks_env"
done
# Over ssh a login has its own PATH; compiled extensions look for ninja beside the interpreter.
echo "PATH=$(dirname "$PYTHON"):\$PATH" >>"$ranks_env"

echo "pretrain.sh: $recipe on $num_hosts hosts, $num_ranks ranks"
# --force_multi: with one host DeepSpeed would run here instead of there.
launch=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher pdsh --force_multi
  --master_port "${MASTER_PORT:-29500}" --log_level "${OFA_LAUNCH_LOG:-warning}")
[ -z "${MASTER_ADDR:-}" ] || launch+=(--master_addr "$MASTER_ADDR")
DS_ENV_FILE=$ranks_env "${launch[@]}" --module ofa_ds.pretrain "$recipe" "$@" </dev/null &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM
trap 'kill -INT "$child" 2>/dev/null' INT
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
[ "$code" -eq 0 ] || fail "the job on $num_hosts hosts ended with exit code $code; the first error above says why" 1
echo "pretrain.sh: done on $num_hosts hosts, $num_ranks ranks"
