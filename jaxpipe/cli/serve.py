"""`jaxpipe serve`: a model behind OpenAI's HTTP interface."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxpipe.cli import generator as cli_generator
from jaxpipe.errors import ConfigError

if TYPE_CHECKING:
    from jaxpipe.infer import Engine

DONE, FAILED = 0, 1
KEY = "JAXPIPE_API_KEY"
LAST_S = 10.0
"""How long the engine may take to end, once nobody waits for it."""
LOCAL = ("127.0.0.1", "::1", "localhost")

EXAMPLES = """examples:
  jaxpipe serve runs/quickstart
  jaxpipe serve gpt2/ --port 8080 --slots 32 --max-len 1024
  JAXPIPE_API_KEY=… jaxpipe serve llama/ --host 0.0.0.0 --pipe 8 --cache-dtype bfloat16
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "Once", "stream": true}'

exit codes: 0 stopped by a signal, all requests finished; 1 some were cut off, or the engine failed; 2 bad arguments or
no such model"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, with OpenAI's interface",
        description="Serves /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics until Ctrl-C or "
        "SIGTERM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli_generator.add_options(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, by default 127.0.0.1: only this machine"
    )
    parser.add_argument("--port", type=int, default=8000, help="by default 8000; 0 takes a free one")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        help=f"a key that requests must carry; better in ${KEY}, out of sight",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="without a key: a name that clients reach the server by, beside its addresses, localhost and --host",
    )
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it, by default the folder's name")
    size = parser.add_argument_group("sizes")
    size.add_argument("--slots", type=int, metavar="N", default=16, help="answers made at a time, by default 16")
    size.add_argument("--queue", type=int, metavar="N", default=256, help="answers that wait, by default 256; then 429")
    size.add_argument(
        "--max-len",
        type=int,
        metavar="N",
        help=f"tokens of prompt and answer, by default what the model holds, at most {cli_generator.MAX_LEN}",
    )
    limits = parser.add_argument_group("limits of a request")
    limits.add_argument("--max-prompt", type=int, metavar="N", default=0, help="tokens of a prompt")
    limits.add_argument("--max-new-tokens", type=int, metavar="N", default=0, help="tokens of an answer")
    limits.add_argument("--max-choices", type=int, metavar="N", default=16, help="answers, by default 16")
    limits.add_argument("--max-body", type=int, metavar="BYTES", default=4 << 20, help="by default 4 MiB")
    limits.add_argument(
        "--timeout", type=float, metavar="S", default=600.0, help="seconds for all of it, by default 600"
    )
    limits.add_argument(
        "--body-timeout", type=float, metavar="S", default=30.0, help="seconds for a body to arrive, by default 30"
    )
    limits.add_argument(
        "--head-timeout", type=float, metavar="S", default=10.0, help="and for what stands before it, by default 10"
    )
    limits.add_argument(
        "--prompt-timeout", type=float, metavar="S", default=30.0, help="and to make tokens of it, by default 30"
    )
    limits.add_argument(
        "--max-connections", type=int, metavar="N", default=1024, help="open at a time, by default 1024"
    )
    parser.add_argument(
        "--grace", type=float, metavar="S", default=30.0, help="seconds that requests have to finish when it is stopped"
    )
    parser.add_argument("--log-requests", action="store_true", help="a line for each request")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    keys = _check(options)
    from jaxpipe.serve import Auth, Limits, Server, Service, listen_on

    limits = Limits(
        body_bytes=options.max_body,
        prompt_tokens=options.max_prompt,
        new_tokens=options.max_new_tokens,
        choices=options.max_choices,
        requests=options.slots + options.queue,
        request_s=options.timeout,
        body_s=options.body_timeout,
        head_s=options.head_timeout,
        prompt_s=options.prompt_timeout,
        connections=options.max_connections,
    )
    with listen_on(options.host, options.port) as sock:  # before the model is loaded, which may take minutes
        loaded = cli_generator.load(options)
        max_len = options.max_len or min(getattr(loaded.cfg, "max_seq_len", 1024), cli_generator.MAX_LEN)
        generator = cli_generator.build(options, loaded, slots=options.slots, max_len=max_len)
        size = f"{generator.cache_bytes / 1e6:,.1f} MB per device"
        _note(f"cache      {generator.slots} answers of {max_len} tokens, {size}")
        from jaxpipe.infer import Engine

        with Engine(generator, loaded.tokenizer, queue=options.queue) as engine:
            _warm_up(engine)
            name = options.model_name or Path(options.model).resolve().name
            service = Service(
                engine, loaded.tokenizer, name, limits, loaded.tokenizer.stop_ids, generator.max_source_len
            )
            auth = Auth(keys, (options.host, *options.allow_host))
            server = Server(service, auth, sock, grace_s=options.grace, log_requests=options.log_requests, note=_note)
            cut_off = server.run()
            engine.close(drain=False, timeout_s=LAST_S)
            return FAILED if cut_off or engine.error is not None else DONE


def _warm_up(engine: "Engine"):
    """Compiles, so that the first request does not wait for it."""
    from jaxpipe.infer import Request, Sampling

    for _ in engine.submit(Request([0], Sampling(max_new_tokens=1))):
        pass


def _check(options: argparse.Namespace) -> tuple[str, ...]:
    """What nobody behind this door looks at; returns the keys."""
    least = {
        "slots": 1,
        "queue": 1,
        "max_len": 2,
        "max_prompt": 0,
        "max_new_tokens": 0,
        "max_choices": 1,
        "max_body": 1,
        "max_connections": 1,
    }
    cli_generator.check(options, port=0, **least)
    if options.port > 65535:
        raise ConfigError(f"--port {options.port} must be at most 65535; try 8000")
    for name in ("timeout", "body_timeout", "head_timeout", "prompt_timeout", "grace"):
        value, low = getattr(options, name), 0
        if not low <= value < float("inf") or (value == 0 and name != "grace"):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g} must be a number of seconds above 0; try 30")
    keys = tuple(options.api_key or filter(None, [os.environ.get(KEY)]))
    if not all(keys):
        raise ConfigError("--api-key '' must have at least 1 character; leave it out to ask for none")
    if not keys and options.host not in LOCAL:
        print(
            f"jaxpipe: warning: --host {options.host} without a key: all who reach it may use it; set {KEY}",
            file=sys.stderr,
        )
    return keys


def _note(text: str):
    print(text, flush=True)
