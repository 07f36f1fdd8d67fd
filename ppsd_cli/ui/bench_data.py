"""The tables of a benchmark report as plain rows of text, which each format draws in its way."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ppsd_cli.bench_records import BenchReport, Difference, Figures, Row, Sample
from ppsd_cli.ui.bench_words import (
    NOTHING,
    PLAIN,
    identical,
    interval,
    milliseconds,
    number,
    percent,
    seconds_interval,
    size,
    speculates,
)

MOST_DIFFERENCES = 20
"""Differing answers that are listed; the JSON has all of them."""


@dataclass(frozen=True, slots=True)
class Column:
    """``numeric`` columns are right-aligned."""

    name: str
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class TableData:
    """A table; its first column names the row. Each row has one cell a column."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def cut(self, names: Iterable[int]) -> "TableData":
        """The same table with only the columns of these indices."""
        kept = tuple(names)
        rows = tuple(tuple(row[at] for at in kept) for row in self.rows)
        return TableData(self.title, tuple(self.columns[at] for at in kept), rows, self.note)


def title(report: BenchReport) -> str:
    """What was run, in a few words."""
    tasks = ", ".join(task.name for task in report.tasks)
    return f"{tasks}: {report.model}"


def printed(report: BenchReport) -> BenchReport:
    """The report without the rows that only the JSON has, and without their samples."""
    rows = tuple(row for row in report.rows if row.printed)
    names = {row.contender.name for row in rows}
    samples = tuple(sample for sample in report.samples if sample.contender in names)
    return replace(report, rows=rows, samples=samples)


def remarks(report: BenchReport) -> list[str]:
    """Lines about contenders that did not run, and what else a reader should know."""
    skipped = [f"{name} did not run: {reason}" for name, reason in report.skipped]
    return [*skipped, *report.notes]


_SUMMARY: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("tokens/s", lambda each: interval(each.tokens_per_second)),
    ("speed-up", lambda each: interval(each.speedup, 2)),
    ("ideal", lambda each: number(each.ideal_speedup, 2)),
    ("acceptance", lambda each: percent(each.acceptance_rate)),
    ("tokens/tick", lambda each: number(each.tokens_per_tick, 2)),
    ("identical", identical),
    ("end-to-end tokens/s", lambda each: interval(each.end_to_end_tokens_per_second)),
    ("first token", lambda each: seconds_interval(each.first_token_seconds)),
    ("flushes", lambda each: _pipeline_count(each, each.flushes)),
    ("void drafts", lambda each: _pipeline_count(each, each.void_drafts)),
    ("peak memory", lambda each: size(each.peak_memory)),
)


def _pipeline_count(figures: Figures, count: int) -> str:
    """A count that says something only where drafts were verified."""
    return NOTHING if figures.acceptance_rate is None else str(count)


def figure_tables(report: BenchReport) -> list[TableData]:
    """The tables of figures that a person reads from top to bottom; those without rows are out."""
    makers = (summary, categories, ticks, busy, differences, movements)
    return [table for table in (make(report) for make in makers) if table is not None]


def summary(report: BenchReport) -> TableData:
    """One row a contender; columns that no contender has a figure for are left out."""
    columns = (Column("contender", numeric=False), *(Column(name) for name, _ in _SUMMARY))
    rows = tuple(
        (row.contender.name, *(cell(row.overall) for _, cell in _SUMMARY)) for row in report.rows
    )
    note = (
        "Medians with 95% intervals over prompts. tokens/s counts decoding after the first token, "
        "end-to-end tokens/s the whole answer. speed-up is over ar, prompt by prompt."
    )
    if any(row.overall.ideal_speedup is not None for row in report.rows):
        note += " ideal is what the formula gives for the fixed acceptance."
    return _without_empty(TableData("Contenders", columns, rows, note))


def categories(report: BenchReport) -> TableData | None:
    """Speed-up and acceptance by category; None where there are not several categories.

    Contenders of fixed acceptance are shown only where there are no others that guess.
    """
    names = list(dict.fromkeys(name for row in report.rows for name, _ in row.categories))
    if len(names) < 2:
        return None
    columns = [Column("category", numeric=False), Column("answers")]
    cells: dict[str, list[str]] = {name: [name, _answers(report.rows, name)] for name in names}
    for row in real_rows(report):
        by_name = dict(row.categories)
        plain = row.contender.decoder == PLAIN
        measure = "tokens/s" if plain else "speed-up"
        columns.append(Column(f"{row.contender.name} {measure}"))
        drafts = row.contender.acceptance is None and row.overall.acceptance_rate is not None
        if drafts:
            columns.append(Column(f"{row.contender.name} acceptance"))
        for name in names:
            figures = by_name.get(name)
            cells[name].append(_speed(figures, plain=plain))
            if drafts:
                cells[name].append(percent(figures.acceptance_rate if figures else None))
    rows = tuple(tuple(row) for row in cells.values())
    return _without_empty(TableData("By category", tuple(columns), rows))


def _speed(figures: Figures | None, *, plain: bool) -> str:
    """Speed-up; of plain decoding itself its tokens/s."""
    if figures is None:
        return NOTHING
    return interval(figures.tokens_per_second) if plain else interval(figures.speedup, 2)


def real_rows(report: BenchReport) -> tuple[Row, ...]:
    """The rows of real heads and baselines; all rows where no real head took part."""
    real = tuple(row for row in report.rows if row.contender.acceptance is None)
    return real if any(speculates(row.contender) for row in real) else report.rows


def _answers(rows: tuple[Row, ...], category: str) -> str:
    counts = [
        figures.answers for row in rows for name, figures in row.categories if name == category
    ]
    return str(max(counts, default=0))


def ticks(report: BenchReport) -> TableData | None:
    """Where the time of a tick goes; None where no contender has ticks."""
    stages = max((len(row.overall.stage_seconds) for row in report.rows), default=0)
    names = ["tick", "wait", "head", "layers", *(f"stage {at}" for at in range(stages))]
    columns = (Column("contender", numeric=False), *map(Column, names))
    rows = []
    for row in report.rows:
        each = row.overall
        own = (each.tick_seconds, each.wait_seconds, each.draft_seconds, each.layers_seconds)
        times = [*own, *each.stage_seconds]
        if all(time is None for time in times):
            continue
        times += [None] * (len(names) - len(times))
        rows.append((row.contender.name, *map(milliseconds, times)))
    note = (
        "Medians. wait, head and layers are stage 0's: waiting for the boundary, deciding and "
        "drafting, its own layers. stage n is one token in that stage. For EESD all but tick and "
        "wait are those of a burst, which enters once in as many ticks as there are stages."
    )
    table = TableData("Tick breakdown", columns, tuple(rows), note)
    return _without_empty(table) if rows else None


def busy(report: BenchReport) -> TableData | None:
    """Useful, void and bubble share of each stage; None where no contender has several."""
    rows = tuple(
        (f"{row.contender.name}, stage {stage}", *(percent(share) for share in shares))
        for row in report.rows
        if len(row.overall.stage_busy) > 1
        for stage, shares in enumerate(row.overall.stage_busy)
    )
    columns = (Column("stage", numeric=False), Column("useful"), Column("void"), Column("bubble"))
    note = "Shares of the ticks. void: work on a guess that was wrong or stood on a wrong one."
    return TableData("What the stages did", columns, rows, note) if rows else None


def differences(report: BenchReport) -> TableData | None:
    """Where answers first differ from plain decoding's; None where none does."""
    found = [sample for sample in report.samples if sample.difference]
    if not found:
        return None
    numbers = ("turn", "repetition", "at token", "expected id", "found id", "logit gap")
    columns = (
        *(Column(name, numeric=False) for name in ("contender", "question", "category")),
        *map(Column, numbers),
        Column("explained by", numeric=False),
    )
    left_out = len(found) - MOST_DIFFERENCES
    note = "logit gap: how much plain decoding preferred its own token, at the first difference."
    if left_out > 0:
        note += f" {left_out} more are in the JSON."
    rows = tuple(_difference(sample) for sample in found[:MOST_DIFFERENCES])
    return TableData("Answers that differ from plain decoding", columns, rows, note)


def _difference(sample: Sample) -> tuple[str, ...]:
    key, found = sample.key, sample.difference
    assert found is not None
    ids = ("end" if each is None else str(each) for each in (found.expected_id, found.found_id))
    place = (f"{key.task} {key.question_id}", key.category, str(key.turn), str(key.repetition))
    gap = number(found.logit_gap, 4)
    return (sample.contender, *place, str(found.index), *ids, gap, _explanation(found))


def _explanation(found: Difference) -> str:
    if found.same_threads_equal:
        return "another number of threads"
    gap, tolerance = found.logit_gap, found.tolerance
    if gap is not None and tolerance is not None:
        return f"rounding (up to {tolerance:.4f})" if gap <= tolerance else "beyond rounding"
    return NOTHING


def movements(report: BenchReport) -> TableData | None:
    """What changed since the earlier run; None where none was given."""
    names = ("before", "after", "new over old")
    columns = (
        Column("contender", numeric=False),
        Column("figure", numeric=False),
        *map(Column, names),
        Column("verdict", numeric=False),
    )
    rows = tuple(
        (
            each.contender,
            each.figure,
            number(each.before, 2),
            number(each.after, 2),
            interval(each.ratio, 2),
            each.verdict,
        )
        for each in report.baseline
    )
    note = "same: not beyond the noise of both runs."
    return TableData("Against the earlier run", columns, rows, note) if rows else None


def sources(report: BenchReport) -> TableData:
    """Where the prompts come from."""
    names = ("task", "about", "source", "licence")
    columns = (*(Column(name, numeric=False) for name in names), Column("questions"))
    rows = tuple(
        (task.name, task.about, task.source, task.licence, str(task.questions))
        for task in report.tasks
    )
    return TableData(
        "Prompts", columns, rows, f"Checksum of all token ids: {report.prompt_checksum}"
    )


def environment(report: BenchReport) -> TableData:
    """Machine, versions and settings, for whoever wants to measure again."""
    pairs = (("model", report.model), ("model hash", report.model_hash))
    columns = (Column("what", numeric=False), Column("value", numeric=False))
    rows = (*pairs, *report.environment, *report.settings)
    return TableData("Environment and settings", columns, rows)


def _without_empty(table: TableData) -> TableData:
    kept = [
        at
        for at in range(len(table.columns))
        if not at or any(row[at] != NOTHING for row in table.rows)
    ]
    return table.cut(kept)
