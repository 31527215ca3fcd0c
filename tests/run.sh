#!/usr/bin/env bash
# Sets up .venv (see launchers/setup_env.sh) and runs the tests: all rooms, about twenty minutes on two cores.
#
#   bash tests/run.sh [PYTEST ARGUMENT ...]       such as: tests/unit, -k resume, -x
#   bash tests/run.sh --all                       also those marked `long`: three quarters of an hour; what .ci/run does
#   bash tests/run.sh --slow -m slow              the tests that take minutes each
#
# Without a file or folder, in three parts: what needs one process a test, as many at once as there are cores (at most 8);
# what starts ranks here, two files at once; and beside these, as they mostly wait, launches and what has hosts of its own,
# one by one, and what failed of these once more, alone.
# What is named runs by itself, all of it, in one process; -n 2 for two.
# tests/multihost and tests/chaos need root, pdsh, sshd, ip (chaos: nft, cc too), and say so where they are skipped.
# OFA_DS_VENV: another environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launchers/setup_env.sh dev
venv=${OFA_DS_VENV:-$root/.venv}
export PATH=$venv/bin:$PATH
# Tests start several ranks; one thread each keeps them from fighting over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONPATH=$root:$root/kernels

existing() { for folder in "$@"; do if [ -d "$folder" ]; then echo "$folder"; fi; done; }
# Quick ones first: a mistake in a unit shows before the trainings start.
mapfile -t at_once < <(existing tests/unit tests/kernels tests/parity)
# A launch judges by silences of seconds: its tests run one by one.
launches=tests/reliability/test_launch.py
mapfile -t by_twos < <(existing tests/distributed tests/reliability)
mapfile -t one_by_one < <(existing tests/multihost tests/chaos)
is_named=false stops_at_first=false before=
everything=false arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then
    everything=true
    continue
  fi
  arguments+=("$argument")
  if [ -e "${argument%%::*}" ] && [ "$before" != --golden ]; then is_named=true; fi
  before=$argument
  case $argument in
    -x | --exitfirst | --maxfail*) stops_at_first=true ;;
    --slow) everything=true ;;
  esac
done
set -- "${arguments[@]}"
if ! $is_named && ! $everything; then set -- --brief "$@"; fi

logs=$(mktemp -d "${TMPDIR:-/tmp}/ofa-ds-tests.XXXXXX")
beside=
# Interrupted, they take down the hosts that they made; what does not heed it within a minute is ended.
end_what_runs_beside() {
  if [ -z "$beside" ]; then return; fi
  kill -INT -- "-$beside" 2>/dev/null || true
  for _ in {1..600}; do
    if ! kill -0 "$beside" 2>/dev/null; then break; fi
    sleep 0.1
  done
  kill -KILL -- "-$beside" 2>/dev/null || true
  beside=
}
# A shell that was itself started with SIGINT ignored (`&` of a script) hands that on, whatever its traps say.
heeding=()
if env --default-signal=INT true 2>/dev/null; then heeding=(env --default-signal=INT); fi
trap 'end_what_runs_beside; rm -rf "$logs"' EXIT
trap 'exit 130' INT
code=0 summaries=() found=false lower=()
# of NUMBER, whose output is LOG
ended_with() {
  ended=$1
  summaries+=("$(grep . "$2" | tail -n 1 || true)")
  # 5: nothing here has what -k or -m asks for; only where no part has it that is a failure.
  if [ "$ended" -ne 5 ]; then found=true; fi
  if [ "$ended" -ne 5 ] && [ "$code" -eq 0 ]; then code=$ended; fi
}
run() {
  local status=0
  "${lower[@]}" python -m pytest -q --durations=10 "$@" </dev/null 2>&1 | tee "$logs/run" || status=$?
  ended_with "$status" "$logs/run"
}
# After failed tests (1) the next part runs as well, unless -x asks for the end; after anything worse it does not.
goes_on() { [ "$code" -eq 0 ] || { [ "$code" -eq 1 ] && ! $stops_at_first; }; }
if $is_named; then
  run "$@"
else
  one_by_one=("$launches" "${one_by_one[@]}" -o cache_dir=.pytest_cache/beside)
  set -m  # a group of its own
  "${heeding[@]}" python -m pytest -q --durations=10 "${one_by_one[@]}" "$@" </dev/null >"$logs/beside" 2>&1 &
  beside=$!
  set +m
  lower=(nice -n 5)  # those are in a hurry
  run -n logical --maxprocesses 8 --dist worksteal "${at_once[@]}" "$@"
  if goes_on; then run -n 2 --dist loadfile "${by_twos[@]}" --ignore "$launches" "$@"; fi
  if goes_on; then
    before=$code status=0
    echo "tests: waiting for those of launches and hosts, which began with the first"
    wait "$beside" || status=$?
    beside=
    cat "$logs/beside"
    ended_with "$status" "$logs/beside"
    # These judge by seconds of silence, of real daemons on a machine that others may load: what failed is tried once more,
    # alone, and said to have failed once.
    if [ "$before" -eq 0 ] && [ "$code" -eq 1 ] && ! $stops_at_first; then
      echo "tests: what failed of these is tried a second time"
      code=0 lower=()
      run --last-failed --last-failed-no-failures none "${one_by_one[@]}" "$@"
      if [ "$ended" -eq 5 ]; then code=1; fi  # nobody remembers what had failed
    fi
  fi
fi
if ! $found; then code=5; fi

printf -v summary '%s; ' "${summaries[@]}"
if [ "$code" -eq 0 ]; then
  echo "tests: passed (${summary%; })"
else
  echo "tests: FAILED (${summary%; }); the failures are above" >&2
fi
exit "$code"
