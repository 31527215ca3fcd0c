"""`python -m ofa_ds.cli`: the same as `ofa-ds`, for whoever has an interpreter and no script in PATH."""

import sys

from ofa_ds.cli import main

sys.exit(main())
