"""The command `jaxpipe`: `main` joins one file for each of its commands.

    train is in `main` itself; `processes` its options for several processes
    config plan profile schedule          before a run
    eval checkpoint convert               after it
    generate serve                        with what was trained; `generator` the options that both have
    bench                                 how fast

Read `main` first.
"""

from jaxpipe.cli.main import main

__all__ = ["main"]
