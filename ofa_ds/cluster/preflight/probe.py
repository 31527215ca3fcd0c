"""What runs on each host: answers questions about it over the ssh channel. Standard library alone; its source is sent
there, so a host without this checkout answers too. One JSON line a question, one marked JSON line an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ofa_ds.cluster.preflight.exchange import take_part
from ofa_ds.cluster.preflight.machine import gpu_nodes, infiniband, interface_of, modules, nvml_records

_PROGRAMS = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAM_S = 20.0
"""A sick GPU makes nvidia-smi hang: that is an answer too."""
_CODE = ("ofa_ds/**/*.py", "ofa_ds/**/*.toml", "kernels/ofa_kernels/**/*.py", "ds_configs/*.json")


def main(mark: str) -> None:
    """Answer until the channel ends. `mark` begins each answer: what a login shell prints does not have it."""
    channel = os.dup(1)
    os.dup2(2, 1)  # nothing else gets in between
    _answer(channel, mark, {"ok": "here"})
    with contextlib.ExitStack() as listeners, contextlib.ExitStack() as files:
        for line in sys.stdin.buffer:
            received = time.time()
            question = json.loads(line)
            try:
                answer = {"ok": _ask(question, received, listeners, files)}
            except Exception as error:  # the host has a fault, and the fault is the answer
                answer = {"error": f"{type(error).__name__}: {error}"}
            _answer(channel, mark, answer)


def _answer(channel: int, mark: str, answer: dict[str, Any]) -> None:
    text = f"\n{mark}{json.dumps(answer)}\n".encode()
    while text:
        text = text[os.write(channel, text) :]


def _ask(
    question: dict[str, Any], received: float, listeners: contextlib.ExitStack, files: contextlib.ExitStack
) -> Any:
    """What is opened and written for others is closed and deleted with the channel, however it ends."""
    what = question.pop("ask")
    if what == "clock":
        return received, time.time()
    if what == "listen":
        return listeners.enter_context(_listener(**question)).getsockname()[1]
    if what == "close":
        return listeners.close()
    if what == "write":
        files.callback(_delete, question["path"])
        return write(**question)
    if what == "exchange":
        return take_part(question)
    answers = {
        "facts": facts, "connect": connect, "read": read, "speed": speed,
        "load": load,
    }  # fmt: skip
    return answers[what](**question)


def facts(checkout: str, python: str, directory: str) -> dict[str, Any]:
    """Everything that one host can say alone; a part that fails is {"error": text}."""
    parts = {
        "identity": lambda: (_text("/proc/sys/kernel/random/boot_id"), os.stat("/proc/self/ns/net").st_ino),
        "python": lambda: {"version": sys.version.split()[0], "executable": sys.executable, "wanted": python},
        "packages": lambda: {name: _version(name) for name in ("torch", "deepspeed")},
        "cuda": _cuda,
        "nccl": _nccl,
        "driver": _driver,
        "code": lambda: _code(checkout),
        "space": lambda: {"run": _space(directory), "tmp": _space(os.environ.get("TMPDIR", "/tmp"))},
        "shm": lambda: _space("/dev/shm"),
        "memory": _memory,
        "limits": _limits,
        "cpus": lambda: {"usable": len(os.sched_getaffinity(0)), "all": os.cpu_count(), "load": os.getloadavg()[0]},
        "network": _network,
        "gpus": _gpus,
        "kernel_log": _kernel_log,
        "infiniband": infiniband,
        "pci_nodes": gpu_nodes,
        "modules": modules,
        "texts": lambda: {"ibstat": _run("ibstat"), "ibv_devinfo": _run("ibv_devinfo", "-v"), "lspci": _acs()},
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace").strip()


def _run(*command: str) -> str | None:
    """What a program prints; None where it is missing. Raises TimeoutExpired where it hangs."""
    return _ended(*command)[1]


def _ended(*command: str) -> tuple[int, str | None]:
    """(exit code, what it printed)."""
    program = shutil.which(command[0], path=_PROGRAMS)
    if program is None:
        return 0, None
    process = subprocess.Popen(
        [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=_PROGRAM_S)
    except subprocess.TimeoutExpired:
        process.kill()  # nobody waits for it: one that hangs in the driver does not die
        raise
    return process.returncode, output.decode(errors="replace")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    """The CUDA that torch was built for, read from its version file: importing torch takes seconds."""
    with contextlib.suppress(metadata.PackageNotFoundError, OSError):
        text = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text()
        for line in text.splitlines():
            if line.startswith("cuda") and "=" in line:
                return line.rpartition("=")[2].strip().strip("'\"").replace("None", "") or None
    return None


def _nccl() -> str | None:
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11"):
        if _version(package):
            return _version(package)
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/cuda/lib64"):
        for file in sorted(Path(folder).glob("libnccl.so.*.*")):
            return file.name[len("libnccl.so.") :]
    return None


def _driver() -> str | None:
    file = Path("/sys/module/nvidia/version")
    return file.read_text().strip() if file.exists() else None


def _code(checkout: str) -> str | None:
    """Hash of names and contents of the program's files; None where there is no checkout."""
    root, digest = Path(checkout), hashlib.sha256()
    files = sorted(file for pattern in _CODE for file in root.glob(pattern))
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16] if files else None


def _space(path: str) -> dict[str, Any]:
    if not os.path.isdir(path):
        return {"path": path, "missing": True}
    found = os.statvfs(path)
    return {
        "path": path, "free": found.f_bavail * found.f_frsize, "all": found.f_blocks * found.f_frsize,
        "inodes_free": found.f_favail, "inodes_all": found.f_files,
    }  # fmt: skip


def _memory() -> dict[str, int]:
    lines = dict(line.split(":") for line in _text("/proc/meminfo").splitlines())
    return {"all": int(lines["MemTotal"].split()[0]) << 10, "free": int(lines["MemAvailable"].split()[0]) << 10}


def _limits() -> dict[str, int]:
    """Soft limits; -1 for none."""
    return {
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _network() -> dict[str, Any]:
    """The address by which ssh came here, its interface, that one's MTU, and the address that ssh came from."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        return {"address": "", "interface": "", "mtu": None, "from": ""}
    interface = interface_of(words[2])
    mtu = int(_text(f"/sys/class/net/{interface}/mtu")) if interface else None
    return {"address": words[2], "interface": interface, "mtu": mtu, "from": words[0]}


def _gpus() -> dict[str, Any] | None:
    """{"records": ...} from NVML, else {"xml": ..., "nvlink": ...} from nvidia-smi, else None: no NVIDIA driver."""
    try:
        records = nvml_records()
    except Exception:  # no pynvml, or no NVML under it: nvidia-smi says why
        records = None
    if records is not None:
        return {"records": records}
    if shutil.which("nvidia-smi", path=_PROGRAMS) is None:
        return None
    return {"xml": _run("nvidia-smi", "-q", "-x"), "nvlink": _run("nvidia-smi", "nvlink", "-s")}


def _kernel_log() -> list[str] | None:
    """The lines that tell of a GPU's faults; None where this user may not read the log."""
    code, text = _ended("dmesg")
    if code or text is None:
        return None
    return [line for line in text.splitlines() if "NVRM: Xid" in line][-50:]


def _acs() -> str | None:
    """Names of devices and their ACS settings; the rest of lspci's half megabyte is left here."""
    text = _run("lspci", "-vvv")
    if text is None:
        return None
    return "\n".join(line for line in text.splitlines() if line[:1].strip() or "ACSCtl" in line)


def _listener(port: int, within_s: float) -> socket.socket:
    """Waits a while for a port that is taken: another preflight may be about to give it back."""
    deadline = time.monotonic() + within_s
    while True:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(512)
            return listener
        except OSError:
            listener.close()
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def connect(address: str, port: int, within_s: float) -> float:
    """Seconds to reach a port from here."""
    started = time.monotonic()
    with socket.create_connection((address, port), timeout=within_s):
        return time.monotonic() - started


def _delete(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def write(path: str, text: str) -> None:
    """A small file that other hosts shall see."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: str, within_s: float) -> str:
    """What stands in a file that another host wrote. Listing its directory makes NFS look anew."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with contextlib.suppress(OSError):
                os.listdir(os.path.dirname(path))
            return _text(path)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def speed(directory: str, name: str, num_bytes: int) -> float:
    """Bytes a second to the disk under `directory`, its cache not counted; the file is gone again afterwards."""
    path = os.path.join(directory, name)
    block = os.urandom(1 << 20)
    started = time.monotonic()
    try:
        with open(path, "xb", buffering=0) as file:
            for _ in range(num_bytes >> 20):
                file.write(block)
            os.fsync(file.fileno())
        return num_bytes / (time.monotonic() - started)
    finally:
        _delete(path)


def load() -> float:
    """Import torch here, once, for exchanges; seconds it took."""
    started = time.monotonic()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed  # noqa: F401

    return time.monotonic() - started
