"""Equal programs are compiled once per process.

JAX remembers what it compiled by the function that was traced; tests trace the same models again and again in new
functions, and get the same program. JAX's own cache on disk is no way out: CPU programs of several devices that come
from it can order their collectives differently and wait for each other for ever.
"""

import hashlib
from pathlib import Path

import jax

from jaxpipe import jax_internals

MAPPINGS = 30_000
"""Pieces of memory from which on programs are forgotten. Linux gives a process 65,530, and XLA dies without more."""

_MAPS = Path("/proc/self/maps")
made = {}


def forget() -> None:
    """Lets go of all programs, JAX's own memory of them included, where they are about to become too many."""
    if made and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > MAPPINGS:
        made.clear()
        jax.clear_caches()


def compile_once() -> None:
    """Makes JAX look for an equal program before it compiles one; it then gives out the very same executable."""
    compiler = jax_internals.compiler()
    compile_anew = compiler.backend_compile_and_load

    def compile_or_find(backend, module, devices, options, host_callbacks):
        text = module.operation.get_asm(enable_debug_info=False)
        if backend.platform != "cpu" or host_callbacks or "callback" in text:  # a callback is an address in the text
            return compile_anew(backend, module, devices, options, host_callbacks)
        key = hashlib.sha256(text.encode()).digest(), options.SerializeAsString(), tuple(devices)
        if key not in made:
            made[key] = compile_anew(backend, module, devices, options, host_callbacks)
        return made[key]

    compiler.backend_compile_and_load = compile_or_find
