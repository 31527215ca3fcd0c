"""`ofa-ds`: the command line. Light: a command brings what it needs."""

from ofa_ds.cli.main import main

__all__ = ["main"]
