"""The plot of ``many_gpus.py``. Pure SVG.

A row for each shape: tokens/s against acceptance by number of devices; the same for the most
devices by link, over tensor parallelism on that link; the fixed cost of a tick by stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from many_gpus_plan import BETWEEN

from ppsd_cli.ui.bench_svg import tag

_WIDTH, _HEIGHT, _ROW = 250, 220, 330
_LEFT, _TOP, _STEP = 60, 70, 410
_COLOURS = ("#2b5f94", "#9c6412", "#3d7a4e", "#7a3d6e", "#6d7886", "#b03a2e")
_FONT = {"font_size": 12, "font_family": "system-ui, sans-serif", "fill": "#1b222d"}


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) with a name; ``dashes``: of its stroke. Without a name it has no marks."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashes: str = "none"


@dataclass(frozen=True, slots=True)
class Axis:
    """Upwards: values that are named, and where a value lies between 0 (below) and 1."""

    marks: tuple[float, ...]
    doubling: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, doubling: bool) -> "Axis":
        """From 0 in even steps, or in powers of two."""
        top = max(*values, 1e-6)
        if doubling:
            ends = math.floor(math.log2(min(values))), math.ceil(math.log2(top))
            return cls(tuple(2.0**e for e in range(ends[0], max(ends[1], ends[0] + 1) + 1)), True)
        size = 10 ** math.floor(math.log10(top))
        step = next(size * part for part in (0.2, 0.25, 0.5, 1, 2.5) if size * part * 5 >= top)
        return cls(tuple(step * at for at in range(math.ceil(top / step) + 1)))

    def height(self, value: float) -> float:
        """0 to 1."""
        if self.doubling:
            low, high = math.log2(self.marks[0]), math.log2(self.marks[-1])
            return (math.log2(value) - low) / (high - low)
        return max(value, 0.0) / self.marks[-1]


def plot(report: dict[str, Any]) -> str:
    """The whole picture."""
    shapes = report["summary"]
    rows = [_shape(name, found, at) for at, (name, found) in enumerate(shapes.items())]
    width, height = _LEFT + 3 * _STEP, _TOP + _ROW * max(len(rows), 1)
    space = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}"}
    note = "one device plays several: only a trial" if _played(report) else "random weights, bf16"
    title = _words(f"PPSD over several devices; {note}; dashed: tensor parallelism", 20, 24)
    ground = tag("rect", width=width, height=height, fill="#fcfcfa")
    return tag("svg", ground + title + "".join(rows), **space) + "\n"


def _played(report: dict[str, Any]) -> bool:
    return any(part["played"] for part in report["parts"].values())


def _shape(name: str, found: dict[str, Any], row: int) -> str:
    pipelines = found["pipelines"]
    most = pipelines[max(pipelines, key=int)]
    fixed = [(float(n), ms) for n, ms in found["fixed_ms"].items() if ms is not None]
    panels = (
        (f"{name}: tokens/s by devices and acceptance", speeds(pipelines)),
        (f"{max(pipelines, key=int)} devices: chain over tensor parallelism", ratios(most)),
        ("fixed cost of a tick, ms, by stages", [Line("tick", fixed, _COLOURS[0])]),
    )
    return "".join(
        _panel(title, lines, (_LEFT + at * _STEP, _TOP + row * _ROW), doubling=at == 1)
        for at, (title, lines) in enumerate(panels)
    )


def speeds(pipelines: dict[str, Any]) -> list[Line]:
    """Tokens/s of chains and trees on the first link, with the rival's at the same height."""
    lines = []
    shown = {n: links for n, links in pipelines.items() if int(n) not in BETWEEN}
    for (count, links), colour in zip(shown.items(), _COLOURS, strict=False):
        figures = next(iter(links.values()))
        for kind, dashes in (("chain", "none"), ("tree", "1 3")):
            if isinstance(figures[kind], list) and figures[kind]:
                points = [(r["acceptance"], r["tokens_per_second"]) for r in figures[kind]]
                lines.append(Line(f"{count}, {kind}", points, colour, dashes))
        rival, ends = figures["tensor_parallel_ms"], [r["acceptance"] for r in figures["chain"]]
        if rival and ends:
            level = [(x, 1e3 / rival) for x in (min(ends), max(ends))]
            lines.append(Line("", level, colour, "5 4"))
    return lines


def ratios(links: dict[str, Any]) -> list[Line]:
    """Chains over tensor parallelism by link, and a line at 1."""
    lines = []
    for (name, figures), colour in zip(links.items(), _COLOURS, strict=False):
        rows = [r for r in figures["chain"] if r["over_tensor_parallel"] is not None]
        if rows:
            points = [(r["acceptance"], r["over_tensor_parallel"]) for r in rows]
            lines.append(Line(name, points, colour))
    if lines:
        ends = [x for line in lines for x, _ in line.points]
        lines.append(Line("", [(min(ends), 1.0), (max(ends), 1.0)], "#9ba4b0", "5 4"))
    return lines


def _panel(title: str, lines: Sequence[Line], corner: tuple[int, int], *, doubling: bool) -> str:
    left, top = corner
    points = [point for line in lines for point in line.points]
    parts = [_words(title, left - 30, top - 14)]
    if not points:
        return "".join([*parts, _words("not measured", left, top + 40)])
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    axis = Axis.of([y for _, y in points], doubling=doubling)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low) / (high - low) if high > low else 0.5
        return left + _WIDTH * across, top + _HEIGHT * (1 - axis.height(y))

    for mark in axis.marks:
        at = place(low, mark)[1]
        ends = {"x1": left, "x2": left + _WIDTH, "y1": f"{at:.1f}", "y2": f"{at:.1f}"}
        parts.append(tag("line", stroke="#dfe3e8", **ends))
        parts.append(_words(f"{mark:.6g}", left - 6, at + 4, anchor="end"))
    for x in sorted({x for x, _ in points}):
        across = place(x, axis.marks[-1])[0]
        parts.append(_words(f"{x:g}", across, top + _HEIGHT + 18, anchor="middle"))
    parts += [_drawn(line, [place(*point) for point in line.points]) for line in lines]
    right = left + _WIDTH + 8
    for at, line in enumerate(line for line in lines if line.name):
        y = top + 12 + 14 * at
        stroke = {"stroke": line.colour, "stroke_dasharray": line.dashes}
        parts.append(tag("line", x1=right, x2=right + 20, y1=y - 4, y2=y - 4, **stroke))
        parts.append(_words(line.name, right + 24, y, fill=line.colour))
    return "".join(parts)


def _drawn(line: Line, places: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(places))
    stroke = {"stroke": line.colour, "stroke_dasharray": line.dashes}
    drawn = tag("path", d=path, fill="none", **stroke)
    if not line.name:
        return drawn
    dots = (tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, fill=line.colour) for x, y in places)
    return drawn + "".join(dots)


def _words(text: str, x: float, y: float, *, anchor: str = "start", fill: str = "") -> str:
    font = _FONT | ({"fill": fill} if fill else {})
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **font)
