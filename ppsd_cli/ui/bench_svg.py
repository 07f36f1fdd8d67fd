"""Charts of a benchmark report as inline SVG, drawn without scripts. Pure.

Horizontal places are shares of the width in percent, so that a chart fills its container at any
width while its text keeps its size; colours are classes that the page's style defines.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ppsd_cli.bench_records import BenchReport, Interval, Row
from ppsd_cli.ui.bench_words import PLAIN, SPECULATIVE, interval, number

_ROW = 44
_BAR_TOP = 20
_BAR = 14
_CAP = 4
_COLOURS = dict(zip(SPECULATIVE, ("blue", "ochre", "plum"), strict=True))


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; ``content`` is markup already. ``_`` in names becomes ``-``, at the end nothing.

    >>> tag("rect", x="1%", class_="blue")
    '<rect x="1%" class="blue"></rect>'
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{''.join(pairs)}>{content}</{name}>"


def picture(title: str, content: str, height: int) -> str:
    """A chart with the name that screen readers say."""
    name = tag("title", escape(title))
    label = escape(title)
    return tag("svg", name + content, class_="chart", height=height, role="img", aria_label=label)


def words(text: str, x: float, y: float, *, kind: str = "", anchor: str = "start") -> str:
    """Text at ``x`` percent and ``y`` pixels."""
    return tag("text", escape(text), x=f"{x:.2f}%", y=f"{y:g}", class_=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line from ``x1`` to ``x2`` percent."""
    ends = {"x1": f"{x1:.2f}%", "x2": f"{x2:.2f}%", "y1": f"{y1:g}", "y2": f"{y2:g}"}
    return tag("line", class_=kind, **ends)


def diamond(x: float, y: float, title: str) -> str:
    """The mark of an ideal value."""
    shape = tag("path", tag("title", escape(title)), d="M0-6 6 0 0 6-6 0z", class_="ideal")
    return tag("svg", shape, x=f"{x:.2f}%", y=f"{y:g}", overflow="visible")


def colour(decoder: str) -> str:
    """Class of a decoder's colour; those that do not guess are grey."""
    return _COLOURS.get(decoder, "slate")


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a bar, in the unit of the chart."""

    kind: str
    begin: float
    end: float
    title: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar with its name over it at the left and its figures at the right."""

    label: str
    figures: str
    segments: tuple[Segment, ...]
    spread: Interval | None = None
    ideal: float | None = None


def bars(title: str, rows: Sequence[Bar], *, end: float, reference: float | None = None) -> str:
    """Bars under each other on a scale from 0 to ``end``; ``reference`` is a line across them."""
    parts = [_bar(row, at * _ROW, end, reference) for at, row in enumerate(rows)]
    return picture(title, "".join(parts), len(rows) * _ROW)


def _bar(row: Bar, top: int, end: float, reference: float | None) -> str:
    middle = top + _BAR_TOP + _BAR / 2
    parts = [
        words(row.label, 0, top + 14, kind="name"),
        words(row.figures, 100, top + 14, kind="figure", anchor="end"),
        _rect("track", 0, 100, top),
    ]
    for each in row.segments:
        begin, width = 100 * each.begin / end, 100 * (each.end - each.begin) / end
        parts.append(_rect(each.kind, begin, width, top, each.title))
    if reference is not None:
        at = 100 * reference / end
        parts.append(line(at, top + _BAR_TOP - 3, at, top + _BAR_TOP + _BAR + 3, "reference"))
    if row.spread is not None:
        parts.append(_whisker(100 * row.spread.low / end, 100 * row.spread.high / end, middle))
    if row.ideal is not None:
        parts.append(diamond(100 * row.ideal / end, middle, f"ideal {row.ideal:.2f}"))
    return "".join(parts)


def _rect(kind: str, x: float, width: float, top: int, title: str = "") -> str:
    name = tag("title", escape(title)) if title else ""
    place = {"x": f"{x:.3f}%", "width": f"{max(width, 0):.3f}%", "y": top + _BAR_TOP}
    return tag("rect", name, class_=kind, height=_BAR, **place)


def _whisker(low: float, high: float, y: float) -> str:
    """An interval; its halo sets it off from the bar in either theme."""
    return "".join(
        line(low, y, high, y, kind)
        + line(low, y - _CAP, low, y + _CAP, kind)
        + line(high, y - _CAP, high, y + _CAP, kind)
        for kind in ("halo", "whisker")
    )


def speedup_bars(report: BenchReport) -> str | None:
    """Speed-up of each contender with its interval, against a line at 1."""
    rows = [row for row in report.rows if row.overall.speedup and row.contender.decoder != PLAIN]
    if not rows:
        return None
    drawn = [_speedup_bar(row) for row in rows]
    tops = [bar.spread.high for bar in drawn if bar.spread]
    ideals = [bar.ideal for bar in drawn if bar.ideal is not None]
    end = 1.04 * max([1.0, *tops, *ideals])
    return bars("Speed-up over plain decoding, by contender", drawn, end=end, reference=1.0)


def _speedup_bar(row: Row) -> Bar:
    speedup, ideal = row.overall.speedup, row.overall.ideal_speedup
    assert speedup is not None
    figures = interval(speedup, 2).replace("-", "–")
    if ideal is not None:
        figures += f", ideal {number(ideal, 2)}"
    title = f"{row.contender.name}: {figures}"
    segment = Segment(colour(row.contender.decoder), 0, speedup.median, title)
    return Bar(row.contender.name, figures, (segment,), spread=speedup, ideal=ideal)


def keys(entries: Iterable[tuple[str, str]]) -> str:
    """The legend of a chart: ``(class, meaning)`` pairs."""
    items = (tag("li", tag("i", class_=f"key {kind}") + escape(text)) for kind, text in entries)
    return tag("ul", "".join(items), class_="legend")
