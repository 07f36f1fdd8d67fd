"""Figures, formulae and drafts of chosen quality, from hand-made samples."""

import statistics
from dataclasses import replace

import pytest
from bench_samples import BURST, CHAIN, counts, difference, sample

from ppsd_cli.bench_records import Key
from ppsd_cli.tasks.bench.figures import bootstrap, make_row
from ppsd_cli.tasks.bench.forced import (
    best_draft_length,
    burst_speedup,
    chain_speedup,
    forced_drafts,
)
from ppsd_cli.tasks.bench.report import make_rows

KEY = Key("task", "7", "", 1, 1)


def row_of(samples, reference, **changes):
    return make_row(
        CHAIN, samples, reference, **{"ideal": None, "peak_memory": None, "seed": 0, **changes}
    )


def test_bootstrap_interval_of_a_known_distribution():
    values = [float(value) for value in range(101)]
    found = bootstrap(values, seed=0)
    assert found.median == 50
    # The median's standard error is about 1.25 * 29.2 / sqrt(101) = 3.6.
    assert 40 <= found.low <= 46
    assert 54 <= found.high <= 60
    assert bootstrap(values, seed=0) == found
    assert bootstrap(values, seed=1) != found


def test_bootstrap_of_one_value_and_of_none():
    one = bootstrap([3.0], seed=0)
    assert (one.median, one.low, one.high) == (3, 3, 3)
    assert bootstrap([], seed=0) is None


def test_intervals_cover_the_true_median_about_as_often_as_they_say():
    import numpy as np

    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(200):
        interval = bootstrap(list(rng.normal(10, 2, 40)), seed=seed)
        hits += interval.low <= 10 <= interval.high
    assert 180 <= hits <= 200


def test_speedup_is_paired_by_prompt():
    """Prompts differ far more in speed than contenders do, and pairing takes that out."""
    speeds = [10.0, 100.0, 1000.0]
    plain = [sample(i, "ar", speed) for i, speed in enumerate(speeds)]
    chain = [sample(i, "ppsd", 1.5 * speed) for i, speed in enumerate(speeds)]
    speedup = row_of(chain, plain).overall.speedup
    assert speedup.median == pytest.approx(1.5)
    assert speedup.low == pytest.approx(1.5)
    assert speedup.high == pytest.approx(1.5)


def test_prompts_without_a_partner_do_not_count_towards_the_speedup():
    plain = [sample(0, "ar", 10)]
    chain = [sample(0, "ppsd", 20), sample(1, "ppsd", 500)]
    assert row_of(chain, plain).overall.speedup.median == pytest.approx(2)
    assert row_of(chain, []).overall.speedup is None


def test_repetitions_are_summed_up_before_prompts_are():
    plain = [sample(0, "ar", 10, repetition=r) for r in (1, 2, 3)]
    rates = [10, 12, 90]  # one of three was disturbed
    chain = [sample(0, "ppsd", rate, repetition=r) for r, rate in enumerate(rates, 1)]
    figures = row_of(chain, plain).overall
    assert figures.answers == 3
    assert figures.tokens_per_second.median == pytest.approx(12)
    assert figures.tokens_per_second.low == pytest.approx(12)
    assert figures.speedup.median == pytest.approx(1.2)


def test_counts_are_pooled():
    chain = [
        sample(0, "ppsd", 10, counts=counts()),
        sample(1, "ppsd", 10, counts=counts(ticks=30, verified=34, accepted=6, runs=((1, 6),))),
        sample(2, "ppsd", 10),
    ]
    figures = row_of(chain, []).overall
    assert figures.acceptance_rate == pytest.approx(10 / 40)
    assert figures.tokens_per_tick == pytest.approx(22 / 40)
    assert figures.runs == ((1, 8), (2, 1))
    assert (figures.flushes, figures.void_drafts) == (4, 6)


def test_busy_shares_are_weighted_by_ticks():
    chain = [
        sample(0, "ppsd", 10, counts=counts(ticks=10, stage_busy=((1.0, 0.0, 0.0),))),
        sample(1, "ppsd", 10, counts=counts(ticks=30, stage_busy=((0.0, 0.4, 0.6),))),
    ]
    ((useful, void, bubble),) = row_of(chain, []).overall.stage_busy
    assert (useful, void, bubble) == pytest.approx((0.25, 0.3, 0.45))


def test_times_of_a_tick_are_medians():
    ticks = [0.01, 0.02, 0.9]
    chain = [
        sample(i, "ppsd", 10, counts=counts(tick_seconds=t, stage_seconds=(t, 2 * t)))
        for i, t in enumerate(ticks)
    ]
    figures = row_of(chain, []).overall
    assert figures.tick_seconds == 0.02
    assert figures.stage_seconds == (0.02, 0.04)


def test_without_counts_nothing_is_made_up():
    figures = row_of([sample(0, "hf", 10)], []).overall
    assert figures.acceptance_rate is None
    assert figures.tokens_per_tick is None
    assert figures.tick_seconds is None
    assert (figures.stage_busy, figures.stage_seconds, figures.runs) == ((), (), ())


def test_first_tokens_that_came_together_are_not_part_of_the_decoding_time():
    answer = sample(0, "eesd-4", 10, decode_seconds=0.8, first_tokens=3)
    assert answer.tokens_per_second == pytest.approx(8 / 0.8)
    assert replace(answer, token_ids=(1,), first_tokens=1).tokens_per_second is None


def test_identical_counts_equal_answers_only_where_there_is_one_to_equal():
    plain = [sample(0, "ar", 10), sample(1, "ar", 10)]
    chain = [
        sample(0, "ppsd", 10),
        sample(1, "ppsd", 10, difference=difference(0.25)),
        sample(2, "ppsd", 10),
    ]
    figures = row_of(chain, plain).overall
    assert figures.identical == 1
    assert figures.largest_logit_gap == 0.25


def test_categories_have_their_own_figures():
    plain = [sample(i, "ar", 10) for i in range(4)]
    chain = [sample(i, "ppsd", 20 if i % 2 else 5) for i in range(4)]
    row = row_of(chain, plain)
    medians = {name: figures.speedup.median for name, figures in row.categories}
    assert medians == pytest.approx({"even": 0.5, "odd": 2})
    assert [figures.answers for _, figures in row.categories] == [2, 2]


def test_of_two_heads_of_eesd_the_faster_is_printed():
    block = replace(BURST, name="eesd-3 block")
    samples = [sample(0, "ar", 10), sample(0, "eesd-4", 9), sample(0, "eesd-3 block", 11)]
    plain = replace(CHAIN, name="ar", decoder="ar")
    rows = make_rows((plain, BURST, block), samples, ideal={}, memory={"ar": 5}, seed=0)
    assert [row.printed for row in rows] == [True, False, True]
    assert [row.overall.peak_memory for row in rows] == [5, None, None]


@pytest.mark.parametrize(("stages", "acceptance", "speedup"), [(2, 0.5, 4 / 3), (3, 0.8, 3 / 1.4)])
def test_formula_of_the_chain(stages, acceptance, speedup):
    assert chain_speedup(stages, acceptance) == pytest.approx(speedup)
    assert chain_speedup(stages, 1.0) == stages
    assert chain_speedup(stages, 0.0) == 1


def test_formula_of_bursts():
    # k = 2, a = 1/2: 1 + 1/2 + 1/4 tokens for 3 drafting passes of a third and two thirds.
    found = burst_speedup(2, 0.5, exit_layer=10, layers=30)
    assert found == pytest.approx(1.75 / (3 / 3 + 2 / 3))
    assert burst_speedup(4, 1.0, exit_layer=10, layers=30) == pytest.approx(5 / (5 / 3 + 2 / 3))
    assert burst_speedup(4, 0.0, exit_layer=10, layers=30) == pytest.approx(1 / (5 / 3 + 2 / 3))
    near = burst_speedup(4, 1 - 1e-9, exit_layer=10, layers=30)
    assert near == pytest.approx(burst_speedup(4, 1.0, exit_layer=10, layers=30))


def test_better_drafts_call_for_longer_bursts():
    lengths = [best_draft_length(a, exit_layer=5, layers=30) for a in (0.1, 0.5, 0.8, 1.0)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (2, 6)


def right(drafts, answer):
    return [draft == token for draft, token in zip(drafts, answer, strict=True)]


def forced(answer, acceptance, **changes):
    values = {"vocabulary": 50, "seed": 0, "key": KEY, **changes}
    return forced_drafts(answer, acceptance=acceptance, **values)


def test_forced_drafts_are_right_as_often_as_asked():
    answer = [i % 50 for i in range(20_000)]
    for acceptance in (0.0, 0.3, 0.8, 1.0):
        share = statistics.fmean(right(forced(answer, acceptance), answer))
        assert share == pytest.approx(acceptance, abs=0.015)


def test_a_wrong_draft_is_the_next_id_within_the_vocabulary():
    assert forced([3, 49], 0.0) == (4, 0)


def test_forced_drafts_depend_on_seed_question_turn_and_position_only():
    answer = [1] * 200
    base = forced(answer, 0.5)
    assert forced(answer, 0.5, key=replace(KEY, repetition=2, category="x")) == base
    assert forced(answer[:50], 0.5) == base[:50]
    for changed in ({"seed": 1}, {"key": replace(KEY, turn=2)}):
        assert forced(answer, 0.5, **changed) != base
    assert forced(answer, 0.5, key=replace(KEY, question_id="8")) != base


def test_what_is_right_at_some_quality_is_right_at_every_higher_one():
    answer = list(range(500))
    low = right(forced(answer, 0.4, vocabulary=500), answer)
    high = right(forced(answer, 0.7, vocabulary=500), answer)
    assert all(h for lo, h in zip(low, high, strict=True) if lo)
