"""The steps of first_ten_minutes.sh, each a process of its own with a budget, and the page that is kept of them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = ("adam", "once", "train")
"""Parts that run beside the first steps, small: what they compile, later steps find. nvcc takes a minute for adam."""
ALONE = ("a step", "speed")
"""Steps that measure: nothing runs beside them."""
TAIL_LINES = 30
"""Of what a failed step said last, kept on the page."""
SHIM = '''"""Stands in for a package that is not here: tests that draw examples are left out."""
import pytest
def given(*_, **__):
    return lambda test: pytest.mark.skip(reason="no hypothesis here")(lambda: None)
class _Anything(type):
    def __iter__(cls):
        return iter(())
    def __getattr__(cls, name):
        return lambda *_, **__: cls
class settings(metaclass=_Anything):
    def __init__(self, *_, **__):
        pass
    def __call__(self, test):
        return test
class HealthCheck(metaclass=_Anything):
    pass
class strategies(metaclass=_Anything):
    pass
'''


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    """Of its budget; what earlier steps leave is added."""
    command: tuple[str, ...]
    """Empty where it cannot be done here."""
    environment: dict[str, str] = field(default_factory=dict)
    why_not: str = "needs a GPU"


@dataclass(frozen=True)
class Done:
    step: Step
    seconds: float
    verdict: str
    lines: list[str]


def steps(device: str, small: bool) -> list[Step]:
    """In order. small: a few tiny shapes."""
    python, gpu = sys.executable, device == "cuda"
    kind = ("--device", device, *(("--small",) if small else ()))

    def part(name: str) -> tuple[str, ...]:
        return python, str(ROOT / "kernels/gpu_parts.py"), name, *kind

    def tests(*arguments: str) -> tuple[str, ...]:
        return python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments

    file = "tests/kernels/test_gpu.py"
    at_once = ("-n", "6", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    # compiling is most of it: one 16-bit type, and no head dim that no preset has
    accurate = tests(file, "-m", "gpu", "-k", "accurate and not fp16 and not 8192", *at_once)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    check = (sanitizer, "--tool", "memcheck", "--error-exitcode", "9") if sanitizer else ()
    memory = (*check, *part("once")) if sanitizer or not gpu else ()
    speed = (
        python, str(ROOT / "kernels/bench.py"), *kind, *(() if small else ("--size", "6b")),
        "--only", "attention encoder", "norm", "vocabulary loss", "--contender", "ofa-ds", "sdpa", "torch", "eager",
        "--seconds", "150",
    )  # fmt: skip
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("versions", 20, part("versions")),
        Step("accurate", 155, accurate if gpu else tests("tests/kernels/test_plain_attention.py")),
        Step("same bits", 50, tests(file, "-m", "gpu", "-k", "same_bits", "--repeats", "30") if gpu else ()),
        Step("memory errors", 40, memory, no_cache, "compute-sanitizer is not here"),
        Step("training", 125, part("train")),
        Step("a step", 45, part("step")),
        Step("no waiting", 25, tests("tests/kernels/test_gpu_step.py", "-m", "gpu") if gpu else ()),
        Step("speed", 155, speed),
    ]


def run(step: Step, seconds: float) -> Done:
    """Prints what the step says; it and all it started are gone afterwards."""
    print(f"\n== {step.name} (at most {seconds:.0f} s)", flush=True)
    if not step.command:
        print(step.why_not, flush=True)
        return Done(step, 0.0, f"left out: {step.why_not}", [])
    began, lines = time.monotonic(), []
    process = subprocess.Popen(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        env={**os.environ, **step.environment}, start_new_session=True,
    )  # fmt: skip

    def read() -> None:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(timeout=max(seconds, 0.1))
        verdict = "ok" if code == 0 else f"FAILED ({code})"
    except subprocess.TimeoutExpired:
        verdict = f"OUT OF TIME after {seconds:.0f} s"
    finally:
        end(process)
    reader.join(timeout=5)
    return Done(step, time.monotonic() - began, verdict, list(lines))


def begin(part: str) -> subprocess.Popen[str]:
    """A part on the GPU whose output nobody wants."""
    command = [sys.executable, str(ROOT / "kernels/gpu_parts.py"), part, "--small"]
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, text=True, **nowhere)


def end(process: subprocess.Popen[str]) -> None:
    """Its whole process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def end_all(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            end(process)


def end_on_sigterm() -> None:
    """As on Ctrl-C: what was started is ended, too, and does not keep the GPU."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def page(done: Sequence[Done], title: str) -> str:
    """Markdown: a table of the steps, then the tables they printed and the end of what a failed one said."""
    lines = [f"# {title}", "", "| step | seconds | verdict | said last |", "|---|---|---|---|"]
    for each in done:
        last = next((line for line in reversed(each.lines) if line.strip(" =")), "").strip(" =").replace("|", "/")
        lines.append(f"| {each.step.name} | {each.seconds:.0f} | {each.verdict} | {last[:200]} |")
    for each in done:
        kept: list[str] = []
        for line in each.lines:
            if line.startswith(("| ", "|-", "* ")):
                if kept and kept[-1][:1] != line[0]:
                    kept.append("")
                kept.append(line)
        failed = each.verdict.startswith(("FAILED", "OUT"))
        if kept or failed:
            lines += ["", f"## {each.step.name}", "", *kept]
        if failed:
            lines += ["", "```", *each.lines[-TAIL_LINES:], "```"]
    return "\n".join(lines) + "\n"


def run_all(
    planned: Sequence[Step], out: Path, title: str, seconds: float, beside: Sequence[subprocess.Popen[str]] = ()
) -> list[Done]:
    """Each step in turn, the page after each; no step begins after `seconds`. beside: ended before steps of ALONE."""
    began, spare_s, done = time.monotonic(), 0.0, []
    for step in planned:
        left_s = seconds - (time.monotonic() - began)
        if left_s < 1 and step.command:
            done.append(Done(step, 0.0, "OUT OF TIME before it began", []))
        else:
            if step.name in ALONE:
                end_all(beside)
            may_s = min(step.seconds + spare_s, left_s)
            done.append(run(step, may_s))
            spare_s = max(0.0, step.seconds + spare_s - done[-1].seconds)
        out.write_text(page(done, title), encoding="utf-8")
    return done


def commit() -> str:
    try:
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return said.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="first_ten_minutes.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "first_ten_minutes.md")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all steps together")
    parser.add_argument("--step", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    planned = steps(options.device, options.small)
    if wrong := set(options.step) - {step.name for step in planned}:
        parser.error(f"--step {', '.join(sorted(wrong))}: want some of {', '.join(step.name for step in planned)}")
    planned = [step for step in planned if not options.step or step.name in options.step]
    os.environ["TRITON_INTERPRET"] = "0"
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("hypothesis") is None:
            (Path(folder) / "hypothesis.py").write_text(SHIM)
            os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}:{folder}"
        beside = [begin(name) for name in BESIDE if options.device == "cuda"]
        title = f"First ten minutes: {options.device}, commit {commit() or 'unknown'}"
        try:
            done = run_all(planned, options.out, title, options.seconds, beside)
        finally:
            end_all(beside)
    print(f"\n{options.out.read_text(encoding='utf-8')}\nkept in {options.out}", flush=True)
    return 0 if all(each.verdict == "ok" or each.verdict.startswith("left out") for each in done) else 1


if __name__ == "__main__":
    sys.exit(main())
