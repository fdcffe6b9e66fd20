"""`jaxpipe convert`: weights from Hugging Face in, and out again."""

import argparse
import re

from jaxpipe.errors import ConfigError

EXAMPLES = """examples:
  jaxpipe convert hf gpt2/ runs/gpt2                            a folder of Hugging Face to a checkpoint
  jaxpipe convert hf Llama-3.2-1B/ runs/llama --dtype bfloat16
  jaxpipe train configs/gpt2-finetune.toml init_from=runs/gpt2  and train on
  jaxpipe convert to-hf runs/gpt2-finetune gpt2-finetuned/      the newest checkpoint to a folder of Hugging Face

exit codes: 0 done, 2 bad arguments, or a folder that is damaged or none of ours"""

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "convert",
        help="take weights from Hugging Face, and hand them back",
        description="Converts between folders of Hugging Face (GPT-2, Llama, Mistral, Qwen2, Qwen3, T5; safetensors) "
        "and checkpoints, one array at a time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ways = parser.add_subparsers(required=True, metavar="WAY")
    here = ways.add_parser("hf", help="a folder of Hugging Face to a checkpoint", description="Makes a checkpoint.")
    here.add_argument("folder", metavar="DIR", help="with config.json and model.safetensors")
    here.add_argument("out", metavar="OUT", help="folder to make, like a run's")
    here.set_defaults(run=_from_hf)
    back = ways.add_parser("to-hf", help="a checkpoint to a folder of Hugging Face", description="Makes such a folder.")
    back.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run's folder: then its newest")
    back.add_argument("out", metavar="DIR", help="folder to make")
    back.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of one file; by default 5GB")
    back.add_argument("--tokenizer", metavar="DIR", help="folder whose tokenizer goes along; by default the run's")
    back.set_defaults(run=_to_hf)
    for way in (here, back):
        way.add_argument("--dtype", metavar="TYPE", help="to cast weights to; by default they stay what they are")


def size(text: str) -> int:
    """A size in bytes.

    Raises:
        ConfigError: It is none.

    Example:
        >>> size("500MB"), size("1.5 gb")
        (500000000, 1500000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?b)?", text.strip().lower())
    count = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    if count < 1:
        raise ConfigError(f"--max-shard-size {text!r} must be a size such as 500MB; try 5GB")
    return count


def _from_hf(options: argparse.Namespace) -> int:
    from jaxpipe.checkpoint.convert import from_hf
    from jaxpipe.terminal import terminal_report

    from_hf(options.folder, options.out, dtype=options.dtype, report=terminal_report())
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    max_shard_bytes = size(options.max_shard_size)
    from jaxpipe.checkpoint.convert import to_hf
    from jaxpipe.terminal import terminal_report

    to_hf(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=options.tokenizer,
        report=terminal_report(),
    )
    return 0
