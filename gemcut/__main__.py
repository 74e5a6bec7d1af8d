"""`python -m gemcut`: the same command as `gemcut`."""

import sys

from gemcut.cli import main

sys.exit(main())
