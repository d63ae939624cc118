"""`python -m services.cli` is the `lorafarm` command."""

from services.cli import main

main()
