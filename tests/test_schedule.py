"""The schedule against fake pipelines: what is committed, when, and how answers end."""

from itertools import pairwise

import pytest
import torch
from fake_pipeline import VOCABULARY, FakePipeline, continuation, hash_model
from hypothesis import given, settings
from hypothesis import strategies as st

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
from ppsd_cli.core.plan import Bubble, Prompt, Request, Sampling, Step, chunks
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.core.tree import accepts

PROMPT = (3, 1, 4, 1, 5, 9, 2)
PATTERNS = {
    "never": lambda _: False,
    "always": lambda _: True,
    "alternating": lambda i: i % 2 == 0,
    "mostly": lambda i: i % 5 != 3,
}


def make_schedule(stages, prompt=PROMPT, *, limits, chunk=4, drafting=True):
    request = Request(
        sampling=Sampling(),
        drafting=drafting,
        feed_limit=limits.feed_limit(len(prompt)),
        prompt_tokens=len(prompt),
    )
    return Schedule(prompt, stages=stages, chunk=chunk, request=request, limits=limits)


def expected(prompt, limits):
    """The model's own answer under these limits, and why it ends."""
    tokens = []
    while True:
        tokens.append(hash_model((*prompt, *tokens)))
        if tokens[-1] in limits.eos_ids:
            return tokens, FinishReason.STOP
        if len(tokens) >= limits.max_new_tokens:
            return tokens, FinishReason.LENGTH
        if len(prompt) + len(tokens) >= limits.context:
            return tokens, FinishReason.CONTEXT


def check_answer(events, prompt, limits, *, stages, drafting):
    """Everything that one complete answer must satisfy."""
    commits = [e for e in events if isinstance(e, Committed)]
    tokens, reason = expected(prompt, limits)
    assert [e.token_id for e in commits] == tokens
    assert [e.position for e in commits] == list(range(len(prompt), len(prompt) + len(tokens)))
    assert [e.reason for e in events if isinstance(e, Finished)] == [reason]
    chunk_ticks = [e.tick for e in events if isinstance(e, Entered) and e.token_id is None]
    assert chunk_ticks == list(range(chunk_ticks[0], chunk_ticks[0] + len(chunk_ticks)))
    assert commits[0].tick - chunk_ticks[-1] == stages, "prefill drains in n ticks"
    assert commits[0].outcome is Outcome.UNDRAFTED
    for before, after in pairwise(commits):
        cost = 1 if before.outcome is Outcome.ACCEPTED else stages
        assert after.tick - before.tick == cost, "1 tick after an accepted token, else n"
    if not drafting or stages == 1:
        assert {e.outcome for e in commits} == {Outcome.UNDRAFTED}
    check_flushes(events, commits)
    fed = [e.position for e in events if isinstance(e, Entered)]
    wanted = min(len(prompt) + limits.max_new_tokens, limits.context)
    assert max(fed) < max(wanted - 1, len(prompt)), "the last token that is wanted is not fed"


def check_flushes(events, commits):
    """Each correction voids every live node; void nodes never decide; live ones do once."""
    live, first = [], min(e.serial for e in events if isinstance(e, Entered))
    corrections = {e.position: e for e in commits if e.outcome is Outcome.CORRECTED}
    flushes = [e for e in events if isinstance(e, Flushed)]
    assert sorted(corrections) == [e.position for e in flushes]
    for correction in corrections.values():
        assert correction.draft_id is not None
        assert correction.draft_id != correction.token_id
    for event in events:
        match event:
            case Entered():
                live.append(event.serial)
            case Verified() if event.serial >= first:
                assert event.live == (event.serial in live), "matched by serial, void ignored"
                live = [serial for serial in live if serial != event.serial]
            case Verified():
                assert not event.live, "a leftover of the answer before"
            case Flushed():
                assert list(event.void) == [s for s in live if s in event.void]
                assert event.void
                live = []


@pytest.mark.parametrize("lookahead", range(4))
@pytest.mark.parametrize("stages", range(1, 7))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_over_stages_lookahead_and_drafts(stages, lookahead, pattern):
    """Five answers in a row on one pipeline, with what the one before left in flight."""
    pipeline = FakePipeline(stages, lookahead=lookahead, right=PATTERNS[pattern])
    for length, count in ((7, 20), (1, 9), (4, 1), (8, 2), (13, 15)):
        prompt = tuple((i * i + length) % VOCABULARY for i in range(length))
        limits = Limits(count, 64)
        events = list(decode(pipeline, make_schedule(stages, prompt, limits=limits)))
        check_answer(events, prompt, limits, stages=stages, drafting=True)
        assert pipeline.pending == 0
        commits = [e for e in events if isinstance(e, Committed)]
        outcomes = {e.outcome for e in commits[1:-1]}
        if stages > 1 and count > 2 and pattern in ("never", "always"):
            sole = Outcome.ACCEPTED if pattern == "always" else Outcome.CORRECTED
            assert outcomes == {sole}


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_plain_decoding_never_guesses(stages, lookahead):
    pipeline = FakePipeline(stages, lookahead=lookahead, right=PATTERNS["always"])
    limits = Limits(12, 64)
    events = list(decode(pipeline, make_schedule(stages, limits=limits, drafting=False)))
    check_answer(events, PROMPT, limits, stages=stages, drafting=False)
    assert not any(e.drafted for e in events if isinstance(e, Entered))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_end_of_text_at_every_offset(stages, pattern):
    """EOS as the n-th token of the answer, for every n at which it can come first."""
    answer = continuation(PROMPT, 24)
    firsts = [i for i, token in enumerate(answer) if token not in answer[:i]]
    assert len(firsts) > 5
    for offset in firsts:
        limits = Limits(24, 64, frozenset({answer[offset]}))
        pipeline = FakePipeline(stages, lookahead=1, right=PATTERNS[pattern])
        for _ in range(2):
            events = list(decode(pipeline, make_schedule(stages, limits=limits)))
            check_answer(events, PROMPT, limits, stages=stages, drafting=True)
            assert sum(isinstance(e, Committed) for e in events) == offset + 1


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("room", [1, 2, 3, 4, 7])
def test_context_edge(stages, room):
    """Nothing is fed beyond the context, and the token that fills it ends the answer."""
    for pattern in PATTERNS.values():
        limits = Limits(100, len(PROMPT) + room)
        pipeline = FakePipeline(stages, lookahead=2, right=pattern)
        events = list(decode(pipeline, make_schedule(stages, limits=limits)))
        check_answer(events, PROMPT, limits, stages=stages, drafting=True)
        assert [e.reason for e in events if isinstance(e, Finished)] == [FinishReason.CONTEXT]
        assert max(node.position for node in pipeline.fed) <= limits.context - 1


@pytest.mark.parametrize("lookahead", range(4))
def test_closing_early_leaves_nothing_pending_and_the_next_answer_is_right(lookahead):
    for stop_after in range(1, 25):
        pipeline = FakePipeline(3, lookahead=lookahead, right=PATTERNS["alternating"])
        limits = Limits(20, 64)
        events = decode(pipeline, make_schedule(3, limits=limits))
        for _ in range(stop_after):
            next(events)
        events.close()
        assert pipeline.pending == 0
        following = (8, 6, 4, 2, 0)
        complete = list(decode(pipeline, make_schedule(3, following, limits=limits)))
        check_answer(complete, following, limits, stages=3, drafting=True)


def test_plans_in_order():
    """Chunks, then bubbles while the prompt drains, then a step a tick; n ticks if not drafting."""
    limits = Limits(9, 64)
    drafting = make_schedule(3, limits=limits)
    plans = [drafting.next_plan() for _ in range(7)]
    assert plans[0] == Prompt(PROMPT[:4], 0, False, plans[0].request)
    assert plans[1] == Prompt(PROMPT[4:], 4, True, None)
    assert plans[2:] == [Bubble(), Bubble(), Step(), Step(), Step()]
    plain = make_schedule(3, limits=limits, drafting=False)
    plans = [plain.next_plan() for _ in range(8)]
    assert plans[2:] == [Bubble(), Bubble(), Step(), Bubble(), Bubble(), Step()]


def test_one_answer_event_by_event():
    """Three stages, guesses right, wrong, right: every event but the ticks."""
    pipeline = FakePipeline(3, right=lambda i: i != 2)
    events = list(decode(pipeline, make_schedule(3, (1, 2), limits=Limits(4, 64))))
    a, b, c, d = continuation((1, 2), 4)
    bad = c + 1
    after_bad = hash_model((1, 2, a, b, bad))
    facts = [e for e in events if not isinstance(e, Ticked)]
    assert facts == [
        Entered(0, 0, 0, None, 2, False),
        Verified(3, 0, a, True, ()),
        Committed(3, 2, a, Outcome.UNDRAFTED),
        Entered(3, 1, 2, a, 1, False),
        Entered(4, 2, 3, b, 1, True),
        Entered(5, 3, 4, bad, 1, True),
        Verified(6, 1, b, True, ()),
        Committed(6, 3, b, Outcome.ACCEPTED),
        Verified(7, 2, c, True, ()),
        Committed(7, 4, c, Outcome.CORRECTED, bad),
        Flushed(7, 4, (3,)),
        Entered(7, 4, 4, c, 1, False),
        Verified(8, 3, after_bad, False, ()),
        Verified(10, 4, d, True, ()),
        Committed(10, 5, d, Outcome.UNDRAFTED),
        Finished(10, FinishReason.LENGTH),
    ]
    assert [e.tick for e in events if isinstance(e, Ticked)] == list(range(11))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_chunks_cover_the_prompt(size):
    parts = chunks(PROMPT, size)
    assert tuple(token for part in parts for token in part) == PROMPT
    assert {len(part) for part in parts[:-1]} <= {size}
    assert 1 <= len(parts[-1]) <= size


def test_tensor_accept_rule_on_the_traces_of_pipelines():
    fed, targets, kept = [], [], []
    for stages in (2, 3, 5):
        for pattern in PATTERNS.values():
            pipeline = FakePipeline(stages, right=pattern)
            events = list(decode(pipeline, make_schedule(stages, limits=Limits(40, 64))))
            drafted = {Outcome.ACCEPTED, Outcome.CORRECTED}
            commits = [e for e in events if isinstance(e, Committed) and e.outcome in drafted]
            pairs = pipeline.verified[-len(commits) :]
            assert len(pairs) == len(commits)
            fed += [pair[0] for pair in pairs]
            targets += [pair[1] for pair in pairs]
            kept += [e.outcome is Outcome.ACCEPTED for e in commits]
    assert accepts(torch.tensor(fed), torch.tensor(targets)).tolist() == kept
    assert {True, False} == set(kept)


answers = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
        st.integers(1, 20),  # max_new_tokens
        st.integers(1, 25),  # room in the context
        st.sets(st.integers(0, VOCABULARY - 1), max_size=2),  # EOS
        st.integers(0, 60),  # events before the reader leaves; 0: never
        st.booleans(),  # drafting
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(
    stages=st.integers(1, 6),
    lookahead=st.integers(0, 3),
    chunk=st.integers(1, 6),
    right=st.lists(st.booleans(), min_size=1, max_size=30),
    each=answers,
)
def test_any_sequence_of_answers(stages, lookahead, chunk, right, each):
    pipeline = FakePipeline(stages, lookahead=lookahead, right=lambda i: right[i % len(right)])
    for prompt, count, room, eos, leave, drafting in each:
        limits = Limits(count, len(prompt) + room, frozenset(eos))
        schedule = make_schedule(
            stages, tuple(prompt), limits=limits, chunk=chunk, drafting=drafting
        )
        events = decode(pipeline, schedule)
        seen = []
        for event in events:
            seen.append(event)
            if len(seen) == leave:
                break
        events.close()
        assert pipeline.pending == 0
        if not leave or len(seen) < leave:
            check_answer(seen, tuple(prompt), limits, stages=stages, drafting=drafting)
        committed = [e.token_id for e in seen if isinstance(e, Committed)]
        assert committed == expected(prompt, limits)[0][: len(committed)]
