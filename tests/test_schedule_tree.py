"""The schedule of trees against fake pipelines: what is committed, when, and how answers end."""

from itertools import pairwise

import pytest
from fake_pipeline import VOCABULARY, FakePipeline, continuation
from fake_tree import FakeTree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import PROMPT, expected

from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import (
    Committed,
    Entered,
    Finished,
    FinishReason,
    Flushed,
    Outcome,
    Pruned,
    Ticked,
    Verified,
)
from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.core.schedule import Limits, Schedule

RANKS = {
    "best": lambda _: 0,
    "second": lambda _: 1,
    "never": lambda _: VOCABULARY,
    "mixed": lambda i: (0, 2, 0, 1, VOCABULARY, 0)[i % 6],
}


def make_schedule(stages, prompt=PROMPT, *, limits, width, chunk=4, depth=1):
    request = Request(
        Sampling(),
        drafting=True,
        feed_limit=limits.feed_limit(len(prompt)),
        prompt_tokens=len(prompt),
        width=width,
        depth=depth,
    )
    return Schedule(prompt, stages=stages, chunk=chunk, request=request, limits=limits)


def run(pipeline, prompt=PROMPT, *, limits, width, **options):
    schedule = make_schedule(pipeline.stages, prompt, limits=limits, width=width, **options)
    return list(decode(pipeline, schedule))


def check_tree(events, prompt, limits, *, stages, width, depth=1):
    """Everything that one complete answer must satisfy."""
    commits = [e for e in events if isinstance(e, Committed)]
    tokens, reason = expected(prompt, limits)
    assert [e.token_id for e in commits] == tokens
    assert [e.position for e in commits] == list(range(len(prompt), len(prompt) + len(tokens)))
    assert [e.reason for e in events if isinstance(e, Finished)] == [reason]
    fed = [e for e in events if isinstance(e, Entered) and e.token_id is not None]
    for tick in {e.tick for e in fed}:
        level = [e for e in fed if e.tick == tick]
        assert len(level) <= width
        serials = {e.serial for e in level}
        behind = [e for e in level if e.parent in serials or (not level[0].drafted and e.drafted)]
        assert not behind or depth == 2, "a level has one depth"
        assert not {e.serial for e in behind} & {e.parent for e in level}, "or two"
        assert len({(e.parent, e.token_id) for e in level}) == len(level), "no node twice"
        assert all(e.drafted for e in level[1:])
        assert depth == 2 or len(level) == 1 or level[0].drafted
    guesses = [(e.parent, e.token_id) for e in fed if e.parent is not None]
    assert len(set(guesses)) == len(guesses), "nor in another level"
    longest = min(len(prompt) + limits.max_new_tokens, limits.context)
    assert max((e.position for e in fed), default=0) < longest - 1
    for before, after in pairwise(commits):
        if before.outcome is not Outcome.ACCEPTED:
            assert after.tick - before.tick == stages, "n ticks after a flush"
        else:
            assert 2 - depth <= after.tick - before.tick <= stages
    check_void(events, commits)


def check_void(events, commits):
    """Void nodes never decide, live ones do once; each correction voids everything."""
    live, position_of = [], {}
    for event in events:
        match event:
            case Entered() if event.token_id is not None:
                live.append(event.serial)
                position_of[event.serial] = event.position
            case Verified() if event.serial in position_of:
                assert event.live == (event.serial in live)
                live = [serial for serial in live if serial != event.serial]
            case Flushed():
                assert list(event.void) == [s for s in live if s in event.void] != []
                live = []
            case Pruned():
                assert set(event.void) < set(live), "something stays"
                live = [serial for serial in live if serial not in event.void]
                assert all(position_of[serial] >= event.position for serial in live)
    wrong = [e.position for e in commits if e.outcome is Outcome.CORRECTED]
    assert wrong == [e.position for e in events if isinstance(e, Flushed)]


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("pattern", RANKS)
def test_answers_over_stages_widths_and_ranks(stages, width, pattern):
    """Five answers in a row on one pipeline, with what the one before left in flight."""
    for lookahead in (0, 2):
        pipeline = FakeTree(stages, lookahead=lookahead, rank=RANKS[pattern])
        for length, count in ((7, 20), (1, 9), (4, 1), (8, 2), (13, 15)):
            prompt = tuple((i * i + length) % VOCABULARY for i in range(length))
            limits = Limits(count, 64)
            events = run(pipeline, prompt, limits=limits, width=width)
            check_tree(events, prompt, limits, stages=stages, width=width)
            assert pipeline.pending == 0
            outcomes = {e.outcome for e in events if isinstance(e, Committed)}
            if stages > 1 and count > 2 and pattern in ("best", "never"):
                sole = Outcome.ACCEPTED if pattern == "best" else Outcome.CORRECTED
                assert sole in outcomes
                assert {Outcome.ACCEPTED, Outcome.CORRECTED} - outcomes


@pytest.mark.parametrize("width", [2, 5, 8])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("pattern", RANKS)
def test_two_depths_a_tick(stages, width, pattern):
    for lookahead in (0, 2):
        pipeline = FakeTree(stages, lookahead=lookahead, rank=RANKS[pattern])
        for length, count in ((7, 20), (1, 9), (4, 1), (8, 2), (13, 15)):
            prompt = tuple((i * i + length) % VOCABULARY for i in range(length))
            limits = Limits(count, 64)
            events = run(pipeline, prompt, limits=limits, width=width, depth=2)
            check_tree(events, prompt, limits, stages=stages, width=width, depth=2)
            assert pipeline.pending == 0


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_two_depths_commit_two_tokens_a_tick(stages):
    """Always right: after the first token a tick brings two, where one depth brings one."""
    limits, ticks = Limits(41, 128), []
    for depth in (1, 2):
        pipeline = FakeTree(stages, rank=RANKS["best"], shares=(-0.1, -4.0, -8.0))
        commits = [
            e
            for e in run(pipeline, limits=limits, width=2, depth=depth)
            if isinstance(e, Committed)
        ]
        ticks.append(commits[-1].tick - commits[1].tick)
    assert ticks[0] == 39
    assert ticks[1] in (19, 20)


def test_a_tree_catches_what_flushes_a_chain():
    """The second guess is always right: the chain flushes each time, the tree of two rarely."""
    limits = Limits(24, 64)
    flushes = []
    for width in (1, 2, 4):
        events = run(FakeTree(3, rank=RANKS["second"]), limits=limits, width=width)
        flushes.append(sum(isinstance(e, Flushed) for e in events))
    assert flushes[0] == 22, "all but the first and the last"
    assert max(flushes[1:]) <= flushes[0] / 2


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("pattern", ["always", "never", "mostly"])
def test_width_one_is_the_chain_event_by_event(stages, pattern):
    right = {"always": lambda _: True, "never": lambda _: False, "mostly": lambda i: i % 5 != 3}
    chosen = right[pattern]
    limits = Limits(24, 64)
    tree = FakeTree(stages, rank=lambda i: 0 if chosen(i) else VOCABULARY)
    chain = FakePipeline(stages, right=chosen)

    def facts(pipeline):
        events = run(pipeline, limits=limits, width=1)
        return [replace_parent(e) for e in events]

    assert facts(tree) == facts(chain)
    assert all(node.slot == node.position for node in tree.fed)


def replace_parent(event):
    if isinstance(event, Entered):
        return (event.tick, event.serial, event.position, event.token_id, event.drafted)
    return event


@pytest.mark.parametrize("pattern", ["best", "mixed"])
@pytest.mark.parametrize("stages", [2, 4])
def test_end_of_text_at_every_offset(stages, pattern):
    answer = continuation(PROMPT, 24)
    for offset in [i for i, token in enumerate(answer) if token not in answer[:i]]:
        limits = Limits(24, 64, frozenset({answer[offset]}))
        pipeline = FakeTree(stages, lookahead=1, rank=RANKS[pattern])
        for _ in range(2):
            events = run(pipeline, limits=limits, width=3)
            check_tree(events, PROMPT, limits, stages=stages, width=3)
            assert sum(isinstance(e, Committed) for e in events) == offset + 1


@pytest.mark.parametrize("room", [1, 2, 3, 4, 7])
def test_context_edge(room):
    limits = Limits(100, len(PROMPT) + room)
    for pattern in RANKS.values():
        pipeline = FakeTree(3, lookahead=2, rank=pattern)
        events = run(pipeline, limits=limits, width=4)
        check_tree(events, PROMPT, limits, stages=3, width=4)
        assert max(node.position for node in pipeline.fed) <= limits.context - 1
        assert max(node.last_slot for node in pipeline.fed) < limits.context + 3 * 4


def test_one_answer_event_by_event():
    """Two stages, width two: the second guess right, then none, then the best."""
    ranks = {2: 1, 3: VOCABULARY}
    pipeline = FakeTree(2, rank=lambda i: ranks.get(i, 0))
    events = run(pipeline, (1, 2), limits=Limits(5, 64), width=2)
    a, b, c, d, e = continuation((1, 2), 5)
    facts = [event for event in events if not isinstance(event, Ticked)]
    entered = {event.serial: event for event in facts if isinstance(event, Entered)}
    assert (entered[2].token_id, entered[2].parent, entered[2].tick) == (b, 1, 3)
    assert entered[3].parent == 1
    assert [x for x in facts if isinstance(x, (Committed, Flushed, Pruned, Finished))] == [
        Committed(2, 2, a, Outcome.UNDRAFTED),
        Committed(4, 3, b, Outcome.ACCEPTED),
        Pruned(4, 3, (3,)),
        Committed(5, 4, c, Outcome.ACCEPTED),
        Pruned(5, 4, (4,)),
        Committed(6, 5, d, Outcome.CORRECTED, d + 1),
        Flushed(6, 5, (6, 7)),
        Committed(8, 6, e, Outcome.UNDRAFTED),
        Finished(8, FinishReason.LENGTH),
    ]


@settings(max_examples=150, deadline=None)
@given(
    stages=st.integers(1, 5),
    lookahead=st.integers(0, 3),
    chunk=st.integers(1, 6),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=20),
    each=st.lists(
        st.tuples(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
            st.integers(1, 20),  # max_new_tokens
            st.integers(1, 25),  # room in the context
            st.sets(st.integers(0, VOCABULARY - 1), max_size=2),  # EOS
            st.integers(0, 60),  # events before the reader leaves; 0: never
            st.integers(1, 6),  # width
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_any_sequence_of_answers(stages, lookahead, chunk, ranks, each):
    """Also readers that leave in the middle, and other widths."""
    pipeline = FakeTree(stages, lookahead=lookahead, rank=lambda i: ranks[i % len(ranks)])
    for prompt, count, room, eos, leave, width in each:
        limits = Limits(count, len(prompt) + room, frozenset(eos))
        schedule = make_schedule(stages, tuple(prompt), limits=limits, chunk=chunk, width=width)
        events = decode(pipeline, schedule)
        seen = []
        for event in events:
            seen.append(event)
            if len(seen) == leave:
                break
        events.close()
        assert pipeline.pending == 0
        if not leave or len(seen) < leave:
            check_tree(seen, tuple(prompt), limits, stages=stages, width=width)
        committed = [e.token_id for e in seen if isinstance(e, Committed)]
        assert committed == expected(prompt, limits)[0][: len(committed)]
