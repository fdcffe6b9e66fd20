"""What a run leaves for people beside its numbers: a sample of text, the curve, the page."""

import numpy as np

from jaxpipe.checkpoint.folder import RunFolder
from jaxpipe.data.tokenizer import load_tokenizer
from jaxpipe.hosts.share import here
from jaxpipe.models.build import gpt_logits
from jaxpipe.terminal import Report
from jaxpipe.train.assemble import Assembly
from jaxpipe.train.report.metrics import MetricsLog, plot_loss
from jaxpipe.train.report.page import write_page
from jaxpipe.train.report.sample import continue_tokens
from jaxpipe.train.report.summary import Summary
from jaxpipe.train.step import TrainState


def sample_text(run: Assembly, state: TrainState, key) -> str:
    """Prompt and continuation; tokens that are no text, and control characters, become the replacement character."""
    config = run.config
    tokenizer = load_tokenizer(config.data.tokenizer)
    prompt = tokenizer.encode(config.sample.prompt)
    params = here(run.pipe.to_canonical(state.params), run.pipe.mesh)
    drawn = continue_tokens(
        lambda params, tokens: gpt_logits(config.model, params, tokens),
        params,
        np.array(prompt, np.int32),
        length=config.sample.length,
        window=config.train.seq_len,
        temperature=config.sample.temperature,
        key=key,
    )
    text = tokenizer.decode([*prompt, *(int(token) for token in drawn)])
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def draw(run: Assembly, log: MetricsLog, folder: RunFolder, report: Report, summary: Summary | None):
    """The curve and the page; a disk that is full does not hide how the run ended."""
    if not log.lines:
        return
    try:
        plot_loss(log.lines, folder.loss, unit=run.config.data.unit)
    except ImportError:
        report.note("loss.png   left out: matplotlib is missing; try pip install 'jaxpipe[viz]'")
    except OSError as error:
        report.note(f"loss.png   left out: {error}")
    try:
        write_page(folder.page, run, log.lines, summary)
    except OSError as error:
        report.note(f"report.html left out: {error}")
