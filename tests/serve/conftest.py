"""A server on an engine that only echoes, shared by the tests of a file."""

import pytest
from fake_engine import Bytes, FakeEngine
from serving import serving

from jaxpipe.serve import Limits


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine(max_len=256)
    limits = Limits(body_bytes=100_000, prompt_tokens=100, new_tokens=120, choices=8)
    with serving(engine, Bytes(), limits=limits) as served:
        yield served
    engine.close()


@pytest.fixture(scope="module")
def http(served):
    with served.http() as http:
        yield http
