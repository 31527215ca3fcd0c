"""`ofa-ds`: parses and delegates. Heavy modules are imported by the command that needs them, so `--help` is instant.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or a wrong recipe, 130 stopped by Ctrl-C, 141 nobody reads what it
prints. Failures are one line (`ofa_ds.cli.failure`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ofa_ds.cli.bench import add_bench
from ofa_ds.cli.checkpoint import add_checkpoint
from ofa_ds.cli.cluster import add_launch, add_preflight, add_runs
from ofa_ds.cli.codes import add_codes
from ofa_ds.cli.data import add_scenes, add_shards, add_vocab
from ofa_ds.cli.inference import add_evaluate, add_generate, add_predict
from ofa_ds.cli.parser import UsageError, parsed
from ofa_ds.cli.plan import add_plan
from ofa_ds.cli.pretrain import add_finetune, add_pretrain
from ofa_ds.terms import STOPPED

READER_GONE = 141
"""As if the signal SIGPIPE had ended it, which is what a shell expects of `ofa-ds ... | head`."""

_GROUPS = (
    add_scenes, add_shards, add_vocab, add_codes, add_pretrain, add_finetune, add_preflight, add_launch, add_runs,
    add_plan, add_evaluate, add_generate, add_predict, add_checkpoint, add_bench,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _write_whole_lines()
    try:
        try:
            options = parsed(_parser(), arguments)
        finally:
            _flush()  # after --help
        code = options.run(options) or 0
        _flush()
        return code
    except KeyboardInterrupt:
        return _failed(UsageError("stopped by Ctrl-C"), arguments, 130)
    except UsageError as error:
        _keep(error)
        return _failed(error, arguments, 2)
    except Exception as error:
        _keep(error)
        return _failed(error, arguments, 1)


def script() -> NoReturn:
    """`ofa-ds`."""
    leave(main())


def leave(code: int) -> NoReturn:
    """End this process; a rank does so without Python's own end, once its work is done or saved.

    There the connections' threads are taken down in no certain order, and now and then abort one that has finished.
    Nor is there a reason to wait for what was read ahead from a service and is not wanted any longer.
    """
    fetching = sys.modules.get("ofa_ds.data.remote.fetching")
    if code in (0, STOPPED) and "RANK" in os.environ or fetching is not None and fetching.under_way():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _write_whole_lines() -> None:
    """Launchers start ranks with `python -u`, which writes a line and its end apart: those of two ranks would mix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.write_through:
            stream.reconfigure(line_buffering=True, write_through=False)


def _flush() -> None:
    """A full disk or a closed pipe is an error of the command, not of Python on its way out."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _keep(error: Exception) -> None:
    """For whoever watches the ranks of this host, if anybody does."""
    try:
        from ofa_ds.cli.failure import keep_error
    except (OSError, MemoryError):
        return
    keep_error(error)


def _failed(error: Exception, arguments: Sequence[str], code: int) -> int:
    try:
        from ofa_ds.cli.failure import give_up_output, reader_has_gone, tell_error
    except (OSError, MemoryError):  # not even for this
        raise error from None
    if isinstance(error, BrokenPipeError) and reader_has_gone():
        code = READER_GONE
    else:
        tell_error(error, arguments)
    give_up_output()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ofa-ds",
        description="Pretrain OFA, one model for pictures, text, boxes and image codes, with DeepSpeed ZeRO-3.",
        epilog="A first run: bash launchers/quickstart.sh. Each command explains itself: ofa-ds COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in _GROUPS:
        add(commands)
    return parser
