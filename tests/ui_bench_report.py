"""A benchmark report written by hand, for tests of what shows it."""

from dataclasses import replace

from ppsd_cli.bench_records import (
    BenchReport,
    Contender,
    Counts,
    Difference,
    Figures,
    GateFailure,
    Interval,
    Key,
    Row,
    Sample,
    TaskInfo,
)
from tests.ui_chain import Chain

RUNS = ((1, 310), (2, 211), (3, 150), (4, 97), (5, 60), (6, 45), (8, 20), (12, 6), (31, 1))
BUSY = ((0.79, 0.21, 0.0), (0.78, 0.2, 0.02))
EMPTY = Figures(
    answers=80,
    tokens=10240,
    tokens_per_second=None,
    end_to_end_tokens_per_second=None,
    first_token_seconds=None,
    speedup=None,
    ideal_speedup=None,
    acceptance_rate=None,
    tokens_per_tick=None,
    runs=(),
    flushes=0,
    void_drafts=0,
    stage_busy=(),
    stage_seconds=(),
    tick_seconds=None,
    wait_seconds=None,
    draft_seconds=None,
    layers_seconds=None,
    identical=80,
    largest_logit_gap=None,
    peak_memory=None,
)


def around(median: float, share: float = 0.04) -> Interval:
    return Interval(median, median * (1 - share), median * (1 + share))


def figures(speed: float, speedup: float | None = None) -> Figures:
    return replace(
        EMPTY,
        tokens_per_second=around(speed),
        end_to_end_tokens_per_second=around(speed * 0.94),
        first_token_seconds=around(0.412),
        speedup=None if speedup is None else around(speedup),
        peak_memory=1_204_000_000,
    )


def pipelined(speed: float, speedup: float, acceptance: float) -> Figures:
    return replace(
        figures(speed, speedup),
        acceptance_rate=acceptance,
        tokens_per_tick=1 / (2 - acceptance),
        runs=RUNS,
        flushes=900,
        void_drafts=1180,
        stage_busy=BUSY,
        stage_seconds=(0.0145, 0.0178),
        tick_seconds=0.0196,
        wait_seconds=0.0008,
        draft_seconds=0.0041,
        layers_seconds=0.0145,
    )


def contender(name: str, decoder: str, **settings: object) -> Contender:
    exact = decoder in ("ar", "ppsd", "naive-split")
    return replace(Contender(name=name, decoder=decoder, exact=exact), **settings)


SPLIT = {"split": (16, 14), "devices": ("cpu", "cpu"), "head": "deep-2"}
CATEGORIES = ("writing", "roleplay", "coding", "maths")


def row(who: Contender, overall: Figures) -> Row:
    """The same figures in each category, a little apart."""
    parts = []
    for at, name in enumerate(CATEGORIES):
        factor = 0.94 + 0.04 * at
        speedup, rate = overall.speedup, overall.acceptance_rate
        part = replace(
            overall,
            answers=20,
            identical=min(overall.identical, 20),
            tokens_per_second=overall.tokens_per_second
            and around(overall.tokens_per_second.median * factor),
            speedup=speedup and around(speedup.median * factor, 0.1),
            acceptance_rate=None if rate is None else rate * factor,
        )
        parts.append((name, part))
    return Row(who, overall, tuple(parts))


def sample(
    who: str, question: str = "81", *, seconds: float = 4.0, difference: Difference | None = None
) -> Sample:
    counts = Counts(
        ticks=176,
        verified=126,
        accepted=88,
        void_drafts=50,
        flushes=38,
        runs=RUNS,
        stage_busy=BUSY,
        stage_seconds=(0.0145, 0.0178),
        tick_seconds=0.0196,
        wait_seconds=0.0008,
        draft_seconds=0.0041,
        layers_seconds=0.0145,
    )
    return Sample(
        key=Key("mt-bench", question, "writing", 1, 0),
        contender=who,
        prompt_tokens=40,
        token_ids=tuple(range(129)),
        finish_reason="length",
        first_token_seconds=0.4,
        decode_seconds=seconds,
        counts=counts if who == "ppsd" else None,
        difference=difference,
    )


AR = contender("ar", "ar", devices=("cpu",))
NAIVE = contender("naive-split", "naive-split", split=(16, 14), devices=("cpu", "cpu"))
PPSD = contender("ppsd", "ppsd", **SPLIT)
EESD = contender("eesd-4", "eesd", draft_length=4, **SPLIT)


def small_report() -> BenchReport:
    """AR, the naive split, PPSD and EESD."""
    eesd = replace(pipelined(25.9, 0.83, 0.705), identical=78, largest_logit_gap=0.0312)
    return BenchReport(
        schema_version=1,
        tasks=(
            TaskInfo(
                "mt-bench", "Open questions, two turns", "lm-sys/mt", "Apache-2.0", 80, 42, None
            ),
        ),
        prompt_checksum="9f" * 32,
        model="smollm2-135m",
        model_hash="ab" * 32,
        environment=(("cpu", "EPYC, 2 cores"), ("torch", "2.13.0")),
        settings=(("max_new_tokens", "128"), ("repetitions", "1")),
        rows=(
            row(
                AR,
                replace(
                    figures(31.2, 1.0),
                    speedup=Interval(1.0, 1.0, 1.0),
                    stage_busy=((1.0, 0.0, 0.0),),
                ),
            ),
            row(NAIVE, figures(30.1, 0.965)),
            row(PPSD, pipelined(36.8, 1.18, 0.706)),
            row(EESD, eesd),
        ),
        samples=(
            sample("ar"),
            sample("ppsd", seconds=3.4),
            sample("eesd-4", difference=Difference(17, 318, 42, 0.0312)),
            sample("eesd-4", "82", difference=Difference(128, 5, None, None)),
        ),
        failures=(GateFailure("speedup", "1.18 is below the 1.3 of --fail-under"),),
        incomplete=False,
        grid_events=tuple(Chain(stages=2).events()),
    )


def fixed_report() -> BenchReport:
    """As ``small_report``, and PPSD and EESD at fixed acceptance."""
    base = small_report()
    rows = list(base.rows)
    for rate in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        ideal = 2 / (1 + (1 - rate))
        speed = replace(pipelined(31.2, ideal * 0.87, rate), ideal_speedup=ideal)
        rows.append(row(contender(f"ppsd@{rate}", "ppsd", acceptance=rate, **SPLIT), speed))
        length = 3 if rate < 0.7 else 4
        ideal = sum(rate**at for at in range(length + 1)) / (1 + length / 2)
        speed = replace(pipelined(31.2, ideal * 0.9, rate), ideal_speedup=ideal)
        settings = {"acceptance": rate, "draft_length": length, **SPLIT}
        rows.append(row(contender(f"eesd-{length}@{rate}", "eesd", **settings), speed))
    return replace(base, rows=tuple(rows))
