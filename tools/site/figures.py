"""The figures of the pages: python tools/site/figures.py writes them below docs/explanation/.

Each is one SVG with colours for a light and a dark page: an image asks which it stands on.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[2] / "docs" / "explanation"
STYLE = """<style>
  svg { font: 15px system-ui, sans-serif; }
  text { fill: #2b3440; }
  .small { font-size: 13px; fill: #55606c; }
  .middle { text-anchor: middle; }
  .right { text-anchor: end; }
  .frozen { fill: #9db4c8; }
  .trained { fill: #e08a6a; }
  .values { fill: #c9d2da; }
  .line { fill: none; stroke: #55606c; stroke-width: 1.6; }
  .grid { fill: none; stroke: #d5dbe1; stroke-width: 1; }
  .change { stroke: #b5482a; fill: #b5482a; }
  .weight { stroke: #17517e; fill: #17517e; }
  .noise { stroke: #7a8591; fill: #7a8591; }
  .curve { fill: none; stroke-width: 2.4; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6ebf0; }
    .small { fill: #aab4be; }
    .frozen { fill: #4d6d8a; }
    .trained { fill: #d1754f; }
    .values { fill: #5d6873; }
    .line { stroke: #aab4be; }
    .grid { stroke: #3a434c; }
    .change { stroke: #f0916f; fill: #f0916f; }
    .weight { stroke: #7fb8e6; fill: #7fb8e6; }
    .noise { stroke: #9aa5b0; fill: #9aa5b0; }
  }
</style>"""


def svg(width: int, height: int, label: str, shapes: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([head, STYLE, *shapes, "</svg>", ""])


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def arrow(*points: tuple[float, float]) -> str:
    (x, y), way = points[-1], " L".join(f"{a} {b}" for a, b in points)
    return f'<path class="line" d="M{way} M{x - 7} {y - 5} L{x} {y} L{x - 7} {y + 5}"/>'


def shapes() -> str:
    """Draw y = W x + (α / r) B A x, with the sides of each matrix as long as its dimensions."""
    return svg(
        720,
        400,
        "x goes through the frozen W, and beside it through A and B, whose sum is y",
        [
            box(30, 120, 22, 150, "values"),
            text(41, 108, "x"),
            text(41, 292, "(in,)", "small middle"),
            arrow((62, 170), (100, 170), (100, 105), (190, 105)),
            arrow((62, 220), (100, 220), (100, 310), (190, 310)),
            box(200, 30, 150, 150, "frozen"),
            text(275, 100, "W"),
            text(275, 122, "frozen", "small middle"),
            text(275, 200, "(out, in)", "small middle"),
            box(200, 298, 150, 24, "trained"),
            text(275, 315, "A"),
            text(275, 288, "random at the start", "small middle"),
            text(275, 342, "(r, in)", "small middle"),
            arrow((360, 310), (428, 310)),
            text(394, 300, "(r,)", "small middle"),
            box(438, 235, 24, 150, "trained"),
            text(450, 315, "B"),
            text(450, 224, "zero at the start", "small middle"),
            text(474, 282, "(out, r)", "small"),
            arrow((360, 105), (580, 105), (580, 180), (600, 180)),
            arrow((472, 310), (580, 310), (580, 212), (600, 212)),
            text(526, 332, "× α / r"),
            '<circle cx="616" cy="196" r="15" class="line"/>',
            '<path class="line" d="M608 196 L624 196 M616 188 L616 204"/>',
            arrow((632, 196), (660, 196)),
            box(668, 120, 22, 150, "values"),
            text(679, 108, "y"),
            text(679, 292, "(out,)", "small middle"),
        ],
    )


LEFT, RIGHT, TOP, BOTTOM = 64, 560, 30, 330
NAMES = {"change": "ΔW, the change", "weight": "W itself", "noise": "noise of its shape"}
LABELS = {"minigpt": "MiniGPT", "smollm2-135m": "SmolLM2-135M"}


def spectrum(results: list[dict[str, Any]]) -> str:
    """Draw which share of the squared norm each rank keeps: a panel for each model."""
    height = BOTTOM + 60
    drawn: list[str] = []
    for place, result in enumerate(results):
        drawn.append(f'<g transform="translate(0 {place * height})">')
        drawn += panel(result)
        drawn.append("</g>")
    label = "Share of the squared norm that each rank keeps, of changes, weights and noise"
    return svg(720, height * len(results), label, drawn)


def panel(result: dict[str, Any]) -> list[str]:
    ranks = [int(rank) for rank in result["change"]]
    last = math.log2(ranks[-1])

    def x(rank: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * math.log2(rank) / last, 1)

    def y(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    model = LABELS.get(result["model"], result["model"])
    lines = [text(LEFT, 18, f"{model}: share of the squared norm that a rank keeps", "")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        lines.append(f'<path class="grid" d="M{LEFT} {y(share)} L{RIGHT} {y(share)}"/>')
        lines.append(text(LEFT - 8, y(share) + 5, f"{share:.0%}", "small right"))
    lines += [text(x(rank), BOTTOM + 20, str(rank), "small middle") for rank in ranks]
    lines.append(text((LEFT + RIGHT) / 2, BOTTOM + 42, "rank", "small middle"))
    middle = len(ranks) // 2
    heights = spread([y(result[what][str(ranks[middle])]) for what in NAMES])
    for what, label_y in zip(NAMES, heights, strict=True):
        shares = [result[what][str(rank)] for rank in ranks]
        points = " ".join(f"{x(r)},{y(s)}" for r, s in zip(ranks, shares, strict=True))
        lines.append(f'<polyline class="curve {what}" style="fill: none" points="{points}"/>')
        lines += [
            f'<circle cx="{x(r)}" cy="{y(s)}" r="3" class="{what}"/>'
            for r, s in zip(ranks, shares, strict=True)
        ]
        lines.append(f'<circle cx="{RIGHT + 18}" cy="{label_y - 4}" r="5" class="{what}"/>')
        lines.append(text(RIGHT + 30, label_y + 1, NAMES[what], "small"))
    return lines


def spread(heights: list[float], least: float = 22) -> list[float]:
    """Return heights for labels, in their order, none nearer to another than `least`."""
    placed: dict[int, float] = {}
    lowest = -math.inf
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        lowest = placed[index] = max(heights[index], lowest + least)
    return [placed[index] for index in range(len(heights))]


def figures() -> dict[str, str]:
    """Return each figure's text, by its file's name."""
    results = json.loads((PLACE / "spectrum.json").read_text(encoding="utf-8"))
    return {"lora-shapes.svg": shapes(), "spectrum.svg": spectrum(results)}


def main() -> None:
    for name, figure in figures().items():
        (PLACE / name).write_text(figure, encoding="utf-8")
        print(PLACE / name)


if __name__ == "__main__":
    main()
