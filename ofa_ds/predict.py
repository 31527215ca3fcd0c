"""`deepspeed --module ofa_ds.predict CHECKPOINT ...`: the same as `ofa-ds predict`, as launchers want it."""

import sys

from ofa_ds.pretrain import main

if __name__ == "__main__":
    from ofa_ds.cli.main import leave

    leave(main(sys.argv[1:], "predict"))
