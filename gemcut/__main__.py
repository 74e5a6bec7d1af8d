"""`python -m gemcut`: the same command as `gemcut`."""

from gemcut.cli import main

main()
