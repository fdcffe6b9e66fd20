"""The names of JAX that may change without notice, all of them and nowhere else.

Traced programs are read and rewritten (`jaxpipe.runtime.stage.residuals`, `split`, `logical`), for which JAX has no
public interface. Whoever moves to a new JAX looks here first. Checked with jax 0.10.2, 0.11.0, 0.11.2 and 0.12.0.1.
From 0.12 on `Jaxpr` and `ClosedJaxpr` are two names of one class, a program that holds its constants.

What only a few users need is imported inside its function, so that a name that is gone breaks that one alone.
"""

from typing import Any

from jax.core import Tracer, eval_jaxpr
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    jaxpr_as_fun,
)
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Tracer",
    "Var",
    "cluster_place",
    "compiler",
    "cudnn_checks",
    "dce_jaxpr",
    "devices_are_in_use",
    "eval_jaxpr",
    "jaxlib_version",
    "jaxpr_as_fun",
    "scan_counts",
]


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's inputs come first as constants of the loop, and how many after them are carried.

    Read off the ranks, whatever the version calls them: a turn sees one dim less of what is scanned over or stacked.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loop(start, factor, rows):
        ...     return jax.lax.scan(lambda c, row: (c + factor * row, c), start, rows)
        >>> scan_counts(jax.make_jaxpr(loop)(jnp.zeros(3), jnp.ones(3), jnp.ones((4, 3))).jaxpr.eqns[-1])
        (1, 1)
    """
    body: Any = eqn.params["jaxpr"]
    body = body.jaxpr if isinstance(body, ClosedJaxpr) else body

    def alike(outer: Any, inner: Any) -> int:
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True))

    carried = alike(eqn.outvars, body.outvars)
    return alike(eqn.invars, body.invars) - carried, carried


def jaxlib_version() -> tuple[int, ...]:
    """The version of XLA that JAX brings."""
    from jaxlib.version import __version_info__

    return __version_info__


def devices_are_in_use() -> bool:
    """Whether JAX's devices have been touched, after which XLA's settings in the environment count for nothing."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def cluster_place(address: str | None, device_ids: tuple[int, ...] | None, timeout_s: float) -> tuple[Any, ...]:
    """What `jax.distributed.initialize` would find out about this process from SLURM, Open MPI or Kubernetes.

    Args:
        address: The coordinator's ``host:port`` where it is known.
        device_ids: The process's own devices on its host where they are known.
        timeout_s: Seconds to wait for the cluster's answer.

    Returns:
        ``(address, number of processes, number of this process, device ids)``, None for each that stays unknown.
    """
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(address, None, None, device_ids, None, int(timeout_s))


def compiler() -> Any:
    """The module whose ``backend_compile_and_load`` makes every executable: tests count and share them there."""
    from jax._src import compiler

    return compiler


def cudnn_checks() -> Any:
    """The module whose ``check_cudnn_version`` asks the present machine for its cuDNN, whatever is compiled for."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
