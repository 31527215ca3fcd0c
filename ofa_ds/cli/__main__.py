import sys

from ofa_ds.cli.main import main

sys.exit(main())
