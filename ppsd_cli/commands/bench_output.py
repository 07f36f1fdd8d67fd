"""A benchmark's report on stdout and in files."""

import io
import json
import sys

from rich.console import Console

from ppsd_cli.bench_records import BenchReport
from ppsd_cli.commands.bench_options import BenchOptions
from ppsd_cli.files import replace_bytes
from ppsd_cli.tasks.bench.export import report_data
from ppsd_cli.ui.bench_html import html_page
from ppsd_cli.ui.bench_table import final_table
from ppsd_cli.ui.bench_text import csv, markdown

_FILE_COLUMNS = 120


def write_report(report: BenchReport, options: BenchOptions) -> None:
    """In the format that was asked for, to stdout or a file; and the page, if it was asked for."""
    if options.report is not None:
        replace_bytes(options.report, html_page(report).encode())
    if options.output is not None:
        replace_bytes(options.output, _text(report, options.format).encode())
    elif options.format == "table":
        Console().print(final_table(report))
    else:
        sys.stdout.write(_text(report, options.format))
        sys.stdout.flush()


def _text(report: BenchReport, kind: str) -> str:
    if kind == "json":
        return json.dumps(report_data(report), ensure_ascii=False) + "\n"
    if kind == "csv":
        return csv(report)
    if kind == "markdown":
        return markdown(report)
    file = io.StringIO()
    Console(file=file, width=_FILE_COLUMNS, color_system=None).print(final_table(report))
    return file.getvalue()
