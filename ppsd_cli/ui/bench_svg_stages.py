"""What stages did, as SVG: accepted runs, parts of a tick, busy shares, the grid of ticks."""

from collections.abc import Iterable
from html import escape

from ppsd_cli.bench_records import BenchReport, Row
from ppsd_cli.core.events import Committed, Entered, Finished, Flushed, Ticked, Verified
from ppsd_cli.core.occupancy import Cell, Occupancy
from ppsd_cli.ui.bench_data import real_rows
from ppsd_cli.ui.bench_svg import Bar, Segment, bars, colour, line, picture, tag, words
from ppsd_cli.ui.bench_words import milliseconds, percent

MOST_TICKS = 80
_BAND = 40
"""Ticks side by side; a second band follows below, so that a telephone shows the cells."""
_LEFT = 7.0
_CELL = 18
_LONGEST = 16
"""Longer runs are drawn together."""
_PLOT = 130
_NAMES = {Cell.USEFUL: "useful", Cell.VOID: "void", Cell.BUBBLE: "bubble", Cell.PROMPT: "prompt"}
_EVENTS = (Committed, Entered, Finished, Flushed, Ticked, Verified)


def run_histograms(report: BenchReport) -> list[tuple[str, str]]:
    """``(caption, chart)`` of each contender that had guesses accepted."""
    return [(row.contender.name, _histogram(row)) for row in real_rows(report) if row.overall.runs]


def _histogram(row: Row) -> str:
    counts = dict.fromkeys(range(1, _LONGEST + 1), 0)
    longer = 0
    for length, count in row.overall.runs:
        if length in counts:
            counts[length] += count
        else:
            longer += count
    shown = range(1, max([8, *(length for length, count in counts.items() if count)]) + 1)
    drawn = [(str(length), counts[length]) for length in shown]
    if longer:
        drawn.append((f">{shown[-1]}", longer))
    most, width = max(count for _, count in drawn), 100 / len(drawn)
    parts = []
    for at, (label, count) in enumerate(drawn):
        height = round(_PLOT * count / most, 1)
        title = tag("title", escape(f"{count} runs of {label} accepted tokens"))
        place = {"x": f"{(at + 0.1) * width:.2f}%", "width": f"{0.8 * width:.2f}%"}
        box = {"y": 18 + _PLOT - height, "height": height, "class_": colour(row.contender.decoder)}
        middle = (at + 0.5) * width
        parts += [
            tag("rect", title, **place, **box),
            words(str(count), middle, 14 + _PLOT - height, kind="small", anchor="middle"),
            words(label, middle, 34 + _PLOT, kind="small", anchor="middle"),
        ]
    parts.append(line(0, 18 + _PLOT, 100, 18 + _PLOT, "rule"))
    return picture(f"Runs of accepted tokens, {row.contender.name}", "".join(parts), _PLOT + 40)


def tick_bars(report: BenchReport) -> list[tuple[str, str]]:
    """``(caption, chart)`` of each contender with ticks: parts of stage 0's tick, then stages."""
    rows = [row for row in real_rows(report) if row.overall.tick_seconds]
    end = max((1.02 * _longest(row) for row in rows), default=1.0)
    charts = []
    for row in rows:
        title = f"Tick breakdown, {row.contender.name}"
        chart = bars(title, _tick_rows(row), end=end, reference=row.overall.tick_seconds)
        charts.append((f"{row.contender.name}: a tick of {_time(row.overall.tick_seconds)}", chart))
    return charts


def _parts(row: Row) -> tuple[tuple[str, float], ...]:
    each = row.overall
    seconds = (each.wait_seconds, each.draft_seconds, each.layers_seconds)
    found = zip(("wait", "head", "layers"), seconds, strict=True)
    return tuple((name, part) for name, part in found if part is not None)


def _longest(row: Row) -> float:
    parts = sum(seconds for _, seconds in _parts(row))
    return max(parts, row.overall.tick_seconds or 0.0, *row.overall.stage_seconds)


def _tick_rows(row: Row) -> list[Bar]:
    segments, begin = [], 0.0
    for name, seconds in _parts(row):
        segments.append(Segment(name, begin, begin + seconds, f"{name} {_time(seconds)}"))
        begin += seconds
    figures = " + ".join(_time(seconds, unit=False) for _, seconds in _parts(row))
    rows = [Bar("stage 0's tick", f"{figures} ms", tuple(segments))] if segments else []
    what = "one burst" if row.contender.decoder == "eesd" else "one token"
    for stage, seconds in enumerate(row.overall.stage_seconds):
        whole = Segment("slate", 0, seconds, f"stage {stage}: {_time(seconds)}")
        rows.append(Bar(f"{what} in stage {stage}", _time(seconds), (whole,)))
    return rows


def _time(seconds: float | None, *, unit: bool = True) -> str:
    text = milliseconds(seconds)
    return text if unit else text.removesuffix(" ms")


def busy_bars(report: BenchReport) -> list[tuple[str, str]]:
    """``(caption, chart)`` of contenders with several stages: useful, void and bubble shares."""
    charts = []
    for row in real_rows(report):
        if len(row.overall.stage_busy) > 1:
            drawn = [_busy_bar(at, each) for at, each in enumerate(row.overall.stage_busy)]
            chart = bars(f"What the stages did, {row.contender.name}", drawn, end=1.0)
            charts.append((row.contender.name, chart))
    return charts


def _busy_bar(stage: int, shares: tuple[float, float, float]) -> Bar:
    segments, begin = [], 0.0
    for name, share in zip(("useful", "void", "bubble"), shares, strict=True):
        segments.append(Segment(name, begin, begin + share, f"{name} {percent(share)}"))
        begin += share
    figures = " / ".join(percent(share, 0) for share in shares)
    return Bar(f"stage {stage}", figures, tuple(segments))


def tick_grid(events: Iterable[object]) -> str | None:
    """The first ticks of one answer, a row a stage; None without events."""
    occupancy = Occupancy()
    stages = 0
    for event in events:
        if isinstance(event, _EVENTS):
            occupancy.add(event)
        if isinstance(event, Verified):
            stages = max(stages, len(event.spans))
    first = occupancy.first_tick
    if first is None or not stages:
        return None
    end = min(occupancy.last_tick + 1, first + MOST_TICKS)
    tall = stages * _CELL + 30
    cells = [[occupancy.cell(stage, tick) for tick in range(first, end)] for stage in range(stages)]
    starts = range(0, end - first, _BAND)
    bands = [_band(cells, start, at * tall) for at, start in enumerate(starts)]
    return picture("Stages by ticks of one answer", "".join(bands), len(starts) * tall)


def _band(cells: list[list[Cell]], start: int, top: int) -> str:
    """Ticks from ``start``, counted from the first of the answer; ``cells`` by stage and tick."""
    width = (100 - _LEFT) / _BAND
    parts = []
    for stage, row in enumerate(cells):
        y = top + stage * _CELL
        parts.append(words(str(stage), _LEFT - 1.5, y + 13, kind="small", anchor="end"))
        for at, cell in enumerate(row[start : start + _BAND]):
            name = _NAMES[cell]
            title = tag("title", f"tick {start + at}, stage {stage}: {name}")
            place = {"x": f"{_LEFT + at * width:.2f}%", "width": f"{0.88 * width:.2f}%"}
            # Height tells the state apart without colour.
            inset = {"useful": 1, "prompt": 1, "void": 4, "bubble": 7}[name]
            box = {"y": y + inset, "height": _CELL - 2 * inset, "class_": name}
            parts.append(tag("rect", title, **place, **box))
    for at in range(0, min(_BAND, len(cells[0]) - start), 10):
        y = top + len(cells) * _CELL + 13
        parts.append(words(str(start + at), _LEFT + at * width, y, kind="small"))
    return "".join(parts)
