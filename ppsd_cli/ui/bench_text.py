"""A benchmark report as Markdown for GitHub, and as CSV."""

import io
import re
from csv import writer

from ppsd_cli.bench_records import BenchReport, Figures, Interval, Row
from ppsd_cli.ui import bench_data
from ppsd_cli.ui.bench_data import TableData
from ppsd_cli.ui.bench_words import headline
from ppsd_cli.ui.text import escape_controls

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#$&])")
_SPREAD = ("tokens_per_second", "end_to_end_tokens_per_second", "first_token_seconds", "speedup")
_PLAIN = (
    "ideal_speedup",
    "acceptance_rate",
    "tokens_per_tick",
    "flushes",
    "void_drafts",
    "identical",
    "largest_logit_gap",
    "tick_seconds",
    "peak_memory",
)
_FIRST = ("contender", "decoder", "fixed_acceptance", "category", "answers", "tokens")


def markdown(report: BenchReport) -> str:
    """Headline and tables; text of others is escaped, so that it shows as it is."""
    report = bench_data.printed(report)
    tables = (
        *bench_data.figure_tables(report),
        bench_data.sources(report),
        bench_data.environment(report),
    )
    parts = [f"## {escaped(bench_data.title(report))}", escaped(headline(report))]
    if report.incomplete:
        parts.append("**Interrupted: the figures are those of the answers so far.**")
    remarks = [escaped(text) for text in bench_data.remarks(report)]
    failures = [
        f"**Gate failed**: {escaped(each.gate)}: {escaped(each.message)}"
        for each in report.failures
    ]
    parts += ["\n".join(f"- {text}" for text in part) for part in (failures, remarks) if part]
    parts += [_table(table) for table in tables if table is not None]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """``text`` on one line, without meaning in Markdown, HTML or tables."""
    return _SPECIAL.sub(r"\\\1", " ".join(escape_controls(text).split()))


def _table(table: TableData) -> str:
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    head = [escaped(column.name) for column in table.columns]
    rows = [[escaped(cell) for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
    note = f"\n\n{escaped(table.note)}" if table.note else ""
    return f"### {escaped(table.title)}\n\n" + "\n".join(lines) + note


def csv(report: BenchReport) -> str:
    """One line for each contender and category, all prompts first (an empty category).

    Figures are in full, seconds and bytes; what cannot be said is empty.
    """
    out = io.StringIO()
    lines = writer(out, lineterminator="\n")
    spreads = [f"{name}{end}" for name in _SPREAD for end in ("", "_low", "_high")]
    lines.writerow([*_FIRST, *spreads, *_PLAIN])
    for row in bench_data.printed(report).rows:
        for category, figures in (("", row.overall), *row.categories):
            lines.writerow(_csv_cells(row, category, figures))
    return out.getvalue()


def _csv_cells(row: Row, category: str, figures: Figures) -> list[object]:
    who = row.contender
    cells: list[object] = [who.name, who.decoder, who.acceptance, escape_controls(category)]
    cells += [figures.answers, figures.tokens]
    for name in _SPREAD:
        value: Interval | None = getattr(figures, name)
        cells += ["", "", ""] if value is None else [value.median, value.low, value.high]
    return cells + [getattr(figures, name) for name in _PLAIN]
