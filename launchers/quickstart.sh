#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, draws the embedded scenes, builds shards and a vocabulary, pretrains a
# nano OFA with ZeRO-3 on all eight tasks, evaluates it on held-out scenes and writes a picture of what it answers.
#
#   bash launchers/quickstart.sh [--fresh] [KEY=VALUE ...]       KEY=VALUE: recipe overrides, such as train.seed=2
#
# What is there already is not made again; --fresh trains anew (set-up and data stay). Data goes to data/scenes, the run to
# runs/nano, both in QUICKSTART_DIR (default: this checkout). Uses up to two GPUs, else two ranks on the CPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fresh=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --fresh) fresh=1; shift ;;
    --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "quickstart: $1: unknown option; want [--fresh] [KEY=VALUE ...]" >&2; exit 2 ;;
  esac
done
recipe=pretrain-nano run=runs/nano data=data/scenes
train_rows=24000 heldout_rows=1300
text_entries=512 codes=128 bins=65

started=$SECONDS
step() { printf 'quickstart %3d s: %s\n' "$((SECONDS - started))" "$1"; }
stopped=
finish() {
  local code=$?
  [ "$code" -eq 0 ] || echo "quickstart: failed while $stopped (exit code $code); the first error above says why" >&2
}
trap finish EXIT

stopped="setting up"
bash "$root/launchers/setup_env.sh"
venv=${OFA_DS_VENV:-$root/.venv}
export PATH=$venv/bin:$PATH
dir=${QUICKSTART_DIR:-$root}
mkdir -p "$dir"
cd "$dir"

# A directory counts as made once it has its final name, so an interrupted step is simply done again.
draw() {
  [ ! -d "$data/tsv/$1" ] || return 0
  step "drawing $2 $1 scenes"
  rm -rf "$data/tsv/$1.part"
  ofa-ds scenes --out "$data/tsv/$1.part" --rows "$2" --seed 1 --split "$1" >/dev/null
  mv "$data/tsv/$1.part" "$data/tsv/$1"
}
build() {
  [ ! -d "$data/$1" ] || return 0
  step "building $1 shards"
  local tsv=$data/tsv/$1
  ofa-ds shards build --out "$data/$1" --negatives "$tsv/negative_sample" \
    --vision-language "$tsv/vision_language_examples.tsv" --text "$tsv/text_examples.tsv" \
    --image "$tsv/image_examples.tsv" --detection "$tsv/detection_examples.tsv"
}
mkdir -p "$data/tsv" runs
stopped="drawing scenes"
draw train "$train_rows"
draw heldout "$heldout_rows"
stopped="building shards"
build train
build heldout
stopped="training the vocabulary"
if [ ! -d "$data/vocab" ]; then
  step "training a vocabulary of $text_entries text entries"
  rm -rf "$data/vocab.part"
  ofa-ds vocab train --shards "$data/train" --out "$data/vocab.part" \
    --size "$text_entries" --codes "$codes" --bins "$bins" >/dev/null
  mv "$data/vocab.part" "$data/vocab"
fi

stopped="training"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  ranks=$((gpus > 1 ? 2 : 1))
  place="$ranks of $gpus GPUs"
else
  export DS_ACCELERATOR=cpu
  ranks=2 cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
  place="$ranks ranks on the CPU, $OMP_NUM_THREADS threads each"
fi
[ -z "$fresh" ] || rm -rf "$run"
mkdir -p "$run"
if [ -f "$run/command" ] && [ "$(cat "$run/command")" != "$recipe $*" ]; then
  echo "quickstart: $dir/$run was trained as '$(cat "$run/command")'; --fresh trains it anew as '$recipe $*'" >&2
  exit 2
fi
echo "$recipe $*" >"$run/command"
if [ -f "$run/finished" ]; then
  step "already trained; --fresh trains anew"
else
  step "training $recipe with ZeRO-3: $place"
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  # --hostfile '': a cluster's /job/hostfile is not meant by a quick start.
  deepspeed --hostfile '' --num_gpus "$ranks" --master_port "$port" --log_level error --module ofa_ds.pretrain "$recipe" \
    run_dir="$run" data.shards="$data/train" data.vocab="$data/vocab" "$@"
  touch "$run/finished"
fi

stopped="evaluating"
if [ ! -f "$run/evaluation.json" ] || [ ! -f "$run/tasks.png" ] || [ "$run/finished" -nt "$run/evaluation.json" ]; then
  step "evaluating on held-out scenes"
  unset OMP_NUM_THREADS  # one process now: it may have all cores
  ofa-ds evaluate "$run" --shards "$data/heldout" --rows 400 --json --png "$run/tasks.png" --codes-model scenes \
    >"$run/evaluation.json.part"
  mv "$run/evaluation.json.part" "$run/evaluation.json"
fi
took=$((SECONDS - started))
echo "quickstart: done in $took s; see $dir/$run: tasks.png (one picture per task), evaluation.json, metrics.jsonl"
