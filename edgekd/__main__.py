"""``python -m edgekd`` is the command line."""

from edgekd.cli import main

main(prog_name="edgekd")
