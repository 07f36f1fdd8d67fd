"""What makes a run fail: thresholds that were asked for, and answers that must be equal. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ppsd_cli.bench_records import Figures, GateFailure, Interval, Row, Sample
from ppsd_cli.errors import ConfigError

FIGURES = ("speedup", "acceptance", "tokens_per_second", "tokens_per_tick", "identical")


@dataclass(frozen=True, slots=True)
class Gate:
    """``figure`` of ``contender`` must be ``least`` or more."""

    figure: str
    contender: str
    least: float

    @property
    def text(self) -> str:
        """As the flag says it."""
        return f"{self.figure}@{self.contender}={self.least:g}"


def parse_gate(text: str) -> Gate:
    """``speedup=1.1``, or ``speedup@eesd-4=0.9`` for another contender than ppsd."""
    name, equals, value = text.rpartition("=")
    figure, _, contender = name.partition("@")
    if not equals or figure not in FIGURES:
        raise ConfigError(
            f"--fail-under {text}: write FIGURE=VALUE or FIGURE@DECODER=VALUE, "
            f"with a figure of {', '.join(FIGURES)}"
        )
    try:
        least = float(value)
    except ValueError as error:
        raise ConfigError(f"--fail-under {text}: {value!r} is no number") from error
    if not 0 <= least < float("inf"):
        raise ConfigError(f"--fail-under {text}: the value must be 0 or more")
    return Gate(figure, contender or "ppsd", least)


def threshold_failures(rows: Sequence[Row], gates: Sequence[Gate]) -> list[GateFailure]:
    """Every gate that is not reached; one whose figure is missing is not reached."""
    failures = []
    for gate in gates:
        figures = _find(rows, gate.contender)
        value = None if figures is None else _value(figures, gate.figure)
        if value is None:
            why = "was not run" if figures is None else f"has no {gate.figure}"
            failures.append(GateFailure(gate.text, f"{gate.text}: {gate.contender} {why}"))
        elif value < gate.least:
            reached = f"{gate.figure} of {gate.contender} is {value:.4g}, below {gate.least:g}"
            failures.append(GateFailure(gate.text, reached))
    return failures


def identity_failures(
    rows: Sequence[Row], samples: Sequence[Sample], *, context: int | None = None
) -> list[GateFailure]:
    """Answers that differ from AR's and may not: one failure for each contender.

    ``context``: tokens of prompt and answer that fit, where that is known.
    """
    failures = []
    full = {s.key for s in samples if s.contender == "ar" and _is_full(s, context)}
    for row in rows:
        name, exact = row.contender.name, row.contender.exact
        bad = [
            s
            for s in samples
            if s.contender == name
            and not _allowed(s, exact=exact, full=replace(s.key, repetition=1) in full)
        ]
        if bad:
            failures.append(GateFailure(f"identical@{name}", _describe(name, bad, exact=exact)))
    return failures


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """The first index at which two answers differ, or None."""
    if tuple(expected) == tuple(found):
        return None
    pairs = zip(expected, found, strict=False)
    unequal = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(unequal, min(len(expected), len(found)))


def _is_full(plain: Sample, context: int | None) -> bool:
    """Whether plain decoding's answer reached the end of the context."""
    length = plain.prompt_tokens + len(plain.token_ids)
    return plain.finish_reason == "context" or (context is not None and length >= context)


def _allowed(sample: Sample, *, exact: bool, full: bool) -> bool:
    """``full``: plain decoding's answer, too, reached the end of the context."""
    difference = sample.difference
    if difference is None:
        return True
    if exact and not difference.same_threads_equal:
        return False
    if difference.logit_gap is None or difference.tolerance is None:
        return full and sample.finish_reason == "context"
    return difference.logit_gap <= difference.tolerance


def _describe(name: str, bad: Sequence[Sample], *, exact: bool) -> str:
    sample = bad[0]
    difference = sample.difference
    assert difference is not None
    key = sample.key
    where = f"question {key.question_id}, turn {key.turn}, token {difference.index + 1}"
    many = f"{len(bad)} answer{'s' * (len(bad) > 1)} of {name}"
    differ = "differs" if len(bad) == 1 else "differ"
    ids = f"{difference.found_id} in place of {difference.expected_id}"
    if exact:
        return f"{many} {differ} from ar, which must be equal; first: {where} ({ids})"
    if difference.logit_gap is None or difference.tolerance is None:
        return f"{many} {differ} from ar and the logits cannot be compared; first: {where} ({ids})"
    gap = f"gap {difference.logit_gap:.3g}, tolerance {difference.tolerance:.3g}"
    return f"{many} {differ} from ar beyond rounding; first: {where} ({ids}, {gap})"


def _find(rows: Sequence[Row], contender: str) -> Figures | None:
    """Figures of the contender of that name, or of the printed one of that decoder."""
    for row in rows:
        if row.contender.name == contender:
            return row.overall
    for row in rows:
        if row.printed and row.contender.decoder == contender and row.contender.acceptance is None:
            return row.overall
    return None


def _value(figures: Figures, name: str) -> float | None:
    """The figure that a gate of that name looks at."""
    intervals: dict[str, Interval | None] = {
        "speedup": figures.speedup,
        "tokens_per_second": figures.tokens_per_second,
    }
    if name in intervals:
        interval = intervals[name]
        return None if interval is None else interval.median
    if name == "acceptance":
        return figures.acceptance_rate
    if name == "tokens_per_tick":
        return figures.tokens_per_tick
    return figures.identical / figures.answers if figures.answers else None
