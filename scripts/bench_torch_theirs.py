"""torch's processes of `bench_torch.py`: one rank of `torch.distributed.pipelining`, or the step on one core.

Needs only torch and files of this folder, so that it may run under another interpreter. The model is
`jaxpipe.models.gpt`'s, with its parameters and its batch, written as one would for torch.

Shape legend: B rows, T positions, H heads, d dims per head, D = H*d.
"""

import json
import os
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import torch.distributed as dist  # pyright: ignore[reportMissingImports]
from bench_workers import serve
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.distributed import pipelining  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
}


def main() -> None:
    """Arguments: a JSON object, and the file descriptor to serve on."""
    options = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {options["core"]})
    torch.set_num_threads(1)
    num_heads = options["case"]["num_heads"]
    if "rank" in options:
        serve(int(sys.argv[2]), lambda: Rank(num_heads, options["meet"], options["ranks"], options["rank"]).answers)
    else:
        serve(int(sys.argv[2]), lambda: OneCore(num_heads).answers)


class Rank:
    """One process of the pipeline."""

    def __init__(self, num_heads: int, meet: str, ranks: int, rank: int):
        dist.init_process_group("gloo", init_method=f"file://{meet}", world_size=ranks, rank=rank)
        self.num_heads, self.ranks, self.rank = num_heads, ranks, rank
        self.steps = {}
        self.answers = {"build": self.build, "step": self.step}

    def build(self, name: str, schedule: str, repeats: int, microbatches: int, arrays: dict) -> dict:
        """Makes the step, runs it once, and says what it computes."""
        tensors = _tensors(arrays)
        last = self.ranks * repeats - 1
        mine = range(self.rank, last + 1, self.ranks)
        modules = [Stage(tensors, self.num_heads, stage, last + 1) for stage in mine]
        stages = [
            pipelining.PipelineStage(m, i, last + 1, torch.device("cpu")) for m, i in zip(modules, mine, strict=True)
        ]
        kind = SCHEDULES[schedule]
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        runs = kind(stages[0] if single else stages, n_microbatches=microbatches, loss_fn=_loss)
        args = (tensors["tokens"],) if 0 in mine else ()
        target = tensors["targets"] if last in mine else None
        parameters = [p for module in modules for p in module.parameters()]

        def step():
            for p in parameters:
                p.grad = None
            losses = []
            runs.step(*args, target=target, losses=losses, return_outputs=False)
            return losses

        self.steps[name] = step
        losses = step()
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        squares = torch.stack([loss, _square(parameters)])
        dist.all_reduce(squares)
        return {"loss": squares[0].item(), "grad_norm": squares[1].sqrt().item()}

    def step(self, name: str) -> dict:
        """Times one step."""
        return _time(self.steps[name])


class OneCore:
    """Gradient accumulation over the microbatches with no pipeline."""

    def __init__(self, num_heads: int):
        self.num_heads = num_heads
        self.answers = {"build": self.build, "step": self.step}

    def build(self, microbatches: int, arrays: dict) -> dict:
        """Makes the step, runs it once, and says what it computes."""
        tensors = _tensors(arrays)
        self.model = Stage(tensors, self.num_heads, 0, 1)
        self.groups = [tensors[name].chunk(microbatches) for name in ("tokens", "targets")]
        loss = self.run()
        return {"loss": loss.item(), "grad_norm": _square(list(self.model.parameters())).sqrt().item()}

    def run(self):
        """One step: the mean loss."""
        for p in self.model.parameters():
            p.grad = None
        losses = []
        for tokens, targets in zip(*self.groups, strict=True):
            loss = _loss(self.model(tokens), targets) / len(self.groups[0])
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def step(self) -> dict:
        """Times one step."""
        return _time(self.run)


class Stage(nn.Module):
    """A run of blocks; the first has the embedding, the last the head."""

    def __init__(self, tensors: dict, num_heads: int, stage: int, num_stages: int):
        super().__init__()
        blocks = {name: x for name, x in tensors.items() if name.startswith("blocks/block/")}
        num_layers = len(next(iter(blocks.values())))
        per_stage = num_layers // num_stages
        here = range(stage * per_stage, (stage + 1) * per_stage)
        self.table = self.positions = self.norm = self.kernel = None
        if stage == 0:
            self.table = nn.Parameter(tensors["embed/table"].clone())
            self.positions = nn.Parameter(tensors["embed/positions"].clone())
        self.blocks = nn.ModuleList(
            Block({name.removeprefix("blocks/block/"): x[i] for name, x in blocks.items()}, num_heads) for i in here
        )
        if stage == num_stages - 1:
            self.norm = _norm(tensors, "head/norm")
            self.kernel = nn.Parameter(tensors["head/kernel"].clone())

    def forward(self, x):
        """Tokens or activations in; activations or logits out."""
        if self.table is not None and self.positions is not None:
            x = F.embedding(x, self.table) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None else F.linear(self.norm(x), self.kernel)


class Block(nn.Module):
    """One pre-norm layer: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, tensors: dict, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = _norm(tensors, "norm1"), _norm(tensors, "norm2")
        self.qkv, self.proj = _linear(tensors, "attn/qkv"), _linear(tensors, "attn/proj")
        self.fc, self.out = _linear(tensors, "mlp/fc"), _linear(tensors, "mlp/proj")

    def forward(self, x):
        """[B, T, D] -> [B, T, D]."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, self.num_heads, 3, D // self.num_heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [B, H, T, d]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.out(F.gelu(self.fc(self.norm2(x)), approximate="tanh"))


def _norm(tensors: dict, name: str):
    scale, bias = tensors[f"{name}/scale"], tensors[f"{name}/bias"]
    norm = nn.LayerNorm(len(scale), eps=1e-5)
    norm.load_state_dict({"weight": scale, "bias": bias})
    return norm


def _linear(tensors: dict, name: str):
    kernel, bias = tensors[f"{name}/kernel"], tensors[f"{name}/bias"]
    linear = nn.Linear(*kernel.shape)
    linear.load_state_dict({"weight": kernel.T, "bias": bias})
    return linear


def _tensors(arrays: dict) -> dict:
    """Tensors of ``{name: (dtype, shape, bytes)}``; integers become int64, torch's own kind of index."""
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)
        for name, (dtype, shape, data) in arrays.items()
    }
    return {name: x if x.is_floating_point() else x.long() for name, x in tensors.items()}


def _loss(logits, targets):
    """The mean over the microbatch's tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _square(parameters: list):
    return torch.stack([p.grad.square().sum() for p in parameters]).sum()


def _time(function) -> dict:
    start, cpu = time.perf_counter(), time.process_time()
    function()
    return {"time_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    main()
