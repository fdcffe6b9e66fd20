"""`python -m jaxpipe` is the command `jaxpipe`."""

import sys

from jaxpipe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
