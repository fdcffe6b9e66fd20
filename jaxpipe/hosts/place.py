"""Which process of how many this is, and where process 0 is: from options, or as JAX reads it off a cluster."""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxpipe.errors import ConfigError

TOKEN = "JAXPIPE_TOKEN"
"""The environment variable that has the secret."""


@dataclass(frozen=True)
class Place:
    """A process among those of a run.

    Attributes:
        address: ``host:port`` of process 0, reachable from all; the port is free there.
        count: Processes of the run.
        number: This one, 0 to ``count - 1``.
        local_devices: Which of the machine's accelerators are this process's; None means all that it sees.
        token: A secret that all processes of the run have, and nobody else; may be empty.
    """

    address: str
    count: int
    number: int
    local_devices: tuple[int, ...] | None = None
    token: str = field(default="", repr=False)

    @property
    def host(self) -> str:
        """Host part of the address; an IPv6 address without its brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Port part of the address."""
        return int(self.address.rpartition(":")[2])

    def interface(self) -> str:
        """The address at which process 0 listens on its machine; empty for all that it has.

        It is the one that `host` has there. All are taken where it has several or is none of the machine's, and where
        it is a name that stands for the machine's loopback, as some systems name themselves: others see it elsewhere.
        """
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)}
        except OSError:
            return ""
        own = sorted(filter(_is_own, found), key=lambda address: ":" in address)
        loopback = [address for address in own if ipaddress.ip_address(address.partition("%")[0]).is_loopback]
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return loopback[0] if loopback else ""
        if len(own) != 1 or (loopback and self.host not in found):
            return ""
        return own[0]


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = 300.0,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """Takes the place that is given, or asks the cluster: SLURM, Open MPI or Kubernetes, as JAX does.

    All three are given, or none. ``JAX_LOCAL_DEVICE_IDS=0,1`` picks accelerators in either case; without it SLURM and
    Open MPI give each process one, and everything else all. ``JAXPIPE_TOKEN`` is the secret of the run.

    Args:
        coordinator: ``host:port`` of process 0.
        num_processes: Processes of the run.
        process_id: Number of this one.
        timeout_s: How long the cluster may take to answer.
        environment: Of this process.

    Raises:
        ConfigError: Some of the three are missing or wrong, or no cluster is found.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return _detect(timeout_s, environment)
    if missing:
        have = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise ConfigError(
            f"{have} must come with {' and '.join(missing)}; give all three, or --distributed alone where SLURM, "
            "Open MPI or Kubernetes starts the processes"
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    token = environment.get(TOKEN, "")
    return _checked(Place(coordinator, num_processes, process_id, _device_ids(environment), token))


def _checked(place: Place) -> Place:
    if place.count < 1:
        raise ConfigError(f"--num-processes {place.count} must be at least 1; try 2")
    if not 0 <= place.number < place.count:
        near = min(max(place.number, 0), place.count - 1)
        raise ConfigError(
            f"--process-id {place.number} must be from 0 to {place.count - 1} for --num-processes {place.count}; "
            f"try {near}"
        )
    host, colon, port = place.address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        name = host if colon and host and not port.isdecimal() else place.address.strip(":") or "localhost"
        raise ConfigError(
            f"--coordinator {place.address!r} must have the form host:port with a port from 1 to 65535; "
            f"try {name.partition(':')[0]}:55527"
        )
    return place


def _device_ids(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    text = environment.get("JAX_LOCAL_DEVICE_IDS")
    if not text:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text):
        raise ConfigError(f"JAX_LOCAL_DEVICE_IDS={text!r} must be whole numbers with commas between; try 0,1")
    return tuple(map(int, text.split(",")))


def _detect(timeout_s: float, environment: Mapping[str, str]) -> Place:
    from jaxpipe.jax_internals import cluster_place

    try:
        address, count, number, devices = cluster_place(
            environment.get("JAX_COORDINATOR_ADDRESS"), _device_ids(environment), timeout_s
        )
    except Exception as error:  # of the cluster's client, which may be any
        text = " ".join(str(error).split())
        raise ConfigError(
            f"--distributed: the cluster's place for this process cannot be read ({text}); {_BY_HAND}"
        ) from error
    if address is None or count is None or number is None:
        raise ConfigError(
            f"--distributed: neither SLURM (srun), Open MPI (mpirun) nor Kubernetes started this process; {_BY_HAND}"
        )
    local = None if devices is None else tuple(devices)
    return _checked(Place(address, count, number, local, environment.get(TOKEN, "")))


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine's."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


_BY_HAND = "try --coordinator host:port --num-processes N --process-id I"
