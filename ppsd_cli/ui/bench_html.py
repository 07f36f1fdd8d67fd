"""A benchmark report as one page that needs nothing else: no script, no request."""

from collections.abc import Sequence
from html import escape

from ppsd_cli.bench_records import BenchReport, Interval, Row
from ppsd_cli.ui import bench_data
from ppsd_cli.ui.bench_data import TableData
from ppsd_cli.ui.bench_style import STYLE
from ppsd_cli.ui.bench_svg import keys, speedup_bars, tag
from ppsd_cli.ui.bench_svg_curve import acceptance_curve
from ppsd_cli.ui.bench_svg_stages import (
    MOST_TICKS,
    busy_bars,
    run_histograms,
    tick_bars,
    tick_grid,
)
from ppsd_cli.ui.bench_words import NOTHING, headline, identical, leading_row, number, percent
from ppsd_cli.ui.text import escape_controls

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
"""
_SHORT = 18
"""Names of rows up to this length stay on one line."""
_FOOT = "</main>\n</body>\n</html>\n"
_STATES = (
    ("useful", "useful"),
    ("void", "void: a wrong guess, or built on one"),
    ("bubble", "bubble: nothing to do"),
)
_PARTS = (("wait", "wait"), ("head", "head and deciding"), ("layers", "layers of stage 0"))


def html_page(report: BenchReport) -> str:
    """Return the whole page.

    Everything that a model or a file wrote is escaped; control characters are made visible.
    """
    report = bench_data.printed(report)
    sections = (
        _masthead(report),
        _summary(report),
        _curve(report),
        _table(bench_data.categories(report)),
        _runs(report),
        _ticks(report),
        _busy(report),
        _grid(report),
        _table(bench_data.differences(report)),
        _gates(report),
        _table(bench_data.movements(report)),
        _table(bench_data.sources(report)),
        _table(bench_data.environment(report)),
    )
    title = f"ppsd bench {safe(bench_data.title(report))}"
    return _HEAD.format(title=title, style=STYLE) + "\n".join(filter(None, sections)) + _FOOT


def safe(text: str) -> str:
    """Text of any origin as markup that shows it."""
    return escape(escape_controls(text))


def _masthead(report: BenchReport) -> str:
    tasks = ", ".join(task.name for task in report.tasks)
    parts = [
        tag("p", "ppsd bench", class_="kicker"),
        tag("h1", f"{safe(tasks)} <span class='spread'>with</span> {safe(report.model)}"),
        tag("p", safe(headline(report)), class_="lead"),
    ]
    if report.incomplete:
        words = "The run was interrupted; the figures are those of the answers before."
        parts.append(tag("p", words, class_="failed"))
    if report.failures:
        failed = f"Gates failed: {len(report.failures)}, listed below under Gates."
        parts.append(tag("p", failed, class_="failed"))
    row = leading_row(report)
    return tag("header", "".join(parts) + (_facts(row) if row else ""))


def _facts(row: Row) -> str:
    """The figures of the contender that the run is about."""
    each = row.overall
    found = [
        ("speed-up", *_spread(each.speedup, 2)),
        ("tokens/s", *_spread(each.tokens_per_second, 1)),
        ("acceptance", percent(each.acceptance_rate), "of verified drafts"),
        ("tokens per tick", number(each.tokens_per_tick, 2), ""),
        ("equal to plain decoding", identical(each), "answers, token by token"),
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd>{_figure(value)}<small>{under}</small></dd></div>"
        for name, value, under in found
    )
    return tag("dl", items, class_="facts", aria_label=f"Figures of {row.contender.name}")


def _spread(value: Interval | None, digits: int) -> tuple[str, str]:
    if value is None:
        return number(None), ""
    low, high = number(value.low, digits), number(value.high, digits)
    return number(value.median, digits), f"95%: {low} to {high}"


def _figure(cell: str) -> str:
    """A cell's figure, with its interval set back."""
    if cell == NOTHING:
        return "–"
    figure, mark, spread = safe(cell).partition(" (")
    if not mark:
        return figure
    return f'{figure} <span class="spread">({_dash(spread)}</span>'


def _dash(text: str) -> str:
    """Intervals with the dash that print uses."""
    return text.replace("-", "–")


def _summary(report: BenchReport) -> str:
    bars = speedup_bars(report)
    section = _table(bench_data.summary(report))
    remarks = "".join(tag("p", safe(text), class_="note") for text in bench_data.remarks(report))
    if bars is None:
        return section + remarks
    legend = [("reference", "plain decoding (ar) = 1"), ("blue", "ppsd"), ("ochre", "eesd")]
    legend += [("plum", "hf-early-exit"), ("slate", "others, without guesses")]
    used = [(kind, text) for kind, text in legend if f'class="{kind}"' in bars]
    if any(row.overall.ideal_speedup is not None for row in report.rows):
        used.append(("ideal", "what the formula gives"))
    chart = _chart("Speed-up over plain decoding", "Lines across the ends are 95% intervals.")
    return section + remarks + chart + tag("figure", keys(used) + bars)


def _chart(heading: str, note: str) -> str:
    return tag("h2", escape(heading)) + tag("p", escape(note), class_="note")


def _curve(report: BenchReport) -> str:
    curve = acceptance_curve(report)
    if curve is None:
        return ""
    note = (
        "Drafts were right with a fixed probability in place of the head's own, which ran "
        "nevertheless. Points are measured, with 95% intervals; curves are what the formula "
        "allows where a tick costs nothing but the layers."
    )
    return _chart("Speed-up against acceptance", note) + tag("figure", curve)


def _figures(charts: Sequence[tuple[str, str]]) -> str:
    figures = (tag("figure", tag("figcaption", safe(name)) + chart) for name, chart in charts)
    return tag("div", "".join(figures), class_="pair")


def _runs(report: BenchReport) -> str:
    charts = run_histograms(report)
    note = "How many drafts in a row were right, and how often; all answers together."
    return _chart("Runs of accepted tokens", note) + _figures(charts) if charts else ""


def _ticks(report: BenchReport) -> str:
    table = bench_data.ticks(report)
    charts = tick_bars(report)
    if table is None:
        return ""
    note = "The dashed line is the whole tick (medians, so parts need not add up to it)."
    drawn = tag("p", note, class_="note") + keys(_PARTS) + _figures(charts) if charts else ""
    return _table(table) + drawn


def _busy(report: BenchReport) -> str:
    table = bench_data.busy(report)
    if table is None:
        return ""
    return _chart(table.title, table.note) + keys(_STATES) + _figures(busy_bars(report))


def _grid(report: BenchReport) -> str:
    grid = tick_grid(report.grid_events)
    if grid is None:
        return ""
    note = (
        f"One row a stage, one column a tick, the first {MOST_TICKS} ticks at most. A token moves "
        "down one stage a tick; a wrong guess voids all that entered after it."
    )
    legend = keys((("prompt", "prompt"), *_STATES))
    return _chart("One answer, tick by tick", note) + tag("figure", legend + grid)


def _gates(report: BenchReport) -> str:
    if not report.failures:
        return tag("h2", "Gates") + tag("p", "No gate failed.", class_="passed")
    items = (
        tag("li", f"<strong>{safe(each.gate)}</strong>: {safe(each.message)}")
        for each in report.failures
    )
    return tag("h2", "Gates") + tag("ul", "".join(items), class_="failed")


def _table(table: TableData | None) -> str:
    """Heading, table in a container that scrolls by itself, and note."""
    if table is None:
        return ""
    name = "table-" + "".join(each if each.isalnum() else "-" for each in table.title.lower())
    head = "".join(
        tag("th", _header(each.name), scope="col", class_="number" if each.numeric else None)
        for each in table.columns
    )
    body = "".join(tag("tr", _cells(table, row)) for row in table.rows)
    inner = tag("caption", safe(table.title)) + tag("thead", tag("tr", head)) + tag("tbody", body)
    region = {"role": "region", "aria_labelledby": name, "tabindex": 0}
    note = tag("p", safe(table.note), class_="note") if table.note else ""
    return (
        tag("h2", safe(table.title), id=name)
        + tag("div", tag("table", inner), class_="scroll", **region)
        + note
    )


def _cells(table: TableData, row: tuple[str, ...]) -> str:
    short = "short" if len(row[0]) <= _SHORT else None
    cells = [tag("th", safe(row[0]), scope="row", class_=short)]
    for column, cell in zip(table.columns[1:], row[1:], strict=True):
        if column.numeric:
            cells.append(tag("td", _figure(cell), class_="number"))
        else:
            cells.append(tag("td", "–" if cell == NOTHING else safe(cell), class_="text"))
    return "".join(cells)


def _header(name: str) -> str:
    """A header breaks before its last word, not inside it."""
    before, _, last = name.rpartition(" ")
    return f"{safe(before)} {tag('span', safe(last), class_='short')}"
