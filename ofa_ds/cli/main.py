"""`ofa-ds`: parses and delegates. Heavy modules are imported by the command that needs them, so `--help` is instant.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or a wrong recipe, 130 stopped by Ctrl-C. Failures are one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ofa_ds.cli.checkpoint import add_checkpoint
from ofa_ds.cli.data import add_scenes, add_shards, add_vocab
from ofa_ds.cli.inference import add_evaluate, add_generate
from ofa_ds.cli.parser import UsageError
from ofa_ds.cli.pretrain import add_pretrain

_GROUPS = (add_scenes, add_shards, add_vocab, add_pretrain, add_evaluate, add_generate, add_checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UsageError as error:
        return _fail(error, 2)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130)


def _fail(message: object, code: int) -> int:
    print(f"ofa-ds: {' '.join(str(message).split())}", file=sys.stderr)
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
