"""`python -m drystone.cli` is the `drystone` command."""

from drystone.cli import main

main()
