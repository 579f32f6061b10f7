"""`python -m spmd`: see `python -m spmd --help`."""

import sys

from spmd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
