"""The tables of a benchmark on a terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ppsd_cli.bench_records import BenchReport, TaskInfo
from ppsd_cli.ui import bench_data
from ppsd_cli.ui.bench_data import TableData
from ppsd_cli.ui.bench_words import headline, size
from ppsd_cli.ui.text import escape_controls
from ppsd_cli.ui.timeline import escape_unencodable


def final_table(report: BenchReport) -> RenderableType:
    """Everything that a person wants to know at the end, the sentence that sums it up last.

    Tables that are too wide are drawn in parts, each with the names of its rows.
    """
    report = bench_data.printed(report)
    parts: list[RenderableType] = [Line(bench_data.title(report), "bold"), Text("")]
    for table in bench_data.figure_tables(report):
        parts += [Fitted(table), Text("")]
    parts += [Line(text, "dim") for text in bench_data.remarks(report)]
    parts += [
        Line(f"gate failed: {failure.gate}: {failure.message}", "bold red")
        for failure in report.failures
    ]
    if report.incomplete:
        parts.append(Line("Interrupted: the figures are those of the answers so far.", "yellow"))
    parts.append(Line(headline(report), "bold"))
    return Group(*parts)


def task_list(tasks: Sequence[tuple[TaskInfo, bool]]) -> RenderableType:
    """Tasks with where they come from; the flag says whether the prompts are on this machine."""
    width = max((len(task.name) for task, _ in tasks), default=0)
    lines: list[RenderableType] = []
    for task, here in tasks:
        facts = [f"{task.questions} questions", "here" if here else "not here yet"]
        if task.size is not None:
            facts.insert(1, size(task.size))
        origin = f"{task.source}; licence: {task.licence}"
        lines.append(Line(f"{task.name.ljust(width)}  {', '.join(facts)}", "bold" if here else ""))
        lines.append(Padding(Group(Line(task.about), Line(origin, "dim")), (0, 0, 0, 4)))
    return Group(*lines)


class Line:
    """A paragraph of text that others may have written, made safe for the console it meets."""

    def __init__(self, text: str, style: str = "") -> None:
        self._text = text
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield safe_text(self._text, console, self._style)


class Fitted:
    """A table in as many parts as the width of the console asks for."""

    def __init__(self, table: TableData) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield safe_text(self._table.title, console, "bold")
        for at, part in enumerate(fit(self._table, console, options)):
            if at:
                yield Text("")
            yield _draw(part, console)
        if self._table.note:
            yield safe_text(self._table.note, console, "dim")


def fit(table: TableData, console: Console, options: ConsoleOptions) -> list[TableData]:
    """Spread the columns after the first over tables that fit; a column too wide has its own."""
    parts: list[list[int]] = [[0]]
    for at in range(1, len(table.columns)):
        wider = [*parts[-1], at]
        if len(wider) > 2 and not _fits(table.cut(wider), console, options):
            parts.append([0, at])
        else:
            parts[-1] = wider
    return [table.cut(names) for names in parts]


def _fits(table: TableData, console: Console, options: ConsoleOptions) -> bool:
    unlimited = options.update(max_width=100_000)
    needed = Measurement.get(console, unlimited, _draw(table, console)).maximum
    return needed <= options.max_width


def _draw(data: TableData, console: Console) -> Table:
    """One table; only text columns wrap, so that numbers stay whole as long as they can."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in data.columns:
        table.add_column(
            _header(column.name, console),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            overflow="fold",
        )
    for row in data.rows:
        table.add_row(*(safe_text(cell, console) for cell in row))
    return table


def _header(name: str, console: Console) -> Text:
    """Names in two lines, so that columns are no wider than their figures."""
    before, _, last = name.replace("/tick", "/ tick").rpartition(" ")
    return safe_text(f"{before}\n{last}" if before else last, console)


def safe_text(text: str, console: Console, style: str = "") -> Text:
    """Text without markup or control characters, in characters that the console has."""
    return Text(escape_unencodable(escape_controls(text), console.encoding), style=style)
