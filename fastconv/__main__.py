"""`python -m fastconv`: the same as the console script."""

from fastconv.cli import main

main()
