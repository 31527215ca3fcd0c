#!/usr/bin/env bash
# Makes .venv beside this checkout and installs ofa-ds there, in the versions of constraints.txt.
#
#   bash launchers/setup_env.sh [EXTRA]      EXTRA: dev (what the tests need), eval, images, mpi; see setup.py
#
# A second run sees that nothing changed and returns at once. PYTHON=... chooses the interpreter (3.10 or newer);
# OFA_DS_VENV=... another place than .venv. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${1:-}
venv=${OFA_DS_VENV:-$root/.venv}
log=$venv/setup.log

fail() { echo "setup: $1" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if new_enough "$candidate"; then echo "$candidate"; return; fi
  done
  fail "want Python 3.10 or newer, found $(${PYTHON:-python3} --version 2>&1 || true); install one and set PYTHON to it"
}

# pip's words go to a file: it shows the addresses of private package indexes.
pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --retries 10 "$@" >>"$log" 2>&1 && return
  grep -E '^ *(ERROR|error)' "$log" | sed -E "s#[a-z+]+://[^ '\"]+#ADDRESS#g; s#host='[^']+'#host=ADDRESS#g" | tail -n 5 >&2
  fail "pip could not install ${*: -1}; the whole story is in $log"
}

case $extra in ''|dev|eval|images|mpi) ;; *) fail "EXTRA $extra: want dev, eval, images or mpi" ;; esac
wanted=$(cat "$root/setup.py" "$root/constraints.txt" | cksum)
stamp=$venv/.ready${extra:+-$extra}
is_ready() { [ -x "$venv/bin/ofa-ds" ] && [ "$(cat "$1" 2>/dev/null)" = "$wanted" ]; }
if is_ready "$stamp"; then exit 0; fi

if ! new_enough "$venv/bin/python"; then
  python=$(find_python)
  echo "setup: $("$python" --version) in $venv"
  "$python" -m venv --clear "$venv" >/dev/null ||
    fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
fi
: >"$log"
if is_ready "$venv/.ready"; then
  echo "setup: adding what $extra needs"
else
  torch=$(grep -E '^torch==' "$root/constraints.txt")
  echo "setup: installing $torch and what ofa-ds needs (a few minutes, once)"
  pip_install --constraint "$root/constraints.txt" --upgrade pip setuptools "$torch"
fi
pip_install --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"
[ -x "$venv/bin/ofa-ds" ] || fail "$venv/bin/ofa-ds is missing after the installation; see $log"
echo "$wanted" >"$stamp"
echo "$wanted" >"$venv/.ready"
echo "setup: ready, $venv/bin/ofa-ds"
