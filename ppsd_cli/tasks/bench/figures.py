"""From raw samples to figures: medians, bootstrap intervals, pooled counts. Pure.

A *prompt* is one turn of one question. Its repetitions are summed up by their median first, so
that an interval says how figures vary over prompts, and repetitions only steady them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

import numpy as np

from ppsd_cli.bench_records import Contender, Counts, Figures, Interval, Key, Row, Sample

RESAMPLES = 2000
PromptKey = tuple[str, str, int]
Values = Mapping[PromptKey, float]


def bootstrap(values: Sequence[float], *, seed: int) -> Interval | None:
    """Median with its 95% percentile interval over resampled values; None without values."""
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
    return Interval(float(np.median(data)), float(low), float(high))


def prompt_of(key: Key) -> PromptKey:
    """The prompt that an answer belongs to, whatever its repetition."""
    return key.task, key.question_id, key.turn


def by_prompt(samples: Iterable[Sample], figure: Callable[[Sample], float | None]) -> Values:
    """Median over the repetitions of every prompt for which there is a figure."""
    found: dict[PromptKey, list[float]] = defaultdict(list)
    for sample in samples:
        value = figure(sample)
        if value is not None:
            found[prompt_of(sample.key)].append(value)
    return {prompt: median(values) for prompt, values in found.items()}


def paired(values: Values, reference: Values) -> dict[PromptKey, float]:
    """Value over reference for the prompts that have both."""
    return {p: v / reference[p] for p, v in values.items() if reference.get(p)}


def decode_rate(sample: Sample) -> float | None:
    """Tokens per second after the first."""
    return sample.tokens_per_second


def end_to_end_rate(sample: Sample) -> float | None:
    """Tokens per second from submission on."""
    return len(sample.token_ids) / sample.total_seconds if sample.total_seconds > 0 else None


def first_token(sample: Sample) -> float | None:
    """Seconds to the first token."""
    return sample.first_token_seconds


def make_row(
    contender: Contender,
    samples: Sequence[Sample],
    reference: Sequence[Sample],
    *,
    ideal: float | None,
    peak_memory: int | None,
    seed: int,
) -> Row:
    """One contender's line; ``reference`` are AR's samples, ``samples`` those of the contender."""

    def over(chosen: Sequence[Sample]) -> Figures:
        return _figures(chosen, reference, ideal=ideal, peak_memory=peak_memory, seed=seed)

    names = dict.fromkeys(sample.key.category for sample in samples)
    parts = tuple((n, over([s for s in samples if s.key.category == n])) for n in names)
    return Row(contender, over(samples), parts)


def _figures(
    samples: Sequence[Sample],
    reference: Sequence[Sample],
    *,
    ideal: float | None,
    peak_memory: int | None,
    seed: int,
) -> Figures:
    rates = by_prompt(samples, decode_rate)
    ratios = paired(rates, by_prompt(reference, decode_rate))
    counts = [sample.counts for sample in samples if sample.counts is not None]
    verified, ticks = sum(c.verified for c in counts), sum(c.ticks for c in counts)
    counted_tokens = sum(len(s.token_ids) for s in samples if s.counts is not None)
    runs = sum((Counter(dict(c.runs)) for c in counts), Counter[int]())
    gaps = [d.logit_gap for s in samples if (d := s.difference) and d.logit_gap is not None]
    answered = {sample.key for sample in reference}
    equal = sum(s.difference is None and s.key in answered for s in samples)

    def interval(figure: Callable[[Sample], float | None]) -> Interval | None:
        return bootstrap(list(by_prompt(samples, figure).values()), seed=seed)

    return Figures(
        answers=len(samples),
        tokens=sum(len(sample.token_ids) for sample in samples),
        tokens_per_second=bootstrap(list(rates.values()), seed=seed),
        end_to_end_tokens_per_second=interval(end_to_end_rate),
        first_token_seconds=interval(first_token),
        speedup=bootstrap(list(ratios.values()), seed=seed),
        ideal_speedup=ideal,
        acceptance_rate=sum(c.accepted for c in counts) / verified if verified else None,
        tokens_per_tick=counted_tokens / ticks if ticks else None,
        runs=tuple(sorted(runs.items())),
        flushes=sum(c.flushes for c in counts),
        void_drafts=sum(c.void_drafts for c in counts),
        stage_busy=_busy(counts),
        stage_seconds=_columns([c.stage_seconds for c in counts if c.stage_seconds]),
        tick_seconds=_middle(c.tick_seconds for c in counts),
        wait_seconds=_middle(c.wait_seconds for c in counts),
        draft_seconds=_middle(c.draft_seconds for c in counts),
        layers_seconds=_middle(c.layers_seconds for c in counts),
        identical=equal,
        largest_logit_gap=max(gaps, default=None),
        peak_memory=peak_memory,
    )


def _busy(counts: Sequence[Counts]) -> tuple[tuple[float, float, float], ...]:
    """Useful, void and bubble share of every stage, weighted by ticks."""
    known = [c for c in counts if c.stage_busy]
    ticks = sum(c.ticks for c in known)
    stages = len(known[0].stage_busy) if known else 0

    def share(stage: int, kind: int) -> float:
        return sum(c.stage_busy[stage][kind] * c.ticks for c in known) / ticks

    return tuple((share(s, 0), share(s, 1), share(s, 2)) for s in range(stages))


def _columns(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Median of every column."""
    return tuple(median(column) for column in zip(*rows, strict=True))


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
