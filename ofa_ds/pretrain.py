"""`deepspeed --module ofa_ds.pretrain RECIPE [KEY=VALUE ...]`: the same as `ofa-ds pretrain`, as launchers want it."""

import sys

from ofa_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
