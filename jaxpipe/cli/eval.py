"""`jaxpipe eval`: how well a checkpoint predicts data that it was not trained on."""

import argparse
import json
from dataclasses import asdict

from jaxpipe.errors import ConfigError

EXAMPLES = """examples:
  jaxpipe eval runs/quickstart
  jaxpipe eval runs/quickstart/checkpoints/400 --data book.txt --json
  jaxpipe eval runs/quickstart mesh.pipe=2 train.batch_size=8

exit codes: 0 done, 2 bad arguments, no such checkpoint or a damaged one"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "eval",
        help="measure a checkpoint on held-out data",
        description="Prints loss, perplexity and bits per byte of a checkpoint on all of its validation data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder: then its newest")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes to its config, such as mesh.pipe=1")
    parser.add_argument("--data", nargs="+", metavar="FILE", default=[], help="measure on these instead")
    parser.add_argument("--batches", type=int, metavar="N", default=0, help="at most N batches; by default all")
    parser.add_argument(
        "--bytes-per-token", type=float, metavar="X", default=0.0, help="for data of token ids: to have bits per byte"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    for option in ("batches", "bytes_per_token"):
        if getattr(options, option) < 0:
            raise ConfigError(f"--{option.replace('_', '-')} {getattr(options, option)} must be at least 0; try 0")
    from jaxpipe.terminal import Silent, terminal_report
    from jaxpipe.train.evaluate import evaluate

    score = evaluate(
        options.checkpoint,
        options.overrides,
        data=options.data,
        batches=options.batches,
        bytes_per_token=options.bytes_per_token,
        report=Silent() if options.json else terminal_report(),
    )
    if options.json:
        print(json.dumps(asdict(score), indent=1))
        return 0
    print(f"checkpoint     {score.checkpoint}, step {score.step}")
    print(f"tokens         {score.tokens:,}")
    print(f"loss           {score.loss:.4f} nats per token")
    print(f"perplexity     {score.perplexity:.4f}")
    if score.bits_per_byte is not None:
        print(f"bits per byte  {score.bits_per_byte:.4f}")
    return 0
