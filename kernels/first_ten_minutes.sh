#!/usr/bin/env bash
# What the first ten minutes on a GPU are for, in one go: versions, exactness in 16 bits, same bits, memory errors, training
# with kernels on and off, waits for the device and a profile of a step, speed beside the alternatives.
#
#   bash kernels/first_ten_minutes.sh [--out FILE] [--seconds 600] [--step NAME ...] [--device cpu --small]
#
# Prints all as it comes and keeps one Markdown page (first_ten_minutes.md, or --out) that is whole after every step. A step
# that fails, hangs or takes too long is told and the next begins. Needs no network: what Python lacks is installed from a
# folder gpu_wheels in the checkout, beside it or in shared/ of either. --device cpu --small: whether the script itself works.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
venv=${OFA_DS_VENV:-$root/.venv}
python=python3
if [ -x "$venv/bin/python" ]; then python=$venv/bin/python; fi

lacks() {
  "$python" - <<'PYTHON'
import importlib.util
names = "deepspeed pydantic pydantic_core annotated_types typing_inspection typing_extensions hjson msgpack numpy pyarrow torch triton pytest"
print(*(name for name in names.split() if importlib.util.find_spec(name) is None))
PYTHON
}
missing=$(lacks)
if [ -n "$missing" ]; then
  site=$(mktemp -d "${TMPDIR:-/tmp}/ofa-ds-site.XXXXXX")
  trap 'rm -rf "$site"' EXIT
  for folder in "$root/gpu_wheels" "$root/../gpu_wheels" "$root/shared/gpu_wheels" "$root/../shared/gpu_wheels"; do
    if compgen -G "$folder/*.whl" >/dev/null; then
      echo "first ten minutes: installing $missing from $folder"
      "$python" -m pip install -q --no-index --no-deps --target "$site" "$folder"/*.whl || true
      break
    fi
  done
  export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$site
  missing=$(lacks)
  if [ -n "$missing" ]; then
    echo "first ten minutes: Python lacks $missing; what needs it fails; put wheels into $root/gpu_wheels" >&2
  fi
fi
export PYTHONPATH=$root:$root/kernels:$root/tests${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
"$python" "$root/kernels/first_ten_minutes.py" "$@"
