#!/usr/bin/env bash
# Sets up .venv (see launchers/setup_env.sh) and runs every test.
#
#   bash tests/run.sh [PYTEST ARGUMENT ...]       such as: tests/unit, -k resume, -x
#   bash tests/run.sh --slow -m slow              the tests that take minutes each
#
# tests/multihost needs root, pdsh, sshd and ip, and says so where it is skipped. OFA_DS_VENV: another environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launchers/setup_env.sh dev
venv=${OFA_DS_VENV:-$root/.venv}
export PATH=$venv/bin:$PATH
# Tests start several ranks; one thread each keeps them from fighting over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONPATH=$root:$root/kernels
# Quick ones first: a mistake in a unit shows before the trainings start.
folders=()
for folder in tests/unit tests/kernels tests/parity tests/distributed tests/reliability tests/multihost; do
  if [ -d "$folder" ]; then folders+=("$folder"); fi
done
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then folders=(); fi
done
log=$(mktemp "${TMPDIR:-/tmp}/ofa-ds-tests.XXXXXX")
trap 'rm -f "$log"' EXIT
code=0
python -m pytest -q --durations=10 "${folders[@]}" "$@" </dev/null 2>&1 | tee "$log" || code=$?
summary=$(grep . "$log" | tail -n 1 || true)
if [ "$code" -eq 0 ]; then
  echo "tests: passed ($summary)"
else
  echo "tests: FAILED ($summary); the failures are above" >&2
fi
exit "$code"
