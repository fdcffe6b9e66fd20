"""The planner against published steps: the ten models of Megatron-LM's table 1 on A100s.

    python scripts/planner_published.py                       # the table, at the A100's efficiency in plan/device.py
    python scripts/planner_published.py --fit                 # the one number that fits all ten rows best
    python scripts/planner_published.py --plot docs/images/planner_published.png

Models, devices, batch and achieved TFLOP/s per GPU: Narayanan et al. 2021, "Efficient Large-Scale Language Model
Training on GPU Clusters Using Megatron-LM" (SC21, arXiv 2104.04473), table 1. Microbatch sizes and stages per device:
the scripts that the authors published for that table (Megatron-LM, examples/sc21/run_table_1.sh). A step's operations
are counted by the paper's own formula, with the forward that is run again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxpipe.plan import (
    Attention,
    BlockShape,
    DeviceSpec,
    Mlp,
    ModelShape,
    Plan,
    Problem,
    Space,
    analytic,
    find_device,
)
from jaxpipe.plan.search import search

VOCAB, SEQ_LEN = 51200, 2048


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Parameters as the paper rounds them.
        heads: Attention heads.
        width: Hidden size.
        layers: Blocks.
        tensor: Tensor-parallel devices.
        pipe: Pipeline-parallel devices.
        gpus: All devices.
        batch: Rows of a step.
        tflops: Achieved TFLOP/s per GPU.
        rows: Rows of a microbatch.
        repeats: Stages per device.
    """

    name: str
    heads: int
    width: int
    layers: int
    tensor: int
    pipe: int
    gpus: int
    batch: int
    tflops: float
    rows: int
    repeats: int

    @property
    def shape(self) -> ModelShape:
        """The model."""
        attention = Attention(SEQ_LEN, SEQ_LEN, self.heads, self.width // self.heads)
        block = BlockShape("block", self.width, SEQ_LEN, (attention,), Mlp(4 * self.width))
        return ModelShape(
            kinds=("block",) * self.layers,
            blocks={"block": block},
            width=self.width,
            vocab=VOCAB,
            carry_tokens=SEQ_LEN,
            head_tokens=SEQ_LEN,
            seq_len=SEQ_LEN,
            embed_params=(VOCAB + SEQ_LEN) * self.width,
            head_params=2 * self.width,
            tied=True,
            dtype="float16",
            param_dtype="float32",
            fields={},
        )

    @property
    def flops(self) -> float:
        """Operations of a step by the paper's formula (its section 5.1)."""
        b, s, l, h = self.batch, SEQ_LEN, self.layers, self.width
        return 96 * b * s * l * h * h * (1 + s / (6 * h) + VOCAB / (16 * l * h))


TABLE = (
    Row("1.7B", 24, 2304, 24, 1, 1, 32, 512, 137, 16, 1),
    Row("3.6B", 32, 3072, 30, 2, 1, 64, 512, 138, 16, 1),
    Row("7.5B", 32, 4096, 36, 4, 1, 128, 512, 142, 16, 1),
    Row("18.4B", 48, 6144, 40, 8, 1, 256, 1024, 135, 8, 1),
    Row("39.1B", 64, 8192, 48, 8, 2, 512, 1536, 138, 4, 1),
    Row("76.1B", 80, 10240, 60, 8, 4, 1024, 1792, 140, 2, 3),
    Row("145.6B", 96, 12288, 80, 8, 8, 1536, 2304, 148, 2, 2),
    Row("310.1B", 128, 16384, 96, 8, 16, 1920, 2160, 155, 1, 2),
    Row("529.6B", 128, 20480, 105, 8, 35, 2520, 2520, 163, 1, 3),
    Row("1008B", 160, 25600, 128, 8, 64, 3072, 3072, 163, 1, 1),
)


def predict(row: Row, device: DeviceSpec) -> Plan:
    """What the planner makes of a row: everything given, nothing to choose."""
    shape = row.shape
    data = row.gpus // (row.pipe * row.tensor)
    space = Space(
        schedules=("interleaved_1f1b",) if row.repeats > 1 else ("1f1b",),
        pipe=(row.pipe,),
        repeats=(row.repeats,),
        tensor=(row.tensor,),
        fsdp=(1,),
        data=(data,),
        rows=(row.rows,),
        remats=("full",),
        split="equal",
        packing="auto",
        order="ideal",
    )
    problem = Problem(
        shape=shape,
        device=device,
        devices=row.gpus,
        batch=row.batch,
        costs=lambda rows, tensor: analytic(shape, device, rows=rows, tensor=tensor),
        space=space,
        memory_bytes=float("inf"),
    )
    best = search(problem, pareto=False).best
    assert best is not None
    return best


def tflops(row: Row, plan: Plan) -> float:
    """TFLOP/s per GPU as the paper counts them."""
    return row.flops / plan.step_s / row.gpus / 1e12


def errors(device: DeviceSpec) -> list[float]:
    """Predicted over published, less one, of every row."""
    return [tflops(row, predict(row, device)) / row.tflops - 1 for row in TABLE]


def fit(device: DeviceSpec) -> float:
    """The efficiency with the least mean square of the errors, by bisection on three places."""
    grid = [k / 200 for k in range(80, 181)]
    return min(grid, key=lambda e: sum(error**2 for error in errors(replace(device, efficiency=e))))


def plot(device: DeviceSpec, path: Path) -> None:
    """Predicted against published TFLOP/s per GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: Sequence[float] = [tflops(row, predict(row, device)) for row in TABLE]
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    at = range(len(TABLE))
    axes.bar([x - 0.2 for x in at], [row.tflops for row in TABLE], 0.4, label="published", color="#8da0b3")
    axes.bar([x + 0.2 for x in at], found, 0.4, label="predicted", color="#d9822b")
    for x, row, value in zip(at, TABLE, found, strict=True):
        axes.text(x + 0.2, value + 2, f"{value / row.tflops - 1:+.0%}", ha="center", fontsize=8)
    axes.set_xticks(list(at), [f"{row.name}\n{row.gpus} GPUs" for row in TABLE], fontsize=8)
    axes.set_ylabel("TFLOP/s per GPU")
    axes.set_ylim(0, 200)
    axes.set_title(f"Megatron-LM, SC21, table 1, on A100s; efficiency {device.efficiency} for all rows", fontsize=10)
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Prints the table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="find the efficiency that fits best, and use it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted and published")
    options: Any = parser.parse_args()
    device = find_device("a100")
    if options.fit:
        device = replace(device, efficiency=fit(device))
    print(f"efficiency {device.efficiency:.3f}\n")
    print("| model | GPUs | TP | P | V | microbatch | published TFLOP/s | predicted | error | bubble |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in TABLE:
        plan = predict(row, device)
        value = tflops(row, plan)
        print(
            f"| {row.name} | {row.gpus} | {row.tensor} | {row.pipe} | {row.repeats} | {row.rows} | {row.tflops:.0f} | "
            f"{value:.0f} | {value / row.tflops - 1:+.1%} | {plan.bubble:.1%} |"
        )
    found = errors(device)
    print(f"\nmean |error| {sum(map(abs, found)) / len(found):.1%}, largest {max(map(abs, found)):.1%}")
    if options.plot:
        plot(device, options.plot)
        print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
