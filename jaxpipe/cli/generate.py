"""`jaxpipe generate`: continues prompts with a model, through a pipeline."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpipe.cli import generator as cli_generator
from jaxpipe.errors import ConfigError
from jaxpipe.screen import for_text

if TYPE_CHECKING:
    from jaxpipe.infer import Handle, Sampling
    from jaxpipe.infer.load import Loaded

DONE = 0

EXAMPLES = """examples:
  jaxpipe generate runs/quickstart --prompt "def main(" --stream
  jaxpipe generate gpt2/ --prompt "Once" "Twice" --temperature 0.8 --top-p 0.95 --seed 1 -n 2 --json
  echo "Dear Sir" | jaxpipe generate gpt2/ --prompt - --max-new-tokens 200
  jaxpipe generate runs/quickstart --prompt "import " --simulate 4 --pipe 4

exit codes: 0 done, 2 bad arguments or no such model"""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the parser of `jaxpipe`."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts with a model",
        description="Writes how a model continues prompts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli_generator.add_options(parser)
    parser.add_argument(
        "--prompt", nargs="+", metavar="TEXT", default=[], help="what to continue; - reads it from stdin"
    )
    parser.add_argument("--prompt-file", nargs="+", metavar="FILE", default=[], help="or whole files of text")
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template, as the user's")
    parser.add_argument("-n", type=int, metavar="N", default=1, help="answers per prompt, by default 1")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", default=64, help="by default 64")
    parser.add_argument("--stop", nargs="+", metavar="TEXT", default=[], help="texts that end an answer")
    sampling = parser.add_argument_group("sampling", "by default the likeliest token is taken")
    sampling.add_argument("--temperature", type=float, metavar="X", default=0.0)
    sampling.add_argument("--top-k", type=int, metavar="K", default=0)
    sampling.add_argument("--top-p", type=float, metavar="X", default=1.0)
    sampling.add_argument("--min-p", type=float, metavar="X", default=0.0)
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", default=1.0)
    sampling.add_argument("--seed", type=int, metavar="N", default=0)
    parser.add_argument("--stream", action="store_true", help="write the text while it is made")
    parser.add_argument("--logprobs", action="store_true", help="with --json: log-probabilities of the tokens")
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command. Every wrong input is a `JaxpipeError`."""
    _check(options)
    texts = _texts(options)
    if options.stream and len(texts) * options.n > 1:
        raise ConfigError(f"--stream writes one answer but {len(texts) * options.n} are asked for; leave it out")
    loaded = cli_generator.load(options)
    prompts = [_encode(text, options.chat, loaded) for text in texts]
    _answer(options, loaded, texts, prompts)
    return DONE


def _answer(options: argparse.Namespace, loaded: "Loaded", texts: list[str], prompts: list[list[int]]):
    from jaxpipe.infer import Engine, Request
    from jaxpipe.infer.model import decoder_of

    asked = [(place, number) for place in range(len(prompts)) for number in range(options.n)]
    longest, new = max(map(len, prompts)), options.max_new_tokens
    decoder = decoder_of(loaded.cfg)
    most = None if decoder.longest is None else decoder.longest - longest
    if most is not None and new > most:
        near = f"try {most}" if most > 0 else "shorten the prompt"
        raise ConfigError(
            f"--max-new-tokens {new} and a prompt of {longest} tokens exceed the model's {decoder.longest}; {near}"
        )
    lengths = {"max_len": longest + new} if decoder.encoder is None else {"max_len": new + 1, "max_source_len": longest}
    generator = cli_generator.build(options, loaded, slots=len(asked), **lengths)
    engine = Engine(generator, loaded.tokenizer, queue=len(asked))
    try:
        stop = tuple(options.stop)
        handles = [engine.submit(Request(prompts[p], _sampling(options, loaded, n), stop=stop)) for p, n in asked]
        if options.stream:
            _stream(handles[0])
            return
        answers = [_collect(handle, texts[p], n) for handle, (p, n) in zip(handles, asked, strict=True)]
    finally:
        engine.close(drain=False)
    if options.json:
        print(json.dumps(answers, indent=1))
        return
    for answer in answers:
        if len(answers) > 1:
            print(f"--- {answer['prompt'][:40]!r}, answer {answer['index'] + 1} of {options.n} ---")
        print(answer["text"], file=for_text(sys.stdout))


def _stream(handle: "Handle"):
    for piece in handle:
        print(piece.text, end="", flush=True, file=for_text(sys.stdout))
    print()


def _collect(handle: "Handle", prompt: str, index: int) -> dict[str, Any]:
    pieces = list(handle)
    tokens = [piece.token for piece in pieces if piece.token is not None]
    logprobs = [piece.logprob for piece in pieces if piece.logprob is not None]
    return {
        "prompt": prompt,
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": pieces[-1].finish_reason,
        "tokens": tokens,
        **({"logprobs": logprobs} if logprobs else {}),
    }


def _check(options: argparse.Namespace):
    cli_generator.check(options, n=1, max_new_tokens=1)
    if not options.prompt and not options.prompt_file:
        raise ConfigError("there is nothing to continue; try --prompt TEXT or --prompt -")
    if options.json and options.stream:
        raise ConfigError("--stream has no effect with --json; leave one of them out")
    if options.logprobs and not options.json:
        raise ConfigError("--logprobs has no effect without --json; try --logprobs --json")


def _texts(options: argparse.Namespace) -> list[str]:
    texts = []
    for text in options.prompt:
        texts.append(_decode("standard input", sys.stdin.buffer.read()) if text == "-" else text)
    for name in options.prompt_file:
        try:
            texts.append(_decode(f"--prompt-file {name}", Path(name).read_bytes()))
        except OSError as error:
            raise ConfigError(f"--prompt-file {name!r} cannot be read: {error.strerror}") from error
    return texts


def _decode(what: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} must be UTF-8 but byte {error.start} is not") from error


def _encode(text: str, chat: bool, loaded: "Loaded") -> list[int]:
    told = loaded.tokenizer.chat([{"role": "user", "content": text}]) if chat else None
    if chat and told is None:
        raise ConfigError("--chat: this model has no chat template; leave it out")
    tokens = loaded.tokenizer.encode(text) if told is None else loaded.tokenizer.pieces(told)
    if not tokens:
        raise ConfigError("a prompt must hold at least 1 token but is empty")
    return tokens


def _sampling(options: argparse.Namespace, loaded: "Loaded", number: int) -> "Sampling":
    from jaxpipe.infer import Sampling

    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=(options.seed + number) % 2**32,
        max_new_tokens=options.max_new_tokens,
        stop_token_ids=loaded.tokenizer.stop_ids,
        logprobs=options.logprobs,
    )
