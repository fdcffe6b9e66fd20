"""An answer as text, as plain values and as a page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpipe.plan.explain import Change, Part
from jaxpipe.plan.problem import Plan, Problem
from jaxpipe.plan.search import Answer
from jaxpipe.schedule import Costs, build, show

HEADS = ("P", "V", "data", "fsdp", "tensor", "schedule", "M", "rows", "remat", "stages", "step s", "tokens/s", "MFU")
MEMORY_HEADS = ("weights", "optimizer", "activations", "buffers")
DRAWN = 400
"""The most actions of a device that a page draws; of longer schedules the first microbatches are drawn."""


def numbers(plan: Plan) -> dict[str, Any]:
    """A plan as plain values; seconds and bytes."""
    o = plan.option
    return {
        "mesh": {"pipe": o.pipe, "data": o.data, "fsdp": o.fsdp, "tensor": o.tensor},
        "schedule": {
            "name": o.schedule,
            "repeats": o.repeats,
            "microbatches": o.microbatches,
            "stages": plan.layout,
            "remat": o.remat,
            "head": o.head,
            "packing": plan.packing,
            "memory": plan.order,
        },
        "rows_per_microbatch": o.rows,
        "batch_size": plan.batch,
        "step_s": plan.step_s,
        "loop_s": plan.loop_s,
        "sync_s": plan.sync_s,
        "optimizer_s": plan.optimizer_s,
        "hop_s": plan.hop_s,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu,
        "bubble": plan.bubble,
        "memory_bytes": {**vars(plan.memory), "total": plan.memory.total},
        "costs": plan.source,
    }


def answer_numbers(answer: Answer, parts: Sequence[Part] = (), changes: Sequence[Change] = ()) -> dict[str, Any]:
    """An answer as plain values."""
    problem = answer.problem
    found: dict[str, Any] = {
        "device": problem.device.name,
        "devices": problem.devices,
        "limit_bytes": problem.limit_bytes,
        "params": problem.shape.params,
        "attention": problem.shape.attention,
        "batch": problem.batch,
        "options": answer.tried[0],
        "simulated": answer.tried[1],
        "best": numbers(answer.best) if answer.best else None,
        "plans": [numbers(plan) for plan in answer.plans[:20]],
        "pareto": [numbers(plan) for plan in answer.pareto],
        "rejected": {rejection.schedule: rejection.reason for rejection in answer.rejected},
    }
    if parts:
        found["step"] = {part.name: part.seconds for part in parts}
        found["changes"] = {change.name: change.step_s for change in changes}
    return found


def text(answer: Answer, most: int = 8) -> str:
    """An answer for people."""
    lines = [_head(answer.problem, answer)]
    lines += ["", "fastest plans", *_table(answer.plans[:most])]
    others = [plan for plan in answer.pareto if plan not in answer.plans[:1]]
    if others:
        lines += ["", "with less memory", *_table(others)]
    lines += ["", "not taken"]
    lines += [f"  {rejection.schedule:17} {rejection.reason}" for rejection in answer.rejected]
    return "\n".join(lines)


def explained(parts: Sequence[Part], changes: Sequence[Change], best: Plan) -> str:
    """Where the best plan's step goes, and what one change would buy."""
    lines = ["", "where the step goes"]
    lines += [f"  {part.name:28} {part.seconds:10.4g} s  {part.seconds / best.step_s:6.1%}" for part in parts]
    lines += ["", "what one change would buy"]
    for change in changes:
        if change.step_s is None:
            lines.append(f"  {change.name:28} no plan")
        else:
            lines.append(
                f"  {change.name:28} {change.step_s:10.4g} s  {change.step_s / best.step_s - 1:+6.1%}  {change.how}"
            )
    return "\n".join(lines)


def page(answer: Answer, parts: Sequence[Part] = (), changes: Sequence[Change] = ()) -> str:
    """A self-contained page: the tables, and the best plan's schedule drawn."""
    best = answer.best
    rows = [_cells(plan) for plan in answer.plans[:20]]
    body = [f"<h1>Plan</h1><p>{html.escape(_head(answer.problem, answer)).replace(chr(10), '<br>')}</p>"]
    body.append(f"<h2>Fastest plans</h2>{_html_table(rows)}")
    body.append(f"<h2>With less memory</h2>{_html_table([_cells(plan) for plan in answer.pareto])}")
    if best is not None:
        if parts:
            listed = "".join(
                f"<tr><td>{html.escape(part.name)}</td><td>{part.seconds:.4g} s</td>"
                f"<td>{part.seconds / best.step_s:.1%}</td></tr>"
                for part in parts
            )
            bought = "".join(
                f"<tr><td>{html.escape(change.name)}</td><td>"
                + (
                    "no plan"
                    if change.step_s is None
                    else f"{change.step_s:.4g} s</td><td>{change.step_s / best.step_s - 1:+.1%}"
                )
                + "</td></tr>"
                for change in changes
            )
            body.append(f"<h2>Where the step goes</h2><table>{listed}</table>")
            body.append(f"<h2>What one change would buy</h2><table>{bought}</table>")
        drawing, note = drawn(best)
        body.append(f"<h2>Schedule</h2><p>{html.escape(note)}</p>{drawing}")
    reasons = "".join(f"<tr><td>{r.schedule}</td><td>{html.escape(r.reason)}</td></tr>" for r in answer.rejected)
    body.append(f"<h2>Not taken</h2><table>{reasons}</table>")
    head = f"<head><meta charset='utf-8'><title>Plan</title>{_STYLE}</head>"
    return f"<!doctype html><html>{head}<body>{''.join(body)}</body></html>"


def drawn(plan: Plan) -> tuple[str, str]:
    """The schedule of a plan as SVG, in lockstep with its own times, and what is drawn."""
    o = plan.option
    per_microbatch = 3 * o.repeats
    most = max(3 * o.pipe, DRAWN // per_microbatch)
    microbatches = o.microbatches if o.microbatches <= most else most - most % o.pipe
    schedule = build(o.schedule, devices=o.pipe, microbatches=microbatches, repeats=o.repeats)
    note = f"{o.schedule}, P={o.pipe}, V={o.repeats}, " + (
        f"M={o.microbatches}"
        if microbatches == o.microbatches
        else f"{microbatches} of M={o.microbatches} microbatches"
    )
    unit = 1.0
    costs = Costs(unit, unit, unit, recompute=unit if o.remat == "full" else 0.0)
    return show.svg(schedule, costs, "lockstep"), note


_STYLE = """<style>
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1300px;padding:0 1em;color:#1b1f24;background:#fff}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #d8dee4}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}td,th{border-color:#30363d}svg{background:#fff}}
</style>"""


def _head(problem: Problem, answer: Answer) -> str:
    shape = problem.shape
    tokens = f"{problem.batch} x {shape.seq_len} tokens"
    return (
        f"model      {_count(shape.params)} parameters, {len(shape.kinds)} blocks, batch {tokens}, {shape.dtype}\n"
        f"devices    {problem.devices} x {problem.device.name}, {problem.limit_bytes / 1e9:.4g} GB each to plan with\n"
        + (f"attention  {shape.attention}\n" if shape.attention else "")
        + f"search     {answer.tried[0]:,} options, {answer.tried[1]:,} simulated"
        + (f"; costs {answer.best.source}" if answer.best else "")
    )


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _cells(plan: Plan) -> list[str]:
    o, m = plan.option, plan.memory
    layout = "equal" if len(set(plan.counts)) == 1 else plan.layout
    layout = layout if len(layout) <= 24 else layout[:23] + "…"
    sizes = [f"{size / 1e9:.3g}" for size in (m.total, m.weights, m.optimizer, m.activations, m.buffers)]
    return [
        *map(str, (o.pipe, o.repeats, o.data, o.fsdp, o.tensor)),
        o.schedule,
        str(o.microbatches),
        str(o.rows),
        o.remat,
        layout,
        f"{plan.step_s:.4g}",
        f"{plan.tokens_per_s:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.bubble:.1%}",
        *sizes,
    ]


_COLUMNS = (*HEADS, "bubble", "GB", *MEMORY_HEADS)


def _table(plans: Sequence[Plan]) -> list[str]:
    rows = [list(_COLUMNS), *map(_cells, plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def comments(plan: Plan, device: str, devices: int) -> str:
    """What a plan says of itself above a config, as comment lines."""
    m = plan.memory
    memory: Mapping[str, float] = vars(m)
    listed = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in memory.items())
    return (
        f"# Planned for {devices} x {device} ({plan.source} costs): {plan.step_s:.4g} s per step, "
        f"{plan.tokens_per_s:,.0f} tokens/s,\n"
        f"# MFU {plan.mfu:.1%}, bubble {plan.bubble:.1%}, {m.total / 1e9:.3g} GB per device ({listed}).\n"
    )
