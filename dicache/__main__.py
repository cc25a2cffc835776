"""`python -m dicache`."""

from dicache.cli import main

main(prog_name="dicache")
