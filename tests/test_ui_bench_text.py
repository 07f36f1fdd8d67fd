"""Tables, Markdown and CSV of a benchmark, against golden files.

``PPSD_UPDATE_GOLDEN=1 pytest tests/test_ui_bench_text.py`` writes them anew; read the diff.
"""

import csv as csv_module
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from ppsd_cli.bench_records import BenchReport, Difference, Interval, Movement, TaskInfo
from ppsd_cli.ui import bench_data
from ppsd_cli.ui.bench_html import html_page
from ppsd_cli.ui.bench_table import final_table, task_list
from ppsd_cli.ui.bench_text import csv, escaped, markdown
from ppsd_cli.ui.bench_words import duration, headline, number, size
from tests.ui_bench_report import AR, EMPTY, fixed_report, row, sample, small_report

GOLDEN = Path(__file__).parent / "golden"


def drawn(thing: RenderableType, width: int = 100, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=out, width=width, legacy_windows=False, _environ={})
    console.print(thing)
    assert isinstance(out.buffer, io.BytesIO)
    text = out.buffer.getvalue().decode(encoding)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def check(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("PPSD_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def full_report() -> BenchReport:
    """With everything that may stand in a report."""
    base = small_report()
    explained = replace(
        sample("eesd-4", "83", difference=Difference(3, 1, 2, 0.01, tolerance=0.05))
    )
    threads = sample("eesd-4", "84", difference=Difference(9, 1, 2, 2.5, same_threads_equal=True))
    beyond = sample("eesd-4", "85", difference=Difference(9, 1, 2, 2.5, tolerance=0.05))
    ratio = Interval(0.88, 0.85, 0.91)
    return replace(
        base,
        samples=(*base.samples, explained, threads, beyond),
        skipped=(("hf", "transformers has no such model"),),
        notes=("ar ran with 1 thread, its fastest",),
        baseline=(Movement("ppsd", "tokens_per_second", 41.8, 36.8, ratio, "slower"),),
        incomplete=True,
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_golden_table(width: int) -> None:
    check(f"bench_table_{width}.txt", drawn(final_table(full_report()), width))


def test_golden_markdown() -> None:
    check("bench_table.md", markdown(full_report()))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_table_keeps_every_figure_at_any_width(width: int) -> None:
    report = fixed_report()
    text = drawn(final_table(report), width)
    assert all(len(line) <= width for line in text.splitlines())
    for table in (bench_data.summary(report), bench_data.ticks(report), bench_data.busy(report)):
        assert table is not None
        for column in range(1, len(table.columns)):
            for cells in table.rows:
                assert cells[column] in text


def test_ascii_terminal_gets_ascii() -> None:
    report = replace(small_report(), model="模型", notes=("\x1b[31mred",))
    text = drawn(final_table(report), encoding="ascii")
    assert "\\u6a21\\u578b" in text
    assert "\\x1b[31mred" in text


def test_names_are_not_markup() -> None:
    base = small_report()
    rows = (replace(base.rows[0], contender=replace(AR, name="[red]ar[/]")), *base.rows[1:])
    assert "[red]ar[/]" in drawn(final_table(replace(base, rows=rows)))


def with_speedup(speedup: Interval | None) -> BenchReport:
    base = small_report()
    ar, _, ppsd, _ = base.rows
    return replace(base, rows=(ar, replace(ppsd, overall=replace(ppsd.overall, speedup=speedup))))


def test_headline_is_honest() -> None:
    assert headline(with_speedup(Interval(1.2, 1.1, 1.3))).startswith("Speculation paid off")
    slower = headline(with_speedup(Interval(0.8, 0.7, 0.9)))
    assert slower.startswith("Speculation did not pay off: ppsd was slower")
    assert "0.80 times" in slower
    assert headline(with_speedup(Interval(1.2, 0.9, 1.3))).startswith("No clear difference")
    assert "cannot be said" in headline(with_speedup(None))
    assert "no speculation" in headline(replace(small_report(), rows=(row(AR, EMPTY),)))


def test_headline_names_the_faster_rival_and_differing_answers() -> None:
    base = small_report()
    eesd = base.rows[3]
    assert "was faster" not in headline(base)
    better = replace(eesd, overall=replace(eesd.overall, speedup=Interval(1.5, 1.4, 1.6)))
    text = headline(replace(base, rows=(*base.rows[:3], better)))
    assert text.endswith("; eesd-4 was faster, at 1.50.")
    assert "in 78 of 80 answers" in headline(replace(base, rows=(base.rows[0], eesd)))


def test_headline_of_fixed_acceptance_is_no_claim_about_a_head() -> None:
    report = fixed_report()
    rows = tuple(each for each in report.rows if each.contender.acceptance in (None, 1.0))
    fixed = tuple(each for each in rows if each.contender.decoder == "ar") + rows[-2:]
    text = headline(replace(report, rows=fixed))
    assert "drafts made right 100% of the time in place of a head's own" in text


def test_differences_are_explained_where_they_can_be() -> None:
    table = bench_data.differences(full_report())
    assert table is not None
    assert [cells[-1] for cells in table.rows] == [
        "-",
        "-",
        "rounding (up to 0.0500)",
        "another number of threads",
        "beyond rounding",
    ]


def test_long_list_of_differences_says_what_it_left_out() -> None:
    difference = Difference(1, 2, 3, None)
    samples = tuple(sample("ppsd", str(at), difference=difference) for at in range(27))
    table = bench_data.differences(replace(small_report(), samples=samples))
    assert table is not None
    assert len(table.rows) == 20
    assert "7 more" in table.note


def test_unprinted_rows_are_nowhere() -> None:
    base = small_report()
    rows = tuple(replace(each, printed=each.contender.name != "eesd-4") for each in base.rows)
    hidden = replace(base, rows=rows)
    for text in (drawn(final_table(hidden)), markdown(hidden), csv(hidden)):
        assert "ppsd" in text
        assert "eesd-4" not in text


def test_markdown_cells_stay_cells() -> None:
    evil = "a|b\n<img src=x> [x](y) `c` **d**"
    report = replace(small_report(), environment=((evil, evil),), model=evil)
    lines = [line for line in markdown(report).splitlines() if "img" in line and line[0] == "|"]
    assert len(lines) == 2
    for line in lines:
        assert line.count("|") - line.count("\\|") == 3
        assert "\\<img src=x\\>" in line
    assert escaped("hf_x") == "hf\\_x"


def test_csv_has_a_line_for_each_contender_and_category() -> None:
    report = small_report()
    lines = list(csv_module.DictReader(io.StringIO(csv(report))))
    assert len(lines) == len(report.rows) * 5
    ppsd = next(line for line in lines if line["contender"] == "ppsd" and not line["category"])
    assert float(ppsd["speedup_low"]) == report.rows[2].overall.speedup.low  # type: ignore[union-attr]
    assert float(ppsd["acceptance_rate"]) == 0.706
    assert ppsd["ideal_speedup"] == ""
    assert {line["category"] for line in lines} == {"", "writing", "roleplay", "coding", "maths"}


def test_csv_quotes_what_files_say() -> None:
    base = small_report()
    named = replace(base.rows[0], categories=(('a,"b"\nc', EMPTY),))
    lines = list(csv_module.DictReader(io.StringIO(csv(replace(base, rows=(named,))))))
    assert lines[1]["category"] == 'a,"b"\nc'


def test_every_format_can_be_written_to_a_file() -> None:
    """A lone surrogate, which JSON may hold, has no UTF-8."""
    base = small_report()
    rows = tuple(
        replace(each, categories=tuple((f"\ud800{name}", part) for name, part in each.categories))
        for each in base.rows
    )
    report = replace(base, rows=rows, model="\ud800")
    for text in (csv(report), markdown(report), html_page(report), drawn(final_table(report))):
        assert "\\ud800" in text.encode().decode()


def test_task_list_says_what_is_here() -> None:
    mt = TaskInfo("mt-bench", "Open questions", "lm-sys/mt", "Apache-2.0", 80, 42_000, "00")
    smoke = TaskInfo("smoke", "A dozen of ours", "this package", "MIT", 12, None, None)
    text = drawn(task_list([(mt, False), (smoke, True)]), 60)
    assert text.splitlines()[0] == "mt-bench  80 questions, 42.0 kB, not here yet"
    assert text.splitlines()[3] == "smoke     12 questions, here"
    assert "lm-sys/mt; licence: Apache-2.0" in text


def test_words() -> None:
    assert [size(each) for each in (None, 12, 2_100_000)] == ["-", "12 bytes", "2.1 MB"]
    assert [duration(each) for each in (20, 720, 7200)] == ["20 s", "12 min", "2.0 h"]
    assert [number(each) for each in (None, 3.14, 1234.5)] == ["-", "3.1", "1234"]
