"""Parts of first_ten_minutes.sh that are no test and no benchmark.

    python kernels/gpu_parts.py PART [--device cpu] [--small]

versions: of the machine and of all that counts. once: each kernel once, forward and backward, for a memory checker.
train: nano on scenes, twice as the recipe says and once all in torch. step: where a training step of base waits for the
device, and what takes its time. adam: builds DeepSpeed's optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "pyarrow", "pydantic", "pytest", "hypothesis")
OPERATORS = ("attention", "layer_norm", "cross_entropy")
TOP_KERNELS = 25


def versions(device: str, small: bool) -> int:
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True)
        said = (smi.stdout or smi.stderr).strip()
    except OSError as error:
        said = f"no nvidia-smi: {error.strerror}"
    print(f"* GPU: {said}")
    missing = []
    for name in PACKAGES:
        try:
            print(f"* {name} {getattr(import_module(name), '__version__', '?')}", flush=True)
        except Exception as error:  # whatever a broken package raises
            missing.append(name)
            print(f"* {name}: {type(error).__name__}: {error}", flush=True)
    import torch

    if device == "cuda":
        print(f"* CUDA of torch {torch.version.cuda}, {torch.cuda.get_device_name()}, {os.cpu_count()} cores")
    print(f"missing: {', '.join(missing)}" if missing else "all is here")
    return 1 if set(missing) - {"hypothesis"} else 0


def once(device: str, small: bool) -> int:
    import speed
    import torch

    like = torch.zeros((), device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    count = 0
    for case in speed.cases(small=True):
        for contender in case.make(like):
            if contender.name.startswith("ofa-ds"):
                speed._forward_and_backward(contender)
                count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} forwards and backwards")
    return 0


def train(device: str, small: bool) -> int:
    """1 where the two runs differ, or the loss in torch is elsewhere."""
    import scenes_shards

    steps = 2 if small else 20
    with tempfile.TemporaryDirectory() as folder:
        data = scenes_shards.build(Path(folder) / "scenes", rows=16 if small else 64)
        curves = {}
        for name, kernel in (("first", "auto"), ("again", "auto"), ("torch", "torch")):
            run_dir = Path(folder) / name
            command = [
                sys.executable, "-m", "ofa_ds.cli", "pretrain", "pretrain-nano", f"run_dir={run_dir}",
                f"data.shards={data / 'shards'}", f"data.vocab={data / 'vocab'}", "batch.global_rows=4",
                "batch.micro_rows=4", "optim.warmup_steps=0", f"train.num_steps={steps}", "train.log_every=1",
                "train.sample_every=0", *(f"kernels.{operator}={kernel}" for operator in OPERATORS),
            ]  # fmt: skip
            began = time.monotonic()
            environment = {**os.environ, "DS_ACCELERATOR": device}
            done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
            said = [line for line in done.stderr.splitlines() if line.startswith(("ZeRO stage", "kernels in"))]
            print(f"* {name}: {time.monotonic() - began:.0f} s; {'; '.join(said)}", flush=True)
            if done.returncode:
                print(done.stderr[-4000:])
                return done.returncode
            curves[name] = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            print(f"* {name}: loss {', '.join(f'{value:.4f}' for value in curves[name])}", flush=True)
    repeats = curves["first"] == curves["again"]
    apart = max(abs(one - two) / two for one, two in zip(curves["first"], curves["torch"], strict=True))
    print(f"{'the same losses twice' if repeats else 'OTHER LOSSES the second time'}; at most {apart:.1e} from torch's")
    return 0 if repeats and apart < 0.03 else 1


def step(device: str, small: bool) -> int:
    import torch

    from ofa_ds.batch import pack
    from ofa_ds.bench.step import VOCAB_SIZE, mixed_examples, pair_examples
    from ofa_ds.model.config import preset
    from ofa_ds.model.ofa import OFA

    torch.manual_seed(0)
    model = OFA(preset("nano" if small else "base", vocab_size=VOCAB_SIZE)).train().to(device)
    model = model.bfloat16() if device == "cuda" else model
    examples = pair_examples() if small else [*(each for part in mixed_examples() for each in part)]
    size = model.config.patch_size, model.config.image_bucket_size
    batch = pack(examples, [(256, 256)] if small else [(384, 384), (256, 256)], *size).to(device)

    def forward_and_backward() -> None:
        model.zero_grad()
        model(batch)[0].sum().backward()

    _each("warm-up", forward_and_backward, device)
    _each("a step", forward_and_backward, device)
    if device == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            forward_and_backward()
            torch.cuda.set_sync_debug_mode("default")
        waits = Counter(f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))
        print(f"waits for the device: {sum(waits.values())}")
        for place, times in waits.most_common():
            print(f"* waits {times} times at {place}")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        forward_and_backward()
        if device == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in found)
    print("| kernel | calls | us | share |\n|---|---|---|---|")
    for event in found[:TOP_KERNELS]:
        spent = getattr(event, key)
        print(f"| {event.key[:90].replace('|', '/')} | {event.count} | {spent:.0f} | {100 * spent / total:.1f} % |")
    print(f"in all {total / 1e3:.2f} ms on the {'device' if device == 'cuda' else 'CPU'}")
    return 0


def _each(name: str, action: Callable[[], None], device: str, times: int = 3) -> None:
    """Prints the last of a few: until it is issued, until it is done."""
    import torch

    for _ in range(times):
        began = time.perf_counter()
        action()
        issued = time.perf_counter()
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"* {name}: issued in {(issued - began) * 1e3:.1f} ms, done in {(time.perf_counter() - began) * 1e3:.1f} ms")


def adam(device: str, small: bool) -> int:
    import deepspeed
    import torch

    deepspeed.ops.adam.FusedAdam([torch.nn.Parameter(torch.zeros(1, device=device))])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {each.__name__: each for each in (versions, once, train, step, adam)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    return parts[options.part](options.device, options.small)


if __name__ == "__main__":
    sys.exit(main())
