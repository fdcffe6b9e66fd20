"""Errors of Orbax that nobody asks about are not shown; those of others are."""

import asyncio
import gc
import logging

import pytest

from jaxpipe.checkpoint.quiet import hush

SOURCE = "def write():\n    raise OSError('no space')\n"


@pytest.mark.parametrize(("file", "shown"), [("/site-packages/orbax/checkpoint/path.py", 0), ("/home/me/path.py", 1)])
@pytest.mark.parametrize("as_task", [False, True])
def test_a_failure_that_nobody_asks_about(file, shown, as_task, caplog):
    hush()
    space: dict = {}
    exec(compile(SOURCE, file, "exec"), space)

    async def write():
        space["write"]()

    async def fail():
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(write()) if as_task else loop.run_in_executor(None, space["write"])
        await asyncio.wait([waiting])

    with caplog.at_level(logging.ERROR, "asyncio"):
        asyncio.run(fail())
        gc.collect()
    assert len([record for record in caplog.records if record.name == "asyncio"]) == shown
