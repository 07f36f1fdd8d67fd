"""Figures counted from events."""

import pytest
from ui_chain import ANSWER, TICK, Chain

from ppsd_cli.core.events import (
    Committed,
    Entered,
    Event,
    Finished,
    FinishReason,
    Flushed,
    Outcome,
    Span,
    Ticked,
    Verified,
)
from ppsd_cli.core.stats import RunStats, StatsBuilder


def stats_of(chain: Chain) -> RunStats:
    builder = StatsBuilder(chain.stages)
    for event in chain.events():
        builder.add(event)
    return builder.snapshot()


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_first_token_costs_one_tick_a_stage(stages: int) -> None:
    stats = stats_of(Chain(stages=stages, answer=(100,), wrong=frozenset()))
    assert (stats.ticks, stats.tokens, stats.prompt_ticks) == (stages, 1, 0)
    assert stats.acceptance_rate is None
    assert stats.runs == ()


def test_earlier_chunks_are_no_decode_ticks() -> None:
    one, three = stats_of(Chain()), stats_of(Chain(chunks=(5, 5, 2)))
    assert three.prompt_ticks == 2
    assert (three.ticks, three.tokens) == (one.ticks, one.tokens)


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("wrong", [frozenset(), {1}, {3, 5, 13}, set(range(1, 23))])
def test_ticks_follow_the_formula(stages: int, wrong: set[int]) -> None:
    stats = stats_of(Chain(stages=stages, wrong=frozenset(wrong)))
    # The prompt costs n ticks, and so does the token after one that was not accepted.
    restarts = 1 + len(wrong - {len(ANSWER) - 1})
    assert stats.ticks == stages + stages * restarts + (len(ANSWER) - 1 - restarts)
    assert stats.flushes == len(wrong)
    assert stats.verified == len(ANSWER) - 1
    assert stats.accepted == stats.verified - stats.flushes
    assert stats.void_drafts == (stages - 1) * stats.flushes


def test_counts_of_a_run() -> None:
    stats = stats_of(Chain())
    assert stats.tokens == 23
    assert stats.verified == 22
    assert stats.accepted == 19
    assert stats.flushes == 3
    assert stats.void_drafts == 6
    assert stats.acceptance_rate == pytest.approx(19 / 22)
    assert stats.ticks == 3 + 3 * (1 + 3) + 18
    assert stats.tokens_per_tick == pytest.approx(23 / 33)
    assert stats.runs == ((1, 1), (2, 1), (7, 1), (9, 1))


def test_busy_shares_add_up_and_match_a_count_by_hand() -> None:
    stats = stats_of(Chain(answer=ANSWER[:4], wrong=frozenset({2})))
    # Entering in ticks 0 to 9: the prompt, nothing twice, tokens 0 and 1, a wrong guess and one
    # behind it, the correction, and two guesses that nobody waits for.
    shares = [(busy.useful, busy.void, busy.bubble) for busy in stats.stage_busy]
    assert stats.ticks == 10
    assert shares == [(0.4, 0.4, 0.2), (0.4, 0.3, 0.3), (0.4, 0.2, 0.4)]
    assert stats.stage_busy_fraction == pytest.approx(0.4)


def test_perfect_guesses_keep_stages_busy() -> None:
    words = tuple(range(100, 300))
    stats = stats_of(Chain(answer=words, wrong=frozenset()))
    assert stats.stage_busy_fraction is not None
    assert stats.stage_busy_fraction > 0.95


def test_naive_split_keeps_one_stage_busy() -> None:
    stats = stats_of(Chain(drafting=False))
    assert stats.verified == 0
    assert stats.tokens_per_tick == pytest.approx(1 / 3)
    assert stats.stage_busy_fraction == pytest.approx(1 / 3)
    assert all(busy.void == 0 for busy in stats.stage_busy)


def test_times() -> None:
    stats = stats_of(Chain())
    assert stats.tick_seconds == pytest.approx(TICK)
    assert stats.tick_time is not None
    assert stats.tick_time.wait == pytest.approx(TICK / 4)
    assert stats.tick_time.draft == pytest.approx(TICK / 4)
    assert stats.tick_time.layers == pytest.approx(TICK / 2)
    assert [each.median for each in stats.stage_seconds] == pytest.approx([TICK] * 3)


def test_nothing_happened() -> None:
    stats = StatsBuilder(3).snapshot()
    assert (stats.ticks, stats.tokens, stats.stage_busy, stats.stage_seconds) == (0, 0, (), ())
    assert stats.tokens_per_tick is None
    assert stats.stage_busy_fraction is None
    assert stats.tick_seconds is None


def test_later_events_do_not_count() -> None:
    builder = StatsBuilder(2)
    late: list[Event] = [
        Finished(0, FinishReason.STOP),
        Committed(3, 1, 1, Outcome.ACCEPTED),
        Ticked(3, 0.0, 0.0, 0.0, 1.0),
    ]
    for event in late:
        builder.add(event)
    assert builder.snapshot().tokens == 0


def test_leftovers_of_an_earlier_answer_do_not_count() -> None:
    builder = StatsBuilder(3)
    builder.add(Verified(0, 900, 1, False, tuple(Span(s, 0.0, 99.0) for s in range(3))))
    for event in Chain().events():
        builder.add(event)
    assert builder.snapshot() == stats_of(Chain())


def test_progress_agrees_with_the_snapshot_at_any_time() -> None:
    builder = StatsBuilder(3)
    for event in Chain().events():
        builder.add(event)
        now, full = builder.progress(), builder.snapshot()
        assert (now.ticks, now.tokens) == (full.ticks, full.tokens)
        assert now.acceptance_rate == full.acceptance_rate
        assert now.tokens_per_tick == full.tokens_per_tick


def test_feeds_of_a_chain_are_its_tokens() -> None:
    stats = stats_of(Chain(stages=2, wrong=frozenset()))
    assert stats.feeds == len(ANSWER)
    assert stats.tokens_per_feed == pytest.approx((len(ANSWER) - 1) / len(ANSWER))
    assert StatsBuilder(2).snapshot().tokens_per_feed is None


def test_a_burst_is_one_feed_timed_once() -> None:
    """A burst of three: right, wrong, void; then one of one. Bubbles do not count as drafting."""
    builder = StatsBuilder(2)
    events: list[Event] = [
        Entered(0, 0, 0, None, 4, False),
        Ticked(0, 0.0, 0.0, 0.0, 1.0),
        Ticked(1, 1.0, 2.0, 2.0, 2.0),
        Verified(2, 0, 50, True, (Span(0, 0.0, 1.0), Span(1, 1.0, 2.0))),
        Committed(2, 4, 50, Outcome.UNDRAFTED),
        *(Entered(2, 1 + i, 4 + i, 50 + i, 1, i > 0) for i in range(4)),
        Ticked(2, 2.0, 2.0, 2.5, 5.0),
        Ticked(3, 5.0, 6.0, 6.0, 6.0),
    ]
    spans = (Span(0, 2.0, 5.0), Span(1, 5.0, 6.0))
    events += [
        Verified(4, 1, 51, True, spans),
        Committed(4, 5, 51, Outcome.ACCEPTED),
        Verified(4, 2, 99, True, spans),
        Committed(4, 6, 99, Outcome.CORRECTED, 52),
        Flushed(4, 6, (3, 4)),
        Verified(4, 3, 7, False, spans),
        Verified(4, 4, 7, False, spans),
        Entered(4, 5, 6, 99, 1, False),
        Ticked(4, 6.0, 6.0, 6.5, 9.0),
        Ticked(5, 9.0, 10.0, 10.0, 10.0),
        Verified(6, 5, 1, True, (Span(0, 6.0, 9.0), Span(1, 9.0, 10.0))),
        Committed(6, 7, 1, Outcome.UNDRAFTED),
        Finished(6, FinishReason.STOP),
    ]
    for event in events:
        builder.add(event)
    stats = builder.snapshot()
    assert (stats.ticks, stats.tokens, stats.feeds) == (6, 4, 2)
    assert (stats.verified, stats.accepted, stats.void_drafts, stats.flushes) == (2, 1, 2, 1)
    assert stats.tokens_per_feed == 1.5
    assert [each.mean for each in stats.stage_seconds] == [3.0, 1.0]
    assert stats.tick_time is not None
    assert (stats.tick_time.draft, stats.tick_time.layers) == (0.5, 2.5)
    shares = [(busy.useful, busy.void, busy.bubble) for busy in stats.stage_busy]
    assert shares == [(0.5, 0.0, 0.5)] * 2, "a stage that works on a burst is of use"
