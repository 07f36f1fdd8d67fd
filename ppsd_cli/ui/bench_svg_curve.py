"""Speed-up against acceptance: measured points, and what the formula gives. Pure SVG."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from ppsd_cli.bench_records import BenchReport, Row
from ppsd_cli.ui.bench_svg import colour, keys, line, picture, tag, words

_LEFT = 8.0
_WIDTH = 89.0
_TOP = 26
_HEIGHT = 260
_FOOT = 44
_STEPS = 16
"""Pieces between two points of a curve."""


@dataclass(frozen=True, slots=True)
class Family:
    """Contenders that differ in their fixed acceptance only, lowest acceptance first."""

    name: str
    kind: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class _Axes:
    first: float
    top: float

    def x(self, acceptance: float) -> float:
        """Percent of the width."""
        return _LEFT + _WIDTH * (acceptance - self.first) / (1 - self.first)

    def y(self, speedup: float) -> float:
        """Pixels."""
        return _TOP + _HEIGHT * (1 - speedup / self.top)


def acceptance_curve(report: BenchReport) -> str | None:
    """Legend and chart; None where fewer than two values of acceptance were fixed."""
    families = families_of(report)
    if max((len(each.rows) for each in families), default=0) < 2:
        return None
    real = [
        row for row in report.rows if row.contender.acceptance is None and _place(row) is not None
    ]
    axes = _axes([*(row for each in families for row in each.rows), *real])
    content = [_scales(axes)]
    content += [_family(each, axes) for each in families]
    content += [_real(row, axes) for row in real]
    legend = [(each.kind, each.name) for each in families]
    legend.append(("curve", "formula"))
    legend.append(("reference", "plain decoding (ar) = 1"))
    if real:
        legend.append(("square", "with the head's own drafts"))
    chart = picture("Speed-up against acceptance", "".join(content), _TOP + _HEIGHT + _FOOT)
    return keys(legend) + chart


def families_of(report: BenchReport) -> list[Family]:
    """Group the contenders of fixed acceptance by decoder and head."""
    found: dict[tuple[str, str | None], list[Row]] = {}
    for row in report.rows:
        who = row.contender
        if who.acceptance is not None and row.overall.speedup:
            found.setdefault((who.decoder, who.head), []).append(row)
    return [
        Family(_name(decoder, rows), colour(decoder), tuple(sorted(rows, key=_acceptance)))
        for (decoder, _), rows in found.items()
    ]


def _name(decoder: str, rows: list[Row]) -> str:
    """What the contenders share; EESD may draft other lengths at other values of acceptance."""
    names = {row.contender.name.split("@")[0] for row in rows}
    return names.pop() if len(names) == 1 else f"{decoder}, best draft length"


def _acceptance(row: Row) -> float:
    return row.contender.acceptance or 0.0


def _place(row: Row) -> tuple[float, float] | None:
    """Acceptance and median speed-up."""
    rate, speedup = row.overall.acceptance_rate, row.overall.speedup
    if row.contender.acceptance is not None:
        rate = row.contender.acceptance
    return None if rate is None or speedup is None else (rate, speedup.median)


def _axes(rows: list[Row]) -> _Axes:
    rates = [place[0] for row in rows if (place := _place(row))]
    heights = [row.overall.speedup.high for row in rows if row.overall.speedup]
    heights += [row.overall.ideal_speedup or 0.0 for row in rows]
    first = max(0.0, int(min(rates) * 10 - 0.5) / 10)
    return _Axes(first=min(first, 0.9), top=1.08 * max(1.0, *heights))


def _scales(axes: _Axes) -> str:
    parts = [words("speed-up", 0, 12, kind="small")]
    step = next(each for each in (0.25, 0.5, 1, 2, 5, 10, 50) if axes.top / each < 9)
    for at in range(int(axes.top / step) + 1):
        value = at * step
        y = axes.y(value)
        kind = "reference" if value == 1 else "rule"
        parts.append(line(_LEFT, y, _LEFT + _WIDTH, y, kind))
        parts.append(words(f"{value:g}", _LEFT - 1, y + 4, kind="small", anchor="end"))
    base = _TOP + _HEIGHT
    tenths = range(round(axes.first * 10), 11)
    for tenth in tenths:
        if len(tenths) > 6 and tenth % 2:
            continue
        x = axes.x(tenth / 10)
        parts.append(line(x, base, x, base + 4, "rule"))
        parts.append(words(f"{tenth * 10}%", x, base + 18, kind="small", anchor="middle"))
    parts.append(words("acceptance", 100, base + 36, kind="small", anchor="end"))
    return "".join(parts)


def _family(family: Family, axes: _Axes) -> str:
    parts = [_curve(family, axes)]
    for row in family.rows:
        speedup, ideal = row.overall.speedup, row.overall.ideal_speedup
        assert speedup is not None
        x = axes.x(_acceptance(row))
        title = f"{row.contender.name}: {speedup.median:.2f} "
        title += f"({speedup.low:.2f}–{speedup.high:.2f})"
        if ideal is not None:
            title += f", ideal {ideal:.2f}"
        ends = [axes.y(speedup.low), axes.y(speedup.high)]
        parts.append(line(x, ends[0], x, ends[1], f"whisker {family.kind}"))
        place = {"cx": f"{x:.2f}%", "cy": f"{axes.y(speedup.median):.1f}"}
        parts.append(tag("circle", tag("title", escape(title)), r=4.5, class_=family.kind, **place))
    return "".join(parts)


def _curve(family: Family, axes: _Axes) -> str:
    """The formula through the ideal values of the family, in a space of its own that stretches."""
    points = [
        (_acceptance(row), row.overall.ideal_speedup)
        for row in family.rows
        if row.overall.ideal_speedup
    ]
    path = " ".join(
        f"{'L' if at else 'M'}{axes.x(rate) * 10:.1f} {axes.y(speedup):.1f}"
        for at, (rate, speedup) in enumerate(between(points))
    )
    if not path:
        return ""
    height = _TOP + _HEIGHT
    space = {"width": "100%", "height": height, "viewBox": f"0 0 1000 {height}"}
    drawn = tag("path", d=path, class_=f"curve {family.kind}", vector_effect="non-scaling-stroke")
    return tag("svg", drawn, preserveAspectRatio="none", **space)


def between(points: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Fill in a curve of speed-ups, straight in the time per token (one over the speed-up).

    With PPSD that time falls in proportion to the acceptance, so its curve is exact.
    """
    for (rate, speedup), (next_rate, next_speedup) in zip(points, points[1:], strict=False):
        for step in range(_STEPS):
            share = step / _STEPS
            seconds = (1 - share) / speedup + share / next_speedup
            yield rate + share * (next_rate - rate), 1 / seconds
    yield from points[-1:]


def _real(row: Row, axes: _Axes) -> str:
    place = _place(row)
    assert place is not None
    title = f"{row.contender.name}: {place[1]:.2f} at its own acceptance of {place[0]:.1%}"
    kind = f"square {colour(row.contender.decoder)}"
    mark = tag("rect", tag("title", escape(title)), x=-5, y=-5, width=10, height=10, class_=kind)
    at = {"x": f"{axes.x(place[0]):.2f}%", "y": f"{axes.y(place[1]):.1f}"}
    return tag("svg", mark, overflow="visible", **at)
