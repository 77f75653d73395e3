"""Entry point of `python -m fastconv`; the same as the console script `fastconv`."""

from fastconv.cli import main

main()
