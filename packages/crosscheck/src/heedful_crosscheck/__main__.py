"""`python -m heedful_crosscheck`: the command `heedful`, by whichever Python it is."""

from heedful_crosscheck.cli import main

main()
