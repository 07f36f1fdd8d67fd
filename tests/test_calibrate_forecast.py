"""Predictions from measured times: ticks, splits, speeds and limits, in pure Python."""

import itertools
from dataclasses import replace
from random import Random

import pytest
from fake_pipeline import FakePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd_cli.calibration_records import Boundary, Candidate, Checked, LayerScore, PartTimes, Timing
from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import Committed, Outcome, Ticked
from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.core.tree_simulation import TreeSimulation
from ppsd_cli.tasks.calibrate.candidates import Layout, Predictor, best_three, raw_guessers
from ppsd_cli.tasks.calibrate.cpu_times import fit_parts, fit_wide
from ppsd_cli.tasks.calibrate.engine_forecast import DeviceTimes, Level, StepTimes
from ppsd_cli.tasks.calibrate.flow import Flow, Turn, hits_at, one_by_one, slowest, tick_seconds
from ppsd_cli.tasks.calibrate.forecast import (
    Plain,
    ProcessTimes,
    Setting,
    needed_acceptance,
    speed,
    ticks_of,
    tokens_per_tick,
)
from ppsd_cli.tasks.calibrate.guessers import Answer, Guesser
from ppsd_cli.tasks.calibrate.splits import best_split, in_time
from ppsd_cli.tasks.calibrate.verdict import decide

LAYERS = 12


def flow(turns, *, head=0.0, places=None, hop=0.0, slow=1.0, returning=None, **more):
    """Stages of these seconds alone; ``slow`` times that with every core busy."""
    count = len(turns)
    return Flow(
        turns=tuple(Turn(t, t * slow) for t in turns),
        head=Turn(head, head * slow),
        places=tuple(range(count)) if places is None else places,
        hop=hop,
        returning=(count - 1,) if returning is None else returning,
        **more,
    )


def guesser(name, taps, *texts):
    """A head whose first guesses are right as ``texts`` say, and whose second ones always are."""
    answers = []
    for hits in texts:
        rows = [
            ((token, -0.5), (-1, -1.0)) if hit else ((-1, -0.5), (token, -1.0))
            for token, hit in enumerate(hits, 1)
        ]
        answers.append(Answer(tuple(range(len(hits) + 1)), tuple(rows)))
    return Guesser.of(name, taps, (0.0, 1.0, 1.0, 1.0), answers)


# Ticks


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (flow([2.0, 2.0]), 2.0),
        (flow([1.0, 3.0]), 3.0),
        (flow([1.0, 1.0, 4.0, 1.0]), 4.0),
        (flow([2.0, 2.0], hop=0.5), 2.5),
        (flow([1.0, 3.0], hop=0.5), 3.0),
        (flow([2.0, 2.0], places=(0, 0)), 4.0),
        (flow([2.0, 2.0, 2.0], places=(0, 1, 0)), 4.0),
        (flow([2.0, 2.0], slow=1.5), 3.0),
        (flow([1.0, 2.0], head=1.0), 2.0),
        (flow([2.0, 2.0], head=1.0), 3.0),
    ],
    ids=[
        "level", "one slow", "one slow of four", "level: the way is seen", "the way is hidden",
        "one core", "two share a core", "loaded", "the head fills a gap", "the head leads",
    ],
)  # fmt: skip
def test_a_tick_of_right_guesses(stages, expected):
    assert tick_seconds(stages, [True]) == pytest.approx(expected, rel=0.02)


def test_a_correction_needs_no_draft():
    stages = flow([2.0, 2.0], head=1.0)
    never = tick_seconds(stages, [False])
    assert never == pytest.approx(2.5, rel=0.03)  # every second tick feeds a correction
    half = tick_seconds(stages, hits_at(0.5))
    assert never < half < tick_seconds(stages, [True])


def test_only_levels_of_guesses_are_wide():
    stages = flow([1.0, 2.0], wide=(Turn(1.5, 1.5), Turn(6.0, 6.0)))
    assert tick_seconds(stages, [True]) == pytest.approx(6.0, rel=0.03)
    assert tick_seconds(stages, [False]) == pytest.approx(4.0, rel=0.05)  # every second: 1 node
    assert slowest(stages) == 6.0


def test_stages_that_share_a_core_lose_more_than_their_share():
    turns = [2.0, 1.0, 2.0]
    own = flow(turns, places=(0, 1, 0))
    crowded = flow(turns, places=(0, 1, 0), shared=Turn(1.25, 1.25))
    assert tick_seconds(own, [True]) == pytest.approx(4.0, rel=0.02)
    assert tick_seconds(crowded, [True]) == pytest.approx(5.0, rel=0.02)
    assert slowest(crowded) == 5.0
    alone = flow(turns, shared=Turn(1.25, 1.25))
    assert tick_seconds(alone, [True]) == pytest.approx(2.0, rel=0.02), "nobody shares"


def test_less_load_is_faster_where_one_stage_waits():
    balanced = tick_seconds(flow([2.0, 2.0], slow=1.5), [True])
    idle = tick_seconds(flow([0.5, 2.0], slow=1.5), [True])
    assert balanced == pytest.approx(3.0, rel=0.02)
    assert 2.1 < idle < 2.5


def test_a_tap_of_a_middle_stage_makes_stage_0_wait_for_it():
    turns = [1.0, 5.0, 1.0]
    assert tick_seconds(flow(turns), [True]) == pytest.approx(5.0, rel=0.02)
    short = flow([3.0, 3.0, 0.1], hop=2.0)
    tapped = flow([3.0, 3.0, 0.1], hop=2.0, returning=(1, 2))
    assert tick_seconds(tapped, [True]) == pytest.approx(5.0, rel=0.05)
    assert tick_seconds(short, [True]) < tick_seconds(tapped, [True]) - 0.5


def test_the_naive_split_is_the_sum():
    assert one_by_one(flow([1.0, 2.0], hop=0.25, slow=2.0)) == pytest.approx(3.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 3.0), min_size=2, max_size=4), st.floats(0, 0.5))
def test_the_quick_bound_is_near(turns, hop):
    stages = flow(turns, hop=hop)
    assert slowest(stages) == pytest.approx(tick_seconds(stages, [True]), rel=0.05)


# Tokens


@given(st.integers(2, 5), st.lists(st.booleans(), min_size=1, max_size=25))
@settings(max_examples=40, deadline=None)
def test_ticks_of_an_answer_are_those_of_the_schedule(stages, hits):
    """The same guesses through the real decode loop."""
    tokens = len(hits) + 1
    pipeline = FakePipeline(stages, right=lambda index: index > len(hits) or hits[index - 1])
    limits = Limits(tokens, 1000)
    request = Request(Sampling(), True, limits.feed_limit(3), prompt_tokens=3)
    schedule = Schedule((1, 2, 3), stages=stages, chunk=8, request=request, limits=limits)
    events = list(decode(pipeline, schedule))
    commits = [event for event in events if isinstance(event, Committed)]
    outcomes = [event.outcome is Outcome.ACCEPTED for event in commits[1:]]
    assert outcomes[:-1] == list(hits)[:-1]  # a guess of the last token is never fed
    assert commits[-1].tick - commits[0].tick == ticks_of(stages, hits)
    assert any(isinstance(event, Ticked) for event in events)


def test_tokens_of_a_tick():
    assert tokens_per_tick(3, 1.0) == 1
    assert tokens_per_tick(3, 0.0) == pytest.approx(1 / 3)
    hits = hits_at(0.7, 4000)
    assert len(hits) / ticks_of(3, hits) == pytest.approx(tokens_per_tick(3, 0.7), rel=0.03)


def test_speed_is_the_median_answer():
    texts = [[True] * 9, [False] * 9, [True] * 9]
    pace = guesser("g", (1,), *texts).pace(2, 1)
    assert pace.answers == tuple((9, ticks_of(2, hits)) for hits in texts)
    assert speed(0.5, pace.answers) == pytest.approx(9 / (ticks_of(2, texts[0]) * 0.5))


@given(st.integers(2, 5), st.lists(st.booleans(), min_size=1, max_size=25))
@settings(max_examples=40, deadline=None)
def test_a_tree_of_width_one_is_the_chain(stages, hits):
    (answer,) = guesser("g", (1,), hits).answers
    run = TreeSimulation(answer.guesses, answer.tokens, stages=stages, width=1, random=Random(0))
    course = run.run()
    assert course.ticks - stages == ticks_of(stages, hits)
    assert {level.nodes for level in course.levels} <= {0, 1}
    assert course.accepted == sum(hits[:-1])


def test_wider_trees_find_more():
    some = guesser("g", (1,), [True, False, False] * 8, [False] * 20)
    for stages in (2, 3):
        chain, pair = some.pace(stages, 1), some.pace(stages, 2)
        assert chain.acceptance < pair.acceptance <= 1
        assert pair.tokens_per_tick > chain.tokens_per_tick
        assert all(b[1] < a[1] for a, b in zip(chain.answers, pair.answers, strict=True))
    assert some.pace(2, 2).acceptance == 1.0, "all leaves are true, and one of two guesses is right"
    assert some.pace(2, 2).leaves == 1.0
    assert some.pace(2, 2).answers == tuple((n, ticks_of(2, [True] * n)) for n in (24, 20))
    assert some.pace(3, 2).leaves > 1.0
    assert some.most(2) == 1.0
    assert some.most(1) == pytest.approx(8 / 44)


def test_ranks_of_a_raw_exit_stand_for_its_guesses():
    raw = Guesser("raw", (4,), (0.3, 0.5, 0.6, 0.8))
    found = [raw.pace(2, width).acceptance for width in (1, 2, 4, 8)]
    assert found == pytest.approx([0.3, 0.5, 0.6, 0.8], abs=0.06)
    assert raw.pace(3, 4).acceptance < raw.most(4) + 0.06
    assert raw.pace(3, 4).answers == ()


@given(st.integers(2, 6), st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_needed_acceptance_gives_plain_speed(stages, tick, plain):
    needed = needed_acceptance(stages, tick, plain)
    assert tokens_per_tick(stages, needed) / tick == pytest.approx(1 / plain)


# Splits


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_split_is_better_over_unequal_devices(data):
    stages = data.draw(st.integers(2, 4))
    exit_layer = data.draw(st.integers(1, LAYERS - stages + 1))
    layer = data.draw(st.lists(st.floats(0.5, 4), min_size=stages, max_size=stages))
    fixed = data.draw(st.floats(0, 8))
    taps = (exit_layer,)
    if stages == 3 and data.draw(st.booleans()):
        taps = (exit_layer, data.draw(st.integers(exit_layer, LAYERS)))

    def cost(split):
        busy = [n * one for n, one in zip(split, layer, strict=True)]
        busy[-1] += fixed
        return max(busy)

    found = best_split(LAYERS, stages=stages, exit_layer=exit_layer, taps=taps, cost=cost)
    every = [
        (exit_layer, *rest)
        for rest in itertools.product(range(1, LAYERS), repeat=stages - 1)
        if exit_layer + sum(rest) == LAYERS and in_time((exit_layer, *rest), taps)
    ]
    if not every:
        assert found is None
        return
    assert found in every
    assert cost(found) == pytest.approx(min(map(cost, every)))


def test_splits_that_cannot_be():
    def even(_split):
        return 1.0

    assert best_split(12, stages=2, exit_layer=12, taps=(12,), cost=even) is None
    assert best_split(12, stages=4, exit_layer=10, taps=(10,), cost=even) is None
    assert best_split(12, stages=3, exit_layer=6, taps=(6, 12), cost=even) is None
    assert best_split(12, stages=2, exit_layer=6, taps=(6, 12), cost=even) == (6, 6)


def test_two_busiest_stages_are_both_relieved():
    def cost(split):
        return max(split[1] * 2.0, split[2] * 1.0, split[3] * 0.5)

    found = best_split(12, stages=4, exit_layer=1, taps=(1,), cost=cost)
    assert cost(found) == 3.5


def test_no_layer_leaves_a_stage_that_owes_the_head_a_state():
    def cost(split):
        return max(split[0], 9 * split[1], split[2])

    free = best_split(12, stages=3, exit_layer=4, taps=(4,), cost=cost)
    assert free == (4, 1, 7)
    assert best_split(12, stages=3, exit_layer=4, taps=(4, 10), cost=cost) == (4, 6, 2)


# Parts


def timing(layers, length, seconds, **more):
    return Timing("cpu", 1, more.pop("busy", 1), layers, length, seconds, 9, **more)


def test_parts_are_found_again():
    def turn(m, s):
        return 0.5 + m * (1.0 + 0.001 * s)

    some = [timing(9, s, turn(9, s)) for s in (64, 256, 768)] + [timing(3, 256, turn(3, 256))]
    some += [timing(9, 256, turn(9, 256) + 4, lm=True)]
    some += [timing(9, 256, turn(9, 256) + 2, head="a"), timing(9, 256, 99.0, busy=2)]
    parts = fit_parts(some, threads=1, busy=1)
    assert parts.fixed == pytest.approx(0.5)
    assert parts.layer == pytest.approx(1.0)
    assert parts.slot == pytest.approx(0.001)
    assert parts.lm == pytest.approx(4)
    assert parts.head("a") == pytest.approx(2)
    assert parts.turn(4, 100, lm=True) == pytest.approx(turn(4, 100) + 4)


def test_parts_of_a_level_are_found_again():
    def turn(m, s):
        return 0.5 + m * (2.0 + 4 * 0.001 * s)

    narrow = PartTimes("cpu", 1, 2, 0.5, 1.0, 0.001, 3.0, (("a", 1.0), ("b", 1.0), ("raw", 3.0)))
    some = [timing(9, 64, turn(9, 64), busy=2, width=4), timing(8, 64, turn(8, 64) + 7, lm=True,
            busy=2, width=4), timing(9, 64, turn(9, 64) + 2, head="a", busy=2, width=4),
            timing(9, 64, 99.0, width=4), timing(9, 64, 99.0, busy=2, width=8)]  # fmt: skip
    wide = fit_wide(some, narrow, 4, {"a": "a", "b": "a", "c": "x"})
    assert wide.width == 4
    assert wide.layer == pytest.approx(2.0)
    assert wide.turn(3, 100, lm=True) == pytest.approx(turn(3, 100) + 7)
    assert dict(wide.heads) == pytest.approx({"a": 2, "b": 2, "raw": 7})


def test_noise_gives_no_negative_parts():
    some = [timing(9, 64, 9.0), timing(9, 256, 8.9), timing(3, 256, 2.9)]
    some.append(timing(9, 256, 13.0, lm=True))
    parts = fit_parts(some, threads=1, busy=1)
    assert parts.slot == 0
    assert parts.fixed >= 0
    assert parts.turn(9, 100) == pytest.approx(8.95, abs=0.2)


# Whole predictions


def process_times(**changes) -> ProcessTimes:
    alone = PartTimes("cpu", 1, 1, 0.0, 1.0, 0.0, 3.0, (("raw", 3.0), ("good", 1.0)))
    busy = PartTimes("cpu", 1, 2, 0.0, 1.2, 0.0, 3.6, (("raw", 3.6), ("good", 1.2)))
    boundary = Boundary(0.1, 0.0, 0.0, (1.0,), (6, 6))
    places = {2: (0, 1), 3: (0, 1, 0)}
    plain = (Plain(1, "cpu", 15.0), Plain(2, "cpu", 14.9))
    values = {
        "alone": {(2, 1): alone}, "busy": {(2, 1): busy}, "boundary": boundary, "places": places,
        "length": 100.0, "decoding": plain,
    }  # fmt: skip
    return ProcessTimes(**values | changes)


LAYOUT = Layout(LAYERS, {2: ("cpu",) * 2, 3: ("cpu",) * 3}, {2: 1, 3: 1}, True)


def test_candidates_are_ranked_and_explained():
    predictor = Predictor(process_times(), LAYOUT)
    assert predictor.plain.threads == 1, "nearly as fast: the same bits as the pipeline"
    some = guesser("good", (7, 12), [True] * 8 + [False] * 2)
    found = predictor.candidates([some], (1,))
    assert [c.split for c in found] == [(7, 5)]
    best = found[0]
    assert best.acceptance == pytest.approx(0.8)
    assert best.tick_seconds == pytest.approx(7 * 1.2 + 1.2, rel=0.05)
    assert best.limit == "acceptance"
    assert 0 < best.needed < 0.8
    right = guesser("good", (7, 12), [True] * 10)
    assert predictor.candidates([right], (1,))[0].limit in ("stage 0", "last stage", "stages")


def test_a_long_way_is_the_limit():
    slow = Boundary(9.0, 0.0, 0.0, (1.0,), (6, 6))
    predictor = Predictor(process_times(boundary=slow), LAYOUT)
    best = predictor.candidates([guesser("good", (6,), [True] * 9)], (1,))[0]
    assert best.limit == "boundary"


def test_what_the_runner_adds_is_seconds_and_what_it_lacks_a_share():
    def turns(beyond):
        boundary = Boundary(0.1, beyond, beyond, (1.0,), (6, 6))
        flow = process_times(boundary=boundary).flow(Setting((11, 1), "good", (11,)))
        return [turn.solo for turn in flow.turns], flow.head.solo

    assert turns(0.5) == ([11.5, 4.5], 1.0)
    probe = (6 + 9) / 2  # the probe's stages, one with the LM matrix
    less, head = turns(-1.5)
    assert less == pytest.approx([11 * 0.8, 4 * 0.8])
    assert head == pytest.approx(0.8)
    assert 1 - 1.5 / probe == pytest.approx(0.8)


def test_what_does_not_fit_is_left_out():
    layout = LAYOUT
    predictor = Predictor(process_times(), layout, lambda each: each.stages == 2)
    found = predictor.candidates([Guesser("raw", (4,), (0.2,))], (1,))
    assert [c.stages for c in found] == [2]


def test_the_suggested_exit_needs_little_and_is_settled():
    def score(layer, agreement):
        return LayerScore(layer, (0.1, 0.2, 0.3, 0.4), agreement)

    layers = [score(n, 0.5) for n in range(1, LAYERS)]
    predictor = Predictor(process_times(), LAYOUT)

    def need(layer):
        return predictor.suggest("good", [layers[layer - 1]]).needed

    least = min(range(1, LAYERS), key=need)
    found = predictor.suggest("good", layers)
    assert found.needed <= need(least) + 0.03
    far = max(range(1, LAYERS), key=need)
    assert need(far) > need(least) + 0.1
    layers[far - 1] = score(far, 0.99)
    assert predictor.suggest("good", layers).exit_layer != far
    near = [n for n in range(1, LAYERS) if need(n) <= need(least) + 0.03]
    layers[near[-1] - 1] = score(near[-1], 0.9)
    assert predictor.suggest("good", layers).exit_layer == near[-1]
    hopeless = Boundary(99.0, 0.0, 0.0, (1.0,), (6, 6))
    times = process_times(boundary=hopeless)
    assert Predictor(times, LAYOUT).suggest("good", layers) is None
    assert [g.taps for g in raw_guessers("raw", layers)] == [(n,) for n in range(1, LAYERS)]


def test_three_different_ones_are_checked():
    predictor = Predictor(process_times(), LAYOUT)
    found = predictor.candidates([Guesser("raw", (n,), (0.1 * n,)) for n in range(1, 9)], (1,))
    three = best_three([*found[:1], *found])
    assert len({(c.exit_layer, c.stages) for c in three}) == 3


def wide_times(factor, *, widths=(2, 4)) -> ProcessTimes:
    """Levels of a tree take ``factor`` times a chain's turn."""
    times = process_times()
    alone, busy = dict(times.alone), dict(times.busy)
    for parts in (alone, busy):
        one = parts[2, 1]
        for width in widths:
            heads = tuple((name, seconds * factor) for name, seconds in one.heads)
            parts[2, width] = replace(
                one, width=width, layer=one.layer * factor, lm=one.lm * factor, heads=heads
            )
    return replace(times, alone=alone, busy=busy)


@pytest.mark.parametrize(("factor", "best"), [(1.02, 2), (2.0, 1)])
def test_the_best_width_follows_from_its_times(factor, best):
    predictor = Predictor(wide_times(factor), LAYOUT)
    some = guesser("good", (6,), [True, True, False] * 9)
    found = predictor.candidates([some], (1, 2, 4, 8))
    assert {c.width for c in found} == {1, 2, 4}, "width 8 was not timed"
    assert found[0].width == best
    widths = {c.width: c for c in found if c.stages == 2}
    assert widths[1].acceptance == pytest.approx(2 / 3)
    assert widths[2].acceptance == 1.0
    assert widths[2].tick_seconds == pytest.approx(factor * widths[1].tick_seconds, rel=0.1)


def test_trees_of_hopeless_raw_exits_are_left_out():
    raw = [Guesser("raw", (6,), (0.02, 0.04, 0.05, 0.06)), Guesser("raw", (5,), (0.5, 0.9, 1, 1))]
    for factor, left in ((1.0, {5}), (3.0, set())):
        found = Predictor(wide_times(factor), LAYOUT).candidates(raw, (1, 2, 4))
        assert {c.exit_layer for c in found if c.width == 1} == {5, 6}
        assert {c.exit_layer for c in found if c.width > 1} == left


def test_a_draft_behind_several_leaves_takes_longer():
    times = wide_times(2.0)
    one, more = (Setting((6, 6), "good", (6,), 4, leaves) for leaves in (1.0, 1.5))
    assert times.flow(one).head.solo == pytest.approx(1.0)
    assert times.flow(more).head.solo == pytest.approx(1.5)


# Engines of one process


def test_stages_in_step_take_the_longest():
    times = StepTimes(
        "gpu", 12, 3, {1: 2.0, 2: 3.0, 3: 4.0}, {1: 1.0, 2: 1.1, 3: 1.3}, {"h": 0.5, "raw": 2.0}
    )
    assert times.plain()[0].seconds == pytest.approx(14.0)
    assert times.plain()[0].threads == 3
    even = times.tick(Setting((6, 6), "h", (6,)), 0.8)
    assert even == pytest.approx(6 * 1.1 + 3.0 + 0.5)
    uneven = times.tick(Setting((8, 4), "h", (8,)), 0.8)
    assert uneven == pytest.approx(4 * 1.1 + 4 * 1.0 + 3.0 + 0.5)
    assert times.tick(Setting((6, 6), "h", (6,)), 0.8, free="stage 0") == pytest.approx(even - 0.5)
    wide = replace(times, wide={Level(4): {2: 1.25, 3: 1.5}})
    assert wide.widths == (1, 4)
    assert wide.tick(Setting((6, 6), "h", (6,), 4), 0.8) == pytest.approx(1.25 * even)


@pytest.mark.parametrize(("overlap", "expected"), [(1.0, 13.0), (0.0, 19.0), (0.5, 16.0)])
def test_mixed_cards(overlap, expected):
    times = DeviceTimes(
        ("a", "b"), 12, 3, {"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.0}, {"h": 0.0}, 1.0, overlap
    )
    assert times.tick(Setting((6, 5), "h", (6,)), 1.0) == pytest.approx(expected)
    wide = replace(times, wide={Level(2): 1.5})
    assert wide.tick(Setting((6, 5), "h", (6,), 2), 1.0) == pytest.approx(1.5 * expected)
    assert [p.seconds for p in times.plain()] == [14.0, 26.0]
    split = best_split(
        12, stages=2, exit_layer=8, taps=(8,), cost=lambda s: times.quick(Setting(s, "h", (8,)))
    )
    assert split == (8, 4)


# The choice


def checked(speed_, head="good", acceptance=0.8, stages=2) -> Checked:
    split = (LAYERS,) if head is None else (LAYERS // stages,) * stages
    candidate = Candidate(
        decoder="ar" if head is None else "ppsd", split=split, devices=("cpu",) * len(split),
        processes=True, threads=1, head=head, width=1, acceptance=acceptance,
        tokens_per_tick=0.8, tick_seconds=0.02, tokens_per_second=speed_, limit="stage 0",
    )  # fmt: skip
    return Checked(candidate, speed_, speed_, speed_, acceptance, 0.8)


def test_the_fastest_measured_is_chosen():
    verdict = decide([checked(30, None), checked(36), checked(40, "raw")], names={"good": "G"})
    assert verdict.chosen.head == "raw"
    assert "40.0 tokens/s, 1.33 times ar's 30.0" in verdict.reason
    assert "stage 0 limits it" in verdict.reason


def test_nothing_beats_plain_decoding():
    verdict = decide([checked(30, None), checked(20, "raw", acceptance=0.1)], names={})
    assert verdict.chosen.decoder == "ar"
    assert "nothing beats ar's 30.0 tokens/s" in verdict.reason
    # tick = (1 / 1.9) / 20; a tick of that length gives 30 tokens/s at 2 - 30 * tick
    tick = tokens_per_tick(2, 0.1) / 20
    needed = needed_acceptance(2, tick, 1 / 30)
    assert f"would need {needed:.0%}" in verdict.reason


def test_no_share_would_do():
    slow = checked(8, "raw", acceptance=0.9)
    verdict = decide([checked(30, None), slow], names={})
    assert "for any share" in verdict.reason
