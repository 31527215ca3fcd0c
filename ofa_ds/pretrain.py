"""`deepspeed --module ofa_ds.pretrain RECIPE [KEY=VALUE ...]`: the same as `ofa-ds pretrain`, as launchers want it.

`--encoded=WORD` instead (ofa_ds/cluster/parcel.py) has all of it in one word that no shell of another host misreads.
"""

import sys
from collections.abc import Sequence

from ofa_ds.cluster import parcel


def main(arguments: Sequence[str], command: str = "pretrain") -> int:
    """`ofa-ds COMMAND` with these arguments, or with those of an encoded word; returns the exit code."""
    if arguments and arguments[-1].startswith(parcel.OPTION):  # DeepSpeed's --local_rank stands before it
        try:
            parcel.start(arguments[-1].removeprefix(parcel.OPTION), f"ofa_ds.{command}")
        except (ValueError, RuntimeError) as error:
            print(f"ofa_ds.{command}: {error}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1
    from ofa_ds.cli import main as command_line

    return command_line([command, *arguments])


if __name__ == "__main__":
    from ofa_ds.cli.main import leave

    leave(main(sys.argv[1:]))
