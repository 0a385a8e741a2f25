"""Draws docs/flow.svg, the picture of how-it-works.md: every arrow carries the folder of src/keyhole that does it.

    python docs/draw_flow.py

Text and shapes only, on a white ground, so that it reads the same in light and dark pages.
"""

from __future__ import annotations

import math
from pathlib import Path

OUT = Path(__file__).with_name("flow.svg")
WIDTH, HEIGHT = 1040, 740
COLUMN = (124, 388, 652, 916)  # centres of the nodes
PICTURE = 104  # side of a node's picture
GAP = 80  # from the middle of the space between two rows down to the pictures of the second
INK, GREY, ACCENT = "#1f2933", "#5b6875", "#c2410c"

# what a patch of the example image holds: 0 empty, 1 texture, 2 what decides the class
SCENE = ("0000000", "0011100", "0111210", "0111110", "0012110", "0001100", "0000000")
SHADES = {"0": "#f1f5f9", "1": "#e3cfe4", "2": "#b4235a"}
SCORES = {"0": "#eef2f7", "1": "#c7d7f5", "2": "#1d4ed8"}
CELL = PICTURE / len(SCENE)
KEPT = ((1, 3), (2, 4), (3, 2), (4, 3))  # row, column of the patches that are kept in the example


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", extra: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}" {extra}/>'


def text(x: float, y: float, words: str, size: int, fill: str = INK, extra: str = 'text-anchor="middle"') -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" {extra}>{words}</text>'


def code(x: float, y: float, words: str) -> str:
    return text(x, y, words, 14, ACCENT, 'text-anchor="middle" class="code"')


def corner(column: int, top: float) -> tuple[float, float]:
    """Left and top of the picture of a node."""
    return COLUMN[column] - PICTURE / 2, top


def caption(column: int, top: float, name: str, detail: str) -> str:
    x = COLUMN[column]
    return text(x, top + PICTURE + 20, name, 16, INK, 'text-anchor="middle" font-weight="600"') + text(
        x, top + PICTURE + 38, detail, 13, GREY
    )


def arrow(column: int, top: float, *folders: str) -> str:
    """From a node to its right neighbour, its folders above it."""
    start, end, y = COLUMN[column] + PICTURE / 2 + 8, COLUMN[column + 1] - PICTURE / 2 - 8, top + PICTURE / 2
    middle = (start + end) / 2
    names = [code(middle, y - 10 - 19 * (len(folders) - 1 - i), name) for i, name in enumerate(folders)]
    return f'<path d="M{start:g} {y:g} H{end - 3:g}" class="arrow"/>' + "".join(names)


def turn(column: int, top: float, below: float, words: str) -> str:
    """From a node on its right, between the rows, to the first node of the next row on its left."""
    start, y = COLUMN[column] + PICTURE / 2 + 8, top + PICTURE / 2
    right, between, left = start + (60 if column < 3 else 26), below - GAP, 38
    end, last = COLUMN[0] - PICTURE / 2 - 11, below + PICTURE / 2
    path = (
        f"M{start:g} {y:g} H{right - 10:g} q10 0 10 10 V{between - 10:g} q0 10 -10 10 "
        f"H{left + 10:g} q-10 0 -10 10 V{last - 10:g} q0 10 10 10 H{end:g}"
    )
    middle, width = WIDTH / 2, 8.4 * len(words) + 24
    ground = rect(middle - width / 2, between - 12, width, 24, "#ffffff")
    return f'<path d="{path}" class="arrow"/>' + ground + code(middle, between + 5, words)


def scene(x: float, y: float, shades: dict[str, str], gap: float = 0.0) -> str:
    return "".join(
        rect(x + column * CELL, y + row * CELL, CELL - gap, CELL - gap, shades[kind])
        for row, kinds in enumerate(SCENE)
        for column, kind in enumerate(kinds)
    )


def frame(x: float, y: float) -> str:
    return rect(x, y, PICTURE, PICTURE, "none", "#94a3b8", 'rx="3"')


def file_node(x: float, y: float) -> str:
    left, right, bottom = x + 16, x + PICTURE - 16, y + PICTURE
    page = f"M{left} {y} H{right - 22} L{right} {y + 22} V{bottom} H{left} Z"
    fold = f"M{right - 22} {y} V{y + 22} H{right}"
    kinds = "".join(
        text(x + PICTURE / 2, y + 48 + 19 * i, name, 14, GREY)
        for i, name in enumerate((".svs .tif", ".zarr .png", "..."))
    )
    return f'<path d="{page}" fill="#f8fafc" stroke="#94a3b8"/><path d="{fold}" fill="none" stroke="#94a3b8"/>{kinds}'


def image_node(x: float, y: float) -> str:
    middle, blob = (x + PICTURE / 2, y + PICTURE / 2), []
    for i in range(60):
        angle = 2 * math.pi * i / 60
        radius = 36 + 5 * math.sin(3 * angle + 1) + 3 * math.sin(5 * angle)
        blob.append(f"{middle[0] + radius * math.cos(angle):.1f} {middle[1] + radius * math.sin(angle):.1f}")
    spots = "".join(
        f'<circle cx="{x + (column + 0.5) * CELL:.1f}" cy="{y + (row + 0.5) * CELL:.1f}" r="4.5" fill="{SHADES["2"]}"/>'
        for row, kinds in enumerate(SCENE)
        for column, kind in enumerate(kinds)
        if kind == "2"
    )
    tissue = f'<path d="M{" L".join(blob)} Z" fill="{SHADES["1"]}"/>'
    return rect(x, y, PICTURE, PICTURE, SHADES["0"], extra='rx="3"') + tissue + spots + frame(x, y)


def grid_node(x: float, y: float) -> str:
    lines = "".join(
        f'<path d="M{x + i * CELL:.1f} {y} V{y + PICTURE} M{x} {y + i * CELL:.1f} H{x + PICTURE}" stroke="#64748b" '
        'stroke-width="1"/>'
        for i in range(1, len(SCENE))
    )
    return image_node(x, y) + lines + frame(x, y)


def stack_node(x: float, y: float, count: int, fills: tuple[str, ...]) -> str:
    """Patches one behind the other."""
    side, step = 58, (PICTURE - 58) / (count - 1)
    return "".join(
        rect(x + i * step, y + i * step, side, side, fills[i % len(fills)], "#64748b", 'rx="2"') for i in range(count)
    )


def bars_node(x: float, y: float, rows: int, strong: tuple[int, ...] = (), columns: int = 8) -> str:
    """Vectors, one a row; the strong ones in the colour of what decides."""
    pitch, width = PICTURE / rows, PICTURE / columns
    height = min(pitch - 4, 20)
    shade = ("#dbe7f5", "#bcd3ee", "#8fb4e0", "#cfe0f3", "#a6c4e8")
    hot = ("#f4c6d6", "#e58fae", "#d35c88", "#eeb0c6", "#dc7ba0")
    return "".join(
        rect(
            x + column * width,
            y + row * pitch + (pitch - height) / 2,
            width - 1.5,
            height,
            (hot if row in strong else shade)[(row * 3 + column * 7 + row * column) % 5],
        )
        for row in range(rows)
        for column in range(columns)
    )


def kept_node(x: float, y: float) -> str:
    frames = "".join(
        rect(x + column * CELL, y + row * CELL, CELL, CELL, SHADES[SCENE[row][column]], ACCENT, 'stroke-width="2.5"')
        for row, column in KEPT
    )
    return f'<g opacity="0.35">{scene(x, y, SHADES)}</g>' + frame(x, y) + frames


def zoom_node(x: float, y: float) -> str:
    """The kept patches, larger."""
    side = PICTURE / 2 - 4
    patches = []
    for i, (row, column) in enumerate(KEPT):
        left, top = x + (i % 2) * (side + 8), y + (i // 2) * (side + 8)
        patches.append(rect(left, top, side, side, SHADES["1"], ACCENT, 'stroke-width="2.5" rx="2"'))
        if SCENE[row][column] == "2":
            patches.append(f'<circle cx="{left + side / 2:g}" cy="{top + side / 2:g}" r="13" fill="{SHADES["2"]}"/>')
    return "".join(patches)


def answer_node(x: float, y: float) -> str:
    """Two tasks, each with a bar per class."""
    out = []
    for task, shares in enumerate(((0.9, 0.2), (0.25, 0.75, 0.4))):
        top = y + 6 + task * 42
        for i, share in enumerate(shares):
            fill = SCORES["2"] if share == max(shares) else SCORES["1"]
            out.append(rect(x, top + 14 * i, PICTURE * share, 10, fill, extra='rx="2"'))
    return "".join(out)


def band(top: float, height: float, fill: str, title: str, note: str) -> str:
    words = text(62, top + 30, title, 17, INK, 'font-weight="700"')
    remark = text(WIDTH - 52, top + 30, note, 14, GREY, 'text-anchor="end"')
    return rect(16, top, WIDTH - 32, height, fill, extra='rx="10"') + words + remark


def picture() -> str:
    first, second, third = 78.0, 326.0, 574.0  # tops of the pictures
    parts = [
        rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "#ffffff", "#d0d7de", 'rx="12"'),
        band(16, 212, "#f6f8fa", "Where the patches are", "pixels are read only where asked for"),
        band(264, 212, "#eef4fd", "First pass: look at every patch, keep the best M", "no gradients, evaluation mode"),
        band(512, 212, "#fdf3ec", "Second pass: answer from the M alone", "same weights; with gradients in training"),
    ]
    rows = (
        (
            first,
            (
                (file_node, "file", "photograph or slide"),
                (image_node, "image", "pixels of any box"),
                (grid_node, "grid", "N patches, overlap or not"),
            ),
            (("images/",), ("patches/",)),
        ),
        (
            second,
            (
                (lambda x, y: stack_node(x, y, 6, ("#f1f5f9", "#e3cfe4")), "chunks", "I patches at a time, uint8"),
                (lambda x, y: bars_node(x, y, 6, (4,)), "embeddings", "I x D"),
                (lambda x, y: scene(x, y, SCORES, 1.5), "logits", "N x heads x tasks"),
                (kept_node, "M kept", "per image"),
            ),
            (("engine/", "nn/"), ("nn/",), ("nn/",)),
        ),
        (
            third,
            (
                (zoom_node, "M patches", "the same pixels, read again"),
                (lambda x, y: bars_node(x, y, 4, (1, 3)), "embeddings", "M x D"),
                (lambda x, y: bars_node(x, y, 2, (0,)), "pooled", "one per task, D"),
                (answer_node, "logits per task", "tasks/: label, probability"),
            ),
            (("engine/", "nn/"), ("nn/",), ("nn/",)),
        ),
    )
    for top, nodes, files in rows:
        for column, (draw, name, detail) in enumerate(nodes):
            parts.append(draw(*corner(column, top)) + caption(column, top, name, detail))
        parts += [arrow(column, top, *names) for column, names in enumerate(files)]
    below = (COLUMN[1] + COLUMN[2]) / 2, first + PICTURE / 2 + 22
    for line, words in enumerate(("tissue or mask,", "if asked")):
        parts.append(text(below[0], below[1] + 17 * line, words, 13, GREY))
    parts.append(turn(2, first, second, "loading/  engine/"))
    parts.append(turn(3, second, third, "loading/  engine/"))
    return "\n".join(parts)


def svg() -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" \
font-family="Helvetica, Arial, sans-serif">
<title>From an image file to the logits of each task; every arrow carries the name of its folder in src/keyhole</title>
<defs>
<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 L10 5 L0 10 Z" fill="{INK}"/></marker>
<style>.arrow {{ fill: none; stroke: {INK}; stroke-width: 1.8; marker-end: url(#head) }}
.code {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace }}</style>
</defs>
{picture()}
</svg>
"""


if __name__ == "__main__":
    OUT.write_text(svg())
