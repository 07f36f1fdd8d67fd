"""The schedule of draft-then-verify against fake pipelines."""

import pytest
from eesd import bursts_of, expected_bursts
from fake_pipeline import VOCABULARY, FakePipeline, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import PATTERNS, PROMPT, check_flushes, expected

from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import (
    Committed,
    Entered,
    Finished,
    FinishReason,
    Flushed,
    Outcome,
    Ticked,
    Verified,
)
from ppsd_cli.core.plan import Bubble, Burst, Request, Sampling
from ppsd_cli.core.schedule import Limits, Schedule


def make_schedule(stages, prompt=PROMPT, *, limits, draft_length, chunk=4):
    request = Request(
        Sampling(),
        drafting=True,
        feed_limit=limits.feed_limit(len(prompt)),
        prompt_tokens=len(prompt),
        draft_length=draft_length,
    )
    return Schedule(prompt, stages=stages, chunk=chunk, request=request, limits=limits)


def check_bursts(events, prompt, limits, *, stages, draft_length):
    """Everything that one complete answer must satisfy."""
    commits = [e for e in events if isinstance(e, Committed)]
    tokens, reason = expected(prompt, limits)
    assert [e.token_id for e in commits] == tokens
    assert [e.position for e in commits] == list(range(len(prompt), len(prompt) + len(tokens)))
    assert [e.reason for e in events if isinstance(e, Finished)] == [reason]
    fed = [e for e in events if isinstance(e, Entered) and e.token_id is not None]
    by_tick = {tick: [e for e in fed if e.tick == tick] for tick in {e.tick for e in fed}}
    ticks = sorted(by_tick)
    assert ticks == list(range(commits[0].tick, commits[-1].tick, stages)), "a burst in n ticks"
    assert {e.tick for e in commits} <= {tick + stages for tick in ticks} | {commits[0].tick}
    for nodes in by_tick.values():
        assert [e.drafted for e in nodes] == [False] + [True] * (len(nodes) - 1)
        assert [e.position for e in nodes] == [nodes[0].position + i for i in range(len(nodes))]
    longest = min(len(prompt) + limits.max_new_tokens, limits.context)
    for nodes in by_tick.values():
        room = longest - 2 - nodes[0].position
        assert len(nodes) == 1 + min(draft_length, room), "fewer only near the limit"
    assert max((e.position for e in fed), default=0) < longest - 1
    check_flushes(events, commits)
    verified = [e for e in events if isinstance(e, Verified)]
    assert len({e.serial for e in verified}) == len(verified)
    last = max((i for i, e in enumerate(events) if isinstance(e, (Verified, Committed))), default=0)
    assert isinstance(events[last], Committed), "nothing is verified after the end"


@pytest.mark.parametrize("draft_length", range(1, 7))
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_over_stages_lengths_and_drafts(stages, draft_length, pattern):
    """Answers in a row on one pipeline; accepted guesses burst by burst as the pattern says."""
    for lookahead in (0, 2):
        pipeline = FakePipeline(stages, lookahead=lookahead, right=PATTERNS[pattern])
        for length, count in ((7, 20), (1, 9), (4, 1), (8, 2), (13, 15)):
            prompt = tuple((i * i + length) % VOCABULARY for i in range(length))
            limits = Limits(count, 64)
            schedule = make_schedule(stages, prompt, limits=limits, draft_length=draft_length)
            events = list(decode(pipeline, schedule))
            check_bursts(events, prompt, limits, stages=stages, draft_length=draft_length)
            right = [PATTERNS[pattern](i) for i in range(count)]
            assert bursts_of(events) == expected_bursts(right, draft_length)
            assert pipeline.pending == 0


@pytest.mark.parametrize("draft_length", [1, 3, 6])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_end_of_text_at_every_offset(draft_length, pattern):
    answer = continuation(PROMPT, 24)
    firsts = [i for i, token in enumerate(answer) if token not in answer[:i]]
    for offset in firsts:
        limits = Limits(24, 64, frozenset({answer[offset]}))
        pipeline = FakePipeline(2, lookahead=1, right=PATTERNS[pattern])
        for _ in range(2):
            schedule = make_schedule(2, limits=limits, draft_length=draft_length)
            events = list(decode(pipeline, schedule))
            check_bursts(events, PROMPT, limits, stages=2, draft_length=draft_length)
            assert sum(isinstance(e, Committed) for e in events) == offset + 1


def test_plans_in_order():
    """Chunks, bubbles while the prompt drains, then a burst in as many ticks as stages."""
    schedule = make_schedule(3, limits=Limits(9, 64), draft_length=5)
    plans = [schedule.next_plan() for _ in range(9)]
    wait = [Bubble(), Bubble()]
    assert plans[2:] == [*wait, Burst(5), *wait, Burst(5), Bubble()]


def test_one_answer_event_by_event():
    """Two stages, three guesses at a time: right, wrong, void; then all of the one that fits."""
    pipeline = FakePipeline(2, right=lambda i: i != 2)
    schedule = make_schedule(2, (1, 2), limits=Limits(5, 64), draft_length=3)
    events = list(decode(pipeline, schedule))
    a, b, c, d, e = continuation((1, 2), 5)
    facts = [event for event in events if not isinstance(event, Ticked)]
    void = facts[4:7]
    assert facts == [
        Entered(0, 0, 0, None, 2, False),
        Verified(2, 0, a, True, ()),
        Committed(2, 2, a, Outcome.UNDRAFTED),
        Entered(2, 1, 2, a, 1, False),
        Entered(2, 2, 3, b, 1, True),
        Entered(2, 3, 4, c + 1, 1, True),
        Entered(2, 4, 5, void[2].token_id, 1, True),
        Verified(4, 1, b, True, ()),
        Committed(4, 3, b, Outcome.ACCEPTED),
        Verified(4, 2, c, True, ()),
        Committed(4, 4, c, Outcome.CORRECTED, c + 1),
        Flushed(4, 4, (3, 4)),
        Verified(4, 3, facts[12].target_id, False, ()),
        Verified(4, 4, facts[13].target_id, False, ()),
        Entered(4, 5, 4, c, 1, False),
        Entered(4, 6, 5, d, 1, True),
        Verified(6, 5, d, True, ()),
        Committed(6, 5, d, Outcome.ACCEPTED),
        Verified(6, 6, e, True, ()),
        Committed(6, 6, e, Outcome.UNDRAFTED),
        Finished(6, FinishReason.LENGTH),
    ]


answers = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
        st.integers(1, 20),  # max_new_tokens
        st.integers(1, 25),  # room in the context
        st.sets(st.integers(0, VOCABULARY - 1), max_size=2),  # EOS
        st.integers(0, 60),  # events before the reader leaves; 0: never
        st.integers(0, 6),  # draft length; 0: the chain
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(
    stages=st.integers(1, 5),
    lookahead=st.integers(0, 3),
    chunk=st.integers(1, 6),
    right=st.lists(st.booleans(), min_size=1, max_size=30),
    each=answers,
)
def test_any_sequence_of_answers(stages, lookahead, chunk, right, each):
    """Also chains and bursts by turns, and readers that leave in the middle."""
    pipeline = FakePipeline(stages, lookahead=lookahead, right=lambda i: right[i % len(right)])
    for prompt, count, room, eos, leave, length in each:
        limits = Limits(count, len(prompt) + room, frozenset(eos))
        schedule = make_schedule(
            stages, tuple(prompt), limits=limits, chunk=chunk, draft_length=length
        )
        events = decode(pipeline, schedule)
        seen = []
        for event in events:
            seen.append(event)
            if len(seen) == leave:
                break
        events.close()
        assert pipeline.pending == 0
        if length and (not leave or len(seen) < leave):
            check_bursts(seen, tuple(prompt), limits, stages=stages, draft_length=length)
        committed = [e.token_id for e in seen if isinstance(e, Committed)]
        assert committed == expected(prompt, limits)[0][: len(committed)]
