"""The sections of a run's config, one frozen dataclass each: their keys, defaults and own rules.

The defaults are here and nowhere else. What sections must agree on is checked by `jaxpipe.config.run`; what a
schedule, a mesh or a pipeline demands is checked by those. Paths are relative to the working directory.
"""

from dataclasses import dataclass
from typing import Literal

from jaxpipe.errors import ConfigError

Remat = Literal["full", "none", "all"]


@dataclass(frozen=True)
class DataConfig:
    """Section `[data]`: where tokens come from.

    Attributes:
        source: ``stdlib``: the Python files of the running interpreter's standard library; ``text``: text files.
            ``tokens``: files of token ids, without a header, of `numpy.save` or of llm.c. Text files may be JSON lines.
        train: Paths or globs of the training files (``text`` and ``tokens``).
        val: Paths or globs of the validation files. Empty: a part of the training data is held out.
        val_fraction: How much is held out: of the files for ``stdlib``, else of the tokens, at the end.
        dtype: Integer type of ``tokens`` files without a header, little-endian.
        tokenizer: Folder with a tokenizer.json that makes tokens of text; empty: one token per byte. With ``tokens``:
            the one that made them, for samples and bits per byte (extra ``hf``).
    """

    source: Literal["stdlib", "text", "tokens"] = "stdlib"
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    val_fraction: float = 0.1
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    tokenizer: str = ""

    @property
    def unit(self) -> str:
        """What a token is, for people."""
        return "token" if self.source == "tokens" or self.tokenizer else "byte"

    def __post_init__(self):
        if self.source == "stdlib" and (self.train or self.val):
            raise ConfigError('data.train and data.val must be empty for data.source="stdlib"; try data.source="text"')
        if self.source != "stdlib" and not self.train:
            raise ConfigError(f'data.train=[] must name at least one file for data.source="{self.source}"')
        if not 0.0 < self.val_fraction < 1.0:
            raise ConfigError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1; try 0.1")


@dataclass(frozen=True)
class MeshConfig:
    """Section `[mesh]`: devices per mesh axis.

    Attributes:
        pipe: Devices on the pipeline axis, P.
        data: Copies of the pipeline that share the batch.
        fsdp: Devices that share the batch too, and among them what `shard` says.
        tensor: Devices that share each matrix product; it must divide the model's `num_heads`.
        shard: ``params``: weights, gradients and optimizer state lie cut over `fsdp`. ``optimizer``: weights rest whole
            (ZeRO-1).
        simulate: Run on this many simulated CPU devices; 0 means real devices.
    """

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    shard: Literal["params", "optimizer"] = "params"
    simulate: int = 0

    def __post_init__(self):
        _at_least(self, "mesh", 1, "pipe", "data", "fsdp", "tensor")
        _at_least(self, "mesh", 0, "simulate")


@dataclass(frozen=True)
class ScheduleConfig:
    """Section `[schedule]`: who computes what when.

    Attributes:
        name: A schedule of the catalogue. ``auto``: the planner takes the fastest that fits, with its repeats.
        repeats: Stages per device, V.
        microbatches: Slices of the batch, M.
        stages: Blocks per stage, in stage order: a list of numbers, or a layout string such as ``"Et*3|(tt|)*2tL"``
            (see `jaxpipe.schedule.stages`). Empty: the same number for all. ``"even"``: any number of blocks, as evenly
            as it goes. ``"auto"``: the planner splits them, so that no stage is much dearer than another.
        remat: ``full`` keeps only each stage's input, ``none`` recomputes no matrix product, ``all`` keeps everything.
            Or a list of these, one per stage.
        scan_blocks: Loop over the blocks of a stage instead of unrolling them: compiles faster where stages are deep.
            Not with schedules that split backwards.
        head: ``last``: the last stage computes the loss alone. ``vocab_parallel``: all devices do, each for its part of
            the vocabulary.
        idle: ``skip``: idle lanes compute nothing. ``mask``: they compute and discard.
        packing: How actions share a tick; ``auto`` takes the cheaper.
        memory: ``ideal`` takes the fastest ticks, ``strict`` keeps the schedule's own bound on activations.
        profile: What `jaxpipe profile` measured, for ``auto`` and for the prediction of a step. Empty: formulae.
    """

    name: str = "interleaved_1f1b"
    repeats: int = 1
    microbatches: int = 8
    stages: tuple[int, ...] | str = ""
    remat: Remat | tuple[Remat, ...] = "full"
    scan_blocks: bool = False
    head: Literal["last", "vocab_parallel"] = "last"
    idle: Literal["skip", "mask"] = "skip"
    packing: Literal["auto", "paired", "single"] = "auto"
    memory: Literal["ideal", "strict"] = "ideal"
    profile: str = ""

    def __post_init__(self):
        _at_least(self, "schedule", 1, "repeats", "microbatches")
        if not isinstance(self.stages, str) and min(self.stages, default=0) < 0:
            near = [max(0, count) for count in self.stages]
            raise ConfigError(f"schedule.stages={list(self.stages)} must hold numbers of at least 0; try {near}")


@dataclass(frozen=True)
class OptimConfig:
    """Section `[optim]`: AdamW with a linear warm-up, then a cosine decay that ends with the run.

    Attributes:
        learning_rate: The highest, reached after the warm-up.
        final_learning_rate: The last.
        warmup_steps: Steps from zero to the highest.
        weight_decay: Decoupled decay of arrays with two or more dims; vectors and scalars do not decay.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip_norm: Longest global norm a gradient may have; 0 means no clipping.
    """

    learning_rate: float = 6e-4
    final_learning_rate: float = 6e-5
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self):
        _at_least(self, "optim", 0, "learning_rate", "final_learning_rate", "warmup_steps", "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be at least 0 and below 1; try 0.9")
        if self.eps <= 0.0:
            raise ConfigError(f"optim.eps={self.eps} must be above 0; try 1e-8")


@dataclass(frozen=True)
class TrainConfig:
    """Section `[train]`: how long, how much at once, what to write where.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences per step, over all devices.
        seq_len: Tokens per sequence.
        loss_scale: What backwards start from instead of 1; gradients are divided by it again. For
            ``model.dtype="float16"``, whose small gradients are lost otherwise: start with 128, and with less where
            gradients are not finite. Powers of two round nothing. All other dtypes need none.
        seed: Seed of weights, data order and dropout.
        eval_every: Steps between two measurements of the validation loss; 0 measures only the first and last.
        eval_batches: Batches per measurement, always the same ones.
        log_every: Steps between two lines of metrics.
        out: Folder that takes metrics, plots, checkpoints and the resolved config.
        overwrite: Replace what an earlier run left in `out`, its checkpoints included.
    """

    steps: int = 1000
    batch_size: int = 32
    seq_len: int = 256
    loss_scale: float = 1.0
    seed: int = 0
    eval_every: int = 100
    eval_batches: int = 8
    log_every: int = 10
    out: str = "runs/train"
    overwrite: bool = False

    def __post_init__(self):
        _at_least(self, "train", 1, "steps", "batch_size", "seq_len", "eval_batches", "log_every")
        _at_least(self, "train", 0, "seed", "eval_every")
        if self.loss_scale <= 0.0:
            raise ConfigError(f"train.loss_scale={self.loss_scale} must be above 0; try 1.0")


@dataclass(frozen=True)
class SampleConfig:
    """Section `[sample]`: text continued from a prompt at the end of the run.

    Attributes:
        prompt: What to continue.
        length: Tokens to write; 0 means no sample.
        temperature: Divides the logits; 0 takes the likeliest token.
    """

    prompt: str = "def "
    length: int = 0
    temperature: float = 0.8

    def __post_init__(self):
        _at_least(self, "sample", 0, "length", "temperature")
        if not self.prompt:
            raise ConfigError('sample.prompt="" must hold at least one byte; try "def "')


@dataclass(frozen=True)
class CheckpointConfig:
    """Section `[checkpoint]`: when the run is saved, and what it starts from.

    Besides, the run is saved at its end and when a signal stops it.

    Attributes:
        enabled: Save at all.
        dir: Folder of the checkpoints, on a disk or any path that Orbax takes, such as ``gs://…``; empty means
            ``checkpoints`` in `train.out`.
        every_steps: Steps between two saves; 0 means none by steps.
        every_minutes: Minutes between two saves; 0 means none by time.
        keep: How many of the newest checkpoints stay.
        keep_best: How many of those with the lowest validation loss stay besides.
        resume: ``auto`` goes on where the run in `train.out` stopped, if there is one; ``never`` starts over (see
            `train.overwrite`). Else a checkpoint, or a run's folder, to start from.
        init_from: A checkpoint, or a run's folder, whose weights a new run starts with.
        allow_new_data: Go on although the data, or their order, are not those of the checkpoint, with their first
            batch.
        grace_s: Seconds that a stopped run has for its last step and its save; 0 means no limit.
    """

    enabled: bool = True
    dir: str = ""
    every_steps: int = 0
    every_minutes: float = 10.0
    keep: int = 3
    keep_best: int = 1
    resume: str = "auto"
    init_from: str = ""
    allow_new_data: bool = False
    grace_s: float = 0.0

    def __post_init__(self):
        _at_least(self, "checkpoint", 0, "every_steps", "every_minutes", "keep_best", "grace_s")
        _at_least(self, "checkpoint", 1, "keep")
        if not self.resume:
            raise ConfigError('checkpoint.resume="" must be "auto", "never" or a checkpoint; try "auto"')
        if self.init_from and self.resume not in ("auto", "never"):
            raise ConfigError(
                f"checkpoint.init_from={self.init_from!r} and checkpoint.resume={self.resume!r} name two starts; "
                "leave one out"
            )


@dataclass(frozen=True)
class HealthConfig:
    """Section `[health]`: what happens when numbers go wrong.

    Attributes:
        nonfinite: When loss or gradient are not finite: ``stop`` fails; ``skip`` leaves weights and optimizer as they
            are; ``rollback`` goes back to the last checkpoint and skips the data since.
        max_skips: Steps in a row that ``skip`` may leave out before the run fails.
        max_rollbacks: How often ``rollback`` may go back before the run fails.
        spike: A loss this many standard deviations above the mean of the last 64 is logged as a spike; 0 means none is.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    max_skips: int = 10
    max_rollbacks: int = 3
    spike: float = 6.0

    def __post_init__(self):
        _at_least(self, "health", 1, "max_skips", "max_rollbacks")
        _at_least(self, "health", 0, "spike")


@dataclass(frozen=True)
class WatchdogConfig:
    """Section `[watchdog]`: a run that hangs ends itself, so that whoever started it can start it again.

    Attributes:
        timeout_s: Seconds without a finished step after which the run ends with exit code 1, once stacks of all threads
            and the state of the devices are in ``watchdog.log``; 0 means never. Saves and measurements are progress.
    """

    timeout_s: float = 1800.0

    def __post_init__(self):
        _at_least(self, "watchdog", 0, "timeout_s")


@dataclass(frozen=True)
class MetricsConfig:
    """Section `[metrics]`: who gets the numbers besides ``metrics.jsonl``.

    Attributes:
        tensorboard: Write event files into ``tensorboard`` in `train.out` (extra ``tensorboard``).
        wandb: Send them to Weights & Biases (extra ``wandb``).
        wandb_project: The project there.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "jaxpipe"


def _at_least(section, prefix: str, least: int, *names: str):
    for name in names:
        if getattr(section, name) < least:
            raise ConfigError(f"{prefix}.{name}={getattr(section, name)} must be at least {least}; try {least}")
