"""Draws the folders of jaxpipe and who imports whom, from the imports themselves.

    python scripts/architecture.py docs/images/architecture.svg

A folder stands above all that it imports. Of the arrows only those are drawn that do not follow from others.
"""

import ast
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[1] / "jaxpipe"
BOX, ROW, GAP = (118, 44), 84, 74
LOWEST = {"errors", "documents", "screen", "reader", "jax_internals", "flax_nnx", "terminal"}
"""Single files that almost all import: one box, and no arrows to it."""


def imports() -> dict[str, set[str]]:
    """The folders that each folder imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if path.parent == ROOT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxpipe."):
                found[part].add((node.module or "").split(".")[1])
    return {part: {other for other in others - {part} if other not in LOWEST} for part, others in found.items()}


def rows_of(graph: dict[str, set[str]]) -> list[list[str]]:
    """The folders by their height: one above the highest that they import, the lowest first."""
    height: dict[str, int] = {}
    for part in TopologicalSorter(graph).static_order():
        height[part] = 1 + max((height[other] for other in graph.get(part, ())), default=-1)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for part in sorted(height):
        rows[height[part]].append(part)
    return rows


def direct(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""
    below: dict[str, set[str]] = {}
    for part in TopologicalSorter(graph).static_order():
        below[part] = set().union(*({other} | below[other] for other in graph.get(part, ())), set())
    return sorted(
        (part, other)
        for part, others in graph.items()
        for other in others
        if not any(other in below[o] for o in others)
    )


def draw(graph: dict[str, set[str]]) -> str:
    """The picture as SVG."""
    rows, arrows = rows_of(graph)[::-1], direct(graph)
    width, height = max(map(len, rows)) * (BOX[0] + GAP) + GAP, (len(rows) + 1) * ROW + 20
    at: dict[str, tuple[float, float]] = {}
    for line, row in enumerate(rows):
        # Those come under whatever imports them.
        users = {part: [at[user][0] for user, used in arrows if used == part] for part in row}
        row = sorted(row, key=lambda part: fmean(users[part] or [0]))
        left = (width - len(row) * (BOX[0] + GAP) + GAP) / 2
        for place, part in enumerate(row):
            at[part] = (left + place * (BOX[0] + GAP), 10 + line * ROW)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="15">',
        "<style>rect{fill:#e8f0f7;stroke:#1f5f8b}text{fill:#10222e;text-anchor:middle}.n{font-size:11px;fill:#48606e}"
        "path{stroke:#5b7f95;fill:none;marker-end:url(#tip)}@media(prefers-color-scheme:dark){rect{fill:#16323f;"
        "stroke:#7fb6d4}text{fill:#e6eef2}.n{fill:#a9bfca}path{stroke:#8fb3c6}}</style>",
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#5b7f95"/></marker>',
    ]
    for part, other in arrows:
        (x, y), (u, v) = at[part], at[other]
        x, y, u = x + BOX[0] / 2, y + BOX[1], u + BOX[0] / 2
        lines.append(f'<path d="M{x:.0f},{y:.0f} C{x:.0f},{y + 30:.0f} {u:.0f},{v - 34:.0f} {u:.0f},{v - 2:.0f}"/>')
    for part, (x, y) in at.items():
        lines += _box(x, y, BOX[0], part, f"{len(list((ROOT / part).rglob('*.py')))} files")
    below = 10 + len(rows) * ROW
    lines += _box(10, below, width - 20, " · ".join(sorted(LOWEST)), "single files that all may import")
    return "\n".join([*lines, "</svg>\n"])


def _box(x: float, y: float, width: float, name: str, note: str) -> list[str]:
    middle = x + width / 2
    return [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX[1]}" rx="6"/>',
        f'<text x="{middle:.0f}" y="{y + 19:.0f}">{escape(name)}</text>',
        f'<text class="n" x="{middle:.0f}" y="{y + 35:.0f}">{escape(note)}</text>',
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(imports()), encoding="utf-8")
