"""Settings for GPUs: what is put into the environment, what is refused, and that CPUs are left alone."""

import os
import subprocess
import sys

import pytest

from jaxpipe.errors import ConfigError
from jaxpipe.runtime import gpu
from jaxpipe.runtime.gpu import FORBIDDEN, GpuOptions, set_gpu_options


@pytest.fixture
def fresh(monkeypatch):
    """As if there were GPUs, and JAX's devices had not been touched."""
    monkeypatch.setattr(gpu, "_has_gpus", lambda: True)
    monkeypatch.setattr(gpu, "devices_are_in_use", lambda: False)


def test_nothing_is_set_on_cpus():
    assert set_gpu_options(GpuOptions(collectives_in_flight=2), environment := {}) == ""
    assert environment == {}


@pytest.mark.usefixtures("fresh")
def test_the_defaults_set_the_memory_alone():
    line = set_gpu_options(GpuOptions(), environment := {})
    assert environment == {"XLA_CLIENT_MEM_FRACTION": "0.9"}
    assert line == "memory fraction 0.9, 1 collective in flight, command buffers default"


@pytest.mark.usefixtures("fresh")
def test_what_is_asked_for_is_added_and_shown():
    environment = {"XLA_FLAGS": "--xla_dump_to=/tmp/a", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    options = GpuOptions(collectives_in_flight=2, second_stream=True, command_buffers="loops")
    assert set_gpu_options(options, environment) == (
        "memory fraction 0.5, 2 collectives in flight, command buffers loops, second stream; "
        "from XLA_FLAGS --xla_dump_to=/tmp/a"
    )
    assert environment == {
        "XLA_FLAGS": "--xla_dump_to=/tmp/a --xla_gpu_experimental_parallel_collective_overlap_limit=2 "
        "--xla_gpu_enable_command_buffer=+CONDITIONAL,+WHILE",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }
    assert set_gpu_options(options, environment).startswith("memory fraction 0.5, 2 collectives")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("name", "harmless"), [(name, values) for name, (_, values) in FORBIDDEN.items()])
def test_flags_that_break_pipelines_are_refused(name, harmless):
    for text in (f"{name}=ENABLE", name):
        with pytest.raises(ConfigError, match=rf"XLA_FLAGS has {name}=(ENABLE|true), which .*; try without it"):
            set_gpu_options(GpuOptions(), {"XLA_FLAGS": text})
    for value in harmless:
        set_gpu_options(GpuOptions(), {"XLA_FLAGS": f"{name}={value}"})


@pytest.mark.usefixtures("fresh")
def test_two_wishes_for_one_flag_are_refused():
    environment = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=FUSION"}
    with pytest.raises(ConfigError, match=r"command_buffer=FUSION, but \[gpu\] asks for ''; try one of the two"):
        set_gpu_options(GpuOptions(command_buffers="off"), environment)


def test_too_late_is_told(monkeypatch):
    monkeypatch.setattr(gpu, "_has_gpus", lambda: True)
    assert set_gpu_options(GpuOptions(), environment := {}) == "as JAX was started"
    assert environment == {}
    with pytest.raises(ConfigError, match=r"\[gpu\] must be set before JAX starts"):
        set_gpu_options(GpuOptions(memory_fraction=0.5), {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_fraction": 0.0}, r"gpu\.memory_fraction=0\.0 must be above 0 and at most 1; try 0\.9"),
        ({"collectives_in_flight": 0}, r"gpu\.collectives_in_flight=0 must be from 1 to 8; try 1"),
        ({"command_buffers": "graphs"}, r"gpu\.command_buffers='graphs' must be 'default', 'off' or 'loops'"),
    ],
)
def test_wrong_options_are_told(wrong, message):
    with pytest.raises(ConfigError, match=message):
        GpuOptions(**wrong)


def test_xla_knows_every_flag():
    """XLA ends a process that names a flag which it does not know: this one lives, with all of them at once."""
    flags = GpuOptions(collectives_in_flight=2, command_buffers="loops").flags
    flags |= {name: harmless[0] for name, (_, harmless) in FORBIDDEN.items() if harmless}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(f"{k}={v}" for k, v in flags.items())}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices(); print('alive')"], env=environment)
    assert done.returncode == 0
