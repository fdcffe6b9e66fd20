"""`python scripts/bench.py` is the command `jaxpipe bench`: the table of the README."""

import sys

from jaxpipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
