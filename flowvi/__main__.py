"""`python -m flowvi`: the command line."""

from flowvi.cli import main

main(prog_name="flowvi")
