"""How a failure is told: always one line. What nobody foresaw also leaves a file with its traceback."""

from __future__ import annotations

import dis
import errno
import os
import platform
import re
import select
import shlex
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType

_OURS = ("ofa_ds", "ofa_kernels")
_FORESEEN = (ValueError, RuntimeError, OSError)
_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says, often without a name, where a disk or a share of it is full."""
_LITTLE = 1 << 20
"""Bytes with which a disk counts as full."""
_PACKAGES = ("ofa-ds", "torch", "deepspeed", "numpy", "pyarrow", "pydantic", "tokenizers", "triton")
"""Whose versions are told."""
_RANK_VARIABLES = (
    "RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK", "FLUX_TASK_RANK",
    "PMIX_RANK", "SLURM_PROCID",
)  # fmt: skip
_SIZE_VARIABLES = (
    "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE",
    "SLURM_STEP_NUM_TASKS",
)  # fmt: skip
"""Of launchers, in the order in which `ofa_ds.engine.rendezvous` believes them."""


def tell(message: object) -> None:
    """One line on stderr, whatever line ends the message has."""
    if sys.stderr is not None:
        print(f"ofa-ds: {' '.join(str(message).split())}", file=sys.stderr)


def keep_error(error: Exception) -> None:
    """What went wrong, with its traceback, where `ofa-ds launch` watches this rank (ofa_ds.beat)."""
    from ofa_ds.beat import write_error

    write_error(_rank(), error)


def _rank() -> int:
    """0 where this is no rank."""
    said = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    return int(re.sub(r"\D", "", said) or "0")


def tell_error(error: Exception, arguments: Sequence[str]) -> None:
    """What went wrong, and where the traceback is if nobody foresaw it."""
    if is_foreseen(error):
        tell(error)
        return
    if isinstance(error, OSError) and error.errno in _FULL:
        tell(f"{who()}{os.strerror(error.errno)}{_full_place(arguments)}; make room and run the same command again")
        return
    text = "".join(traceback.format_exception(error))
    what = f"{who()}{in_words(error)}"
    try:
        path = _saved(f"{_circumstances(arguments)}\n{text}")
    except OSError as problem:
        tell(f"{what}; its traceback, which cannot be saved ({problem}):")
        print(text, file=sys.stderr)
        return
    tell(f"{what}; unforeseen: please report it with {path}")


def _full_place(arguments: Sequence[str]) -> str:
    """` on the disk of PLACE` for the first argument that lies on a disk without room; nothing where none is known."""
    for argument in (*arguments, tempfile.gettempdir()):
        place = Path(argument.rpartition("=")[2])
        try:
            known = next(each for each in (place, *place.parents) if each.exists())
            found = os.statvfs(known)
        except (OSError, ValueError, StopIteration):
            continue
        is_full = found.f_bavail * found.f_frsize < _LITTLE or (found.f_files and not found.f_favail)
        if place != Path(".") and found.f_blocks and is_full:  # /proc and the like have no blocks
            return f" on the disk of {place}"
    return ""


def in_words(error: Exception) -> str:
    """Type and message; that of an exception is often empty."""
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}"
    return ": ".join(part for part in (type(error).__name__, str(error)) if part)


def is_foreseen(error: Exception) -> bool:
    """Whether our own code raised this on purpose, with a message for the user; or the system, naming a file."""
    if not isinstance(error, _FORESEEN) or not str(error):
        return False
    package = type(error).__module__.split(".")[0]
    if package != "builtins":
        return package in _OURS
    if isinstance(error, OSError) and error.filename is not None:
        return True
    remote = str(error.__cause__) if type(error.__cause__).__name__ == "_RemoteTraceback" else ""
    return _raised_there(remote) if remote else _raised_here(error.__traceback__)


def _raised_here(trace: TracebackType | None) -> bool:
    """Whether the innermost call is ours and stands at a `raise`, not at something that failed."""
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
    return package in _OURS and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _raised_there(trace: str) -> bool:
    """The same of a traceback that another process wrote."""
    calls = re.findall(r'^  File "([^"]*)", line \d+, in .*\n    (.*)$', trace, re.MULTILINE)
    if not calls:
        return False
    file, line = calls[-1]
    return any(part in _OURS for part in Path(file).parts) and line.startswith("raise")


def who() -> str:
    """`rank 3 on HOST: ` where this is one process of many, else nothing."""
    size = next((os.environ[name] for name in _SIZE_VARIABLES if name in os.environ), "1")
    rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), None)
    return "" if rank is None or size == "1" else f"rank {rank} on {socket.gethostname()}: "


def _saved(text: str) -> Path:
    """A new file in TMPDIR that no one else has, readable by this user alone."""
    handle, path = tempfile.mkstemp(prefix=f"ofa-ds-{time.strftime('%Y%m%d-%H%M%S')}-rank{_rank()}-", suffix=".txt")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        os.unlink(path)
        raise
    return Path(path)


def _circumstances(arguments: Sequence[str]) -> str:
    lines = [
        f"command    {shlex.join(['ofa-ds', *arguments])}",
        f"process    {sys.executable} {os.getpid()} {who()}".rstrip(" :"),
        f"directory  {_directory()}",
        f"time       {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"versions   python {platform.python_version()}, {platform.platform()}",
    ]
    for name in _PACKAGES:
        try:
            lines.append(f"           {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join(lines) + "\n"


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "(no longer there)"


def reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as in `ofa-ds ... | head`."""
    try:
        number = sys.stdout.fileno()
        poll = select.poll()
        poll.register(number, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        return False


def give_up_output() -> None:
    """What cannot be written is not tried again: Python would complain on its way out."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, ValueError):  # closed
        pass
