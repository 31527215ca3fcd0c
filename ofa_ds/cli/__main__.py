"""`python -m ofa_ds.cli`: the same as `ofa-ds`, for whoever has an interpreter and no script in PATH."""

from ofa_ds.cli.main import leave, main

leave(main())
