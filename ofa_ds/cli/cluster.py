"""`ofa-ds preflight`: many hosts from one. Light: heavy modules come with the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from ofa_ds.cli.parser import Commands, UsageError, command, positive


def add_preflight(commands: Commands) -> None:
    """Add `preflight`."""
    about = "Look at every host of a hostfile: login, program, clock, disks, limits, GPUs, fabric, speed between them."
    parser = command(commands, "preflight", _preflight, about, example="ofa-ds preflight --hostfile hosts --json")
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help="a line 'HOST slots=N' a host")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write-healthy", type=Path, metavar="FILE", help="the hostfile, less the hosts that fail")
    parser.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="where runs are written, on every host"
    )
    parser.add_argument("--skip-bandwidth", action="store_true", help="measure no exchange between hosts")
    parser.add_argument("--timeout", type=positive, default=60, metavar="SECONDS", help="for one answer of one host")


def _preflight(options: argparse.Namespace) -> int:
    from ofa_ds.cluster.hostfile import parse_hostfile
    from ofa_ds.cluster.preflight.command import Options, preflight

    try:
        parse_hostfile(options.hostfile)
    except ValueError as error:
        raise UsageError(error) from error
    return preflight(
        Options(
            hostfile=options.hostfile, directory=options.directory, as_json=options.json,
            write_healthy=options.write_healthy, bandwidth=not options.skip_bandwidth, timeout_s=options.timeout,
        )
    )  # fmt: skip
