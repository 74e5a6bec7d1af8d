"""`python -m gemcut.cli`: the command without an installed script."""

import sys

from gemcut.cli.app import main

sys.exit(main())
