"""Numbers of a benchmark as people read them, and the sentence that sums a run up. Pure."""

from ppsd_cli.bench_records import BenchReport, Contender, Figures, Interval, Row

NOTHING = "-"
"""What stands where a figure cannot be said."""
SPECULATIVE = ("ppsd", "eesd", "hf-early-exit")
"""Decoders that guess, the one that a run is about first."""
PLAIN = "ar"


def number(value: float | None, digits: int = 1) -> str:
    """``value`` with ``digits`` decimals; large numbers have none."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 as a percentage."""
    return NOTHING if share is None else f"{share * 100:.{digits}f}%"


def interval(value: Interval | None, digits: int = 1) -> str:
    """A figure with the interval that it lies in; alone where one prompt gave no interval."""
    if value is None:
        return NOTHING
    if value.low == value.high:
        return number(value.median, digits)
    low, high = number(value.low, digits), number(value.high, digits)
    return f"{number(value.median, digits)} ({low}-{high})"


def seconds_interval(value: Interval | None) -> str:
    """A duration with its interval, in the unit that suits it."""
    if value is None:
        return NOTHING
    if value.median >= 1:
        return f"{interval(value, 2)} s"
    return f"{interval(scaled(value, 1000), 0)} ms"


def scaled(value: Interval, factor: float) -> Interval:
    """The same figure in another unit."""
    return Interval(value.median * factor, value.low * factor, value.high * factor)


def milliseconds(seconds: float | None) -> str:
    """A duration of about a tick."""
    return NOTHING if seconds is None else f"{seconds * 1000:.2f} ms"


def size(count: int | None) -> str:
    """A number of bytes in decimal units."""
    if count is None:
        return NOTHING
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """Time left, roughly."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def identical(figures: Figures) -> str:
    """How many answers equal plain decoding's."""
    return f"{figures.identical}/{figures.answers}"


def speculates(contender: Contender) -> bool:
    """Whether it guesses tokens."""
    return contender.decoder in SPECULATIVE


def leading_row(report: BenchReport) -> Row | None:
    """The row that the run is about: a real head before fixed acceptance, PPSD before others."""
    rows = [row for row in report.rows if speculates(row.contender)]
    return min(rows, key=_importance, default=None)


def _importance(row: Row) -> tuple[bool, int, float]:
    fixed = row.contender.acceptance
    speed = row.overall.speedup.median if row.overall.speedup else 0.0
    return fixed is not None, SPECULATIVE.index(row.contender.decoder), -speed


def headline(report: BenchReport) -> str:
    """One sentence: whether speculation paid off, also when it did not."""
    row = leading_row(report)
    if row is None:
        return "No contender guessed tokens, so there is no speculation to judge."
    name, speedup = row.contender.name, row.overall.speedup
    if speedup is None:
        return (
            f"Whether {name} is faster than plain decoding cannot be said: "
            f"{PLAIN} was not measured on the same prompts."
        )
    sentence = _verdict(name, speedup) + _guesses(row) + _sameness(row)
    return sentence + _better(report, row) + "."


def _verdict(name: str, speedup: Interval) -> str:
    within = f"95% interval {speedup.low:.2f} to {speedup.high:.2f}"
    times = f"{speedup.median:.2f}"
    if speedup.low > 1:
        how = f"{name} decoded {times} times as fast as plain decoding ({within})"
        return f"Speculation paid off: {how}"
    if speedup.high < 1:
        return (
            f"Speculation did not pay off: {name} was slower than plain decoding, "
            f"at {times} times its speed ({within})"
        )
    return (
        f"No clear difference: {name} decoded at {times} times the speed of plain decoding, "
        f"and the {within} includes 1"
    )


def _guesses(row: Row) -> str:
    fixed, rate = row.contender.acceptance, row.overall.acceptance_rate
    if fixed is not None:
        return f", with drafts made right {fixed:.0%} of the time in place of a head's own"
    return "" if rate is None else f", with {rate:.0%} of its drafts right"


def _sameness(row: Row) -> str:
    answers, same = row.overall.answers, row.overall.identical
    if not answers:
        return ""
    share = f"all {answers}" if same == answers else f"{same} of {answers}"
    return f"; its token ids equal plain decoding's in {share} answers"


def _better(report: BenchReport, leading: Row) -> str:
    """Name the real contender that was faster than the one that the run is about."""
    best = leading
    for row in report.rows:
        real = speculates(row.contender) and row.contender.acceptance is None
        if real and _median(row) > _median(best):
            best = row
    if best is leading or leading.contender.acceptance is not None:
        return ""
    return f"; {best.contender.name} was faster, at {_median(best):.2f}"


def _median(row: Row) -> float:
    return row.overall.speedup.median if row.overall.speedup else 0.0
