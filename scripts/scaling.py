"""Predicted step times of a 7 B and a 70 B model on more and more H100s, by the planner; nothing is measured.

    python scripts/scaling.py --out docs/images/scaling.png

Tensor and pipe stay as they are and the axis `fsdp` grows. *Strong*: the batch stays, so that each pipeline has fewer
microbatches. *Weak*: the batch grows with the devices.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from jaxpipe.measure.planning import gpt_shape
from jaxpipe.models.gpt_config import GPTConfig
from jaxpipe.plan import Plan, Problem, Space, analytic, find_device
from jaxpipe.plan.search import search

DEVICE = find_device("h100")
SEQ_LEN = 4096
LLAMA: Any = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False}
LLAMA |= {"vocab_size": 32000, "max_seq_len": SEQ_LEN, "dtype": "bfloat16", "attention": "cudnn"}


@dataclass(frozen=True)
class Setup:
    """A model and how it is cut; one sequence per microbatch, `remat="full"`.

    Attributes:
        name: For people.
        config: The model.
        pipe: P.
        tensor: Devices per stage, within a node.
        repeats: V of the interleaved schedule.
        batch: Sequences per step, for strong scaling.
        microbatches: M of every pipeline, for weak scaling.
    """

    name: str
    config: GPTConfig
    pipe: int
    tensor: int
    repeats: int
    batch: int
    microbatches: int

    def plan(self, fsdp: int, microbatches: int, schedule: str) -> Plan:
        """What the planner makes of one point: everything given, nothing to choose."""
        shape = gpt_shape(self.config, SEQ_LEN, DEVICE.capability)
        space = Space(
            schedules=(schedule,),
            pipe=(self.pipe,),
            repeats=(self.repeats if schedule == "interleaved_1f1b" else 1,),
            tensor=(self.tensor,),
            fsdp=(fsdp,),
            data=(1,),
            rows=(1,),
            microbatches=(microbatches,),
            remats=("full",),
            split="equal",
        )
        problem = Problem(
            shape=shape,
            device=DEVICE,
            devices=self.pipe * self.tensor * fsdp,
            batch=microbatches * fsdp,
            costs=lambda rows, tensor: analytic(shape, DEVICE, rows=rows, tensor=tensor),
            space=space,
            memory_bytes=float("inf"),
        )
        found = search(problem).best
        assert found is not None
        return found


SETUPS = [
    Setup(
        "7 B",
        GPTConfig(num_layers=32, num_heads=32, d_model=4096, d_ff=11008, **LLAMA),
        pipe=4,
        tensor=2,
        repeats=4,
        batch=1024,
        microbatches=32,
    ),
    Setup(
        "70 B",
        GPTConfig(num_layers=80, num_heads=64, d_model=8192, d_ff=24576, **LLAMA),
        pipe=8,
        tensor=8,
        repeats=5,
        batch=1024,
        microbatches=64,
    ),
]
FSDP = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Row:
    """One line of the table: step seconds; of the interleaved one its MFU, and gigabytes per device."""

    model: str
    scaling: str
    devices: int
    microbatches: int
    one_f_one_b_s: float
    interleaved_s: float
    utilization: float
    gigabytes: float


def rows() -> list[Row]:
    """All of them."""
    found = []
    for setup in SETUPS:
        for scaling in ("strong", "weak"):
            for fsdp in FSDP:
                microbatches = setup.batch // fsdp if scaling == "strong" else setup.microbatches
                devices = setup.pipe * setup.tensor * fsdp
                plain, interleaved = (setup.plan(fsdp, microbatches, name) for name in ("1f1b", "interleaved_1f1b"))
                gigabytes = interleaved.memory.total / 1e9
                times = plain.step_s, interleaved.step_s
                found.append(Row(setup.name, scaling, devices, microbatches, *times, interleaved.mfu, gigabytes))
    return found


def table(found: list[Row]) -> str:
    """As markdown."""
    head = "| model | scaling | devices | microbatches | 1f1b s | interleaved s | MFU | GB |\n" + "|---" * 8 + "|"
    lines = [
        f"| {r.model} | {r.scaling} | {r.devices} | {r.microbatches} | {r.one_f_one_b_s:.2f} | {r.interleaved_s:.2f} | "
        f"{r.utilization:.0%} | {r.gigabytes:.0f} |"
        for r in found
    ]
    return "\n".join([head, *lines])


def draw(found: list[Row], out: str) -> None:
    """Step time against devices: strong scaling left, logarithmic, and weak right."""
    from matplotlib.figure import Figure  # the extra viz

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, scaling in zip(axes, ("strong", "weak"), strict=True):
        for setup, color in zip(SETUPS, ("tab:blue", "tab:orange"), strict=True):
            own = [row for row in found if (row.model, row.scaling) == (setup.name, scaling)]
            devices = [row.devices for row in own]
            first = own[0].interleaved_s
            ideal = [first * devices[0] / n if scaling == "strong" else first for n in devices]
            axis.plot(devices, [r.interleaved_s for r in own], "o-", color=color, label=f"{setup.name}, interleaved")
            axis.plot(devices, [r.one_f_one_b_s for r in own], "s--", color=color, label=f"{setup.name}, 1f1b", ms=4)
            axis.plot(devices, ideal, ":", color="gray", label="ideal" if setup is SETUPS[-1] else None)
        axis.set(xscale="log", xlabel="H100s", title=f"{scaling} scaling")
        if scaling == "strong":
            axis.set(yscale="log", ylabel="predicted seconds per step")
        else:
            axis.set(ylim=(0, None))
        axis.set_xticks([8, 32, 128, 512, 2048], ["8", "32", "128", "512", "2048"])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def main():
    """Prints the table and draws it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", help="a picture to draw, .png or .svg")
    args = parser.parse_args()
    found = rows()
    print(table(found))
    if args.out:
        draw(found, args.out)


if __name__ == "__main__":
    main()
