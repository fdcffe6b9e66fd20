"""Strict settings for every test: 8 simulated CPU devices, and arrays of different rank never broadcast by accident."""

import gc
import os
from collections import Counter
from importlib.metadata import version

# Most programs run once or twice here: time goes into compiling them, which this makes three times as fast. Processes
# that tests start inherit it. A flag that XLA does not know ends the process, and the second is gone from 0.11.1 on.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest
from compile_once import compile_once, forget

jax.config.update("jax_platforms", "cpu")  # also where there are GPUs, or only the compiler for them (extra gpu-aot)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # starts JAX: a test that simulates fewer devices must not leave fewer to the tests after it
compile_once()
gc.set_threshold(50_000)  # JAX traces many small objects, which are not looked through as often


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the first case of each test and every tenth after it: all claims in a third of the time."""
    cases = Counter()
    for item in items:
        test = (item.path, item.cls, getattr(item, "originalname", item.name))
        if cases[test] % 10 == 0:
            item.add_marker(pytest.mark.sampled)
        cases[test] += 1


def pytest_runtest_logfinish():
    """After each test."""
    forget()
