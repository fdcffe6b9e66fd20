"""Starts the processes of one run on this machine: what a cluster does, for trying it out.

python scripts/launch_local.py --processes 2 --devices 4 -- train configs/quickstart.toml mesh.simulate=0 mesh.data=2

Everything after ``--`` is given to `jaxpipe` in every process. With ``--devices D`` each process has D simulated CPU
devices. Without it, accelerators are shared out: process I of N takes the I-th part of them, ``--gpus G`` in all.
Output lines are prefixed with the process. SIGINT and SIGTERM are passed on to all; when one process fails, the
others get a moment to end by themselves and are killed then. The exit code is the worst of all.
"""

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator

WORST_LAST = (0, 3, 2, 1)
"""Done, stopped early, bad input, failed; anything else, such as death by a signal, is worse."""
GLOO = ("[Gloo] Rank ", " is connected to ", " peer ranks. ", "Expected number of connected peer ranks is : ")
"""The pieces of a message, with numbers between them."""
TOKEN = secrets.token_hex(16)
"""By which the processes know each other."""
GRACE_S = 20.0
"""How long the others have to end when one has failed."""


def main() -> int:
    """Starts all, waits for all."""
    options = _options()
    port = options.port or _free_port()
    processes = [_start(options, number, port) for number in range(options.processes)]
    readers = [_pass_on_output(number, process) for number, process in enumerate(processes)]

    def pass_on(number: int, frame) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    code = _wait(processes)
    for reader in readers:
        reader.join(5.0)
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many to start")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--devices", type=int, metavar="D", help="simulated CPU devices in each process")
    share.add_argument("--gpus", type=int, metavar="G", help="GPUs of this machine, shared out evenly")
    parser.add_argument("--port", type=int, help="port of process 0; by default a free one")
    parser.add_argument("words", nargs="+", metavar="WORD", help="the command: train CONFIG key=value …")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes {options.processes} must be at least 1")
    if options.gpus and options.gpus % options.processes:
        parser.error(f"--gpus {options.gpus} must be divisible by --processes {options.processes}")
    if options.words[0] != "train":
        parser.error(f"{options.words[0]!r} is no command for several processes; try train")
    return options


def _start(options: argparse.Namespace, number: int, port: int) -> subprocess.Popen:
    environment = {"JAXPIPE_TOKEN": TOKEN, **os.environ, "PYTHONUNBUFFERED": "1"}
    if options.devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    if options.gpus:
        each = options.gpus // options.processes
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(number * each + gpu) for gpu in range(each))
    place = [f"--coordinator=localhost:{port}", f"--num-processes={options.processes}", f"--process-id={number}"]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxpipe", *options.words, *place],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes to us alone, and each gets it once, from us
    )


def _pass_on_output(number: int, process: subprocess.Popen) -> threading.Thread:
    def pass_on() -> None:
        assert process.stdout is not None
        for line in without_gloo(process.stdout):
            sys.stdout.write(f"[{number}] {line}")
            sys.stdout.flush()

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    return reader


def without_gloo(lines: Iterable[str]) -> Iterator[str]:
    """Lines without those in which Gloo says who is connected: one per device and collective, and nothing is wrong.

    Its threads write piece by piece, so that a message may end in a later line than it begins in.
    """
    open_ends = 0
    for line in lines:
        begun = line.count(GLOO[0])
        if begun or (open_ends and (any(piece in line for piece in GLOO) or _is_rest(line))):
            for piece in GLOO:
                line = line.replace(piece, "")
            open_ends += begun - _is_rest(line)  # else the line ends with what somebody else wrote in between
            if _is_rest(line):
                continue
        yield line


def _is_rest(line: str) -> bool:
    """Whether a line has nothing but a number, or not even that: all that is left of Gloo's without its words."""
    return not line.strip() or line.strip().isdigit()


def _wait(processes: list[subprocess.Popen]) -> int:
    """Waits for all; once one has failed, not for long. Returns the worst of their exit codes."""
    codes: dict[int, int] = {}
    first_failed = None
    while len(codes) < len(processes):
        for number, process in enumerate(processes):
            if number not in codes and process.poll() is not None:
                codes[number] = process.returncode
                if process.returncode < 0:
                    print(f"[{number}] was ended by {signal.Signals(-process.returncode).name}", flush=True)
                if process.returncode and first_failed is None:
                    first_failed = time.monotonic()
        if first_failed is not None and time.monotonic() - first_failed > GRACE_S:
            for number, process in enumerate(processes):
                if number not in codes:
                    print(f"[{number}] did not end within {GRACE_S:g} s of that: killed", flush=True)
                    process.kill()
                    process.wait()
        time.sleep(0.05)
    return max(codes.values(), key=lambda code: WORST_LAST.index(code) if code in WORST_LAST else len(WORST_LAST)) % 256


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
