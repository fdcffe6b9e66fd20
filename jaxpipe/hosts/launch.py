"""From a place to a running crew, and from a crew to JAX with the devices of all processes."""

from collections.abc import Callable

from jaxpipe.config.run import Config
from jaxpipe.errors import ConfigError
from jaxpipe.hosts.crew import FAILED, Crew
from jaxpipe.hosts.facts import facts_of
from jaxpipe.hosts.place import Place
from jaxpipe.hosts.roll_call import answer, gather


def join(
    place: Place,
    *,
    start_timeout_s: float = 300.0,
    silence_s: float = 60.0,
    exit_code: Callable[[BaseException], int] = lambda error: FAILED,
) -> Crew:
    """Waits for all processes of the run. JAX is not touched.

    Args:
        place: Which of them this is.
        start_timeout_s: How long the last may take to come.
        silence_s: A process of which nothing is heard for so long is lost, and all others end.
        exit_code: With which exit code all processes end for an error of one of them.

    Raises:
        ConfigError: Process 0 cannot listen, or the processes have places that do not fit together.
        LineError: Some did not come.
    """
    for name, value in (("--start-timeout", start_timeout_s), ("--silence-timeout", silence_s)):
        if value < 1:
            raise ConfigError(f"{name} {value:g} must be at least 1 second; try 60")
    lines, hosts = (gather if place.number == 0 else answer)(place, start_timeout_s)
    return Crew(place, lines, hosts, patience_s=start_timeout_s, silence_s=silence_s, exit_code=exit_code)


def start_jax(crew: Crew, config: Config, start_timeout_s: float = 300.0) -> None:
    """Checks that all processes are alike and starts JAX with the devices of all.

    Args:
        crew: From `join`.
        config: The run. Simulated devices are those of all processes together.
        start_timeout_s: How long JAX's own start may take.

    Raises:
        ConfigError: The simulated devices cannot be shared out, or JAX runs already.
    """
    import jax

    from jaxpipe.runtime.layout.mesh import simulate_devices

    place, simulate = crew.place, config.mesh.simulate
    crew.agree("the check of config and packages", facts_of(config))
    if simulate:
        if simulate % place.count:
            near = max(1, round(simulate / place.count)) * place.count
            raise ConfigError(
                f"mesh.simulate={simulate} must be divisible by the number of processes, {place.count}; try {near}"
            )
        simulate_devices(simulate // place.count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us; the crew agrees itself
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.number,
            local_device_ids=place.local_devices,
            coordinator_bind_address=_bind_address(place),
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(start_timeout_s)),
            heartbeat_timeout_seconds=max(100, int(2 * crew.silence_s)),  # then it aborts: the crew is to know sooner
            shutdown_timeout_seconds=60,
        )
    except RuntimeError as error:
        raise ConfigError(f"JAX cannot start with several processes: {error}; try a new process") from error


def _bind_address(place: Place) -> str | None:
    """Where JAX's service listens in process 0: at the interface where the processes came together."""
    host = place.interface()
    return (f"[{host}]:{place.port}" if ":" in host else f"{host}:{place.port}") if host else None
