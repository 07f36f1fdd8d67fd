"""The graph runner against the in-process runner event by event, and against itself bit by bit.

Without a GPU the kernels run in Triton's interpreter; with one, compiled, in two formats.
"""

import cuda_cases
import pytest
import torch
from cuda_cases import CONTEXT, VOCABULARY, ask, assert_exact, assert_same_events, prompt
from cuda_fixtures import plain_answers, small_models
from models import forced_drafts

from ppsd_cli.core.events import Committed, Entered, FinishReason, Outcome
from ppsd_cli.core.plan import Sampling
from ppsd_cli.errors import StageError
from ppsd_cli.runtime.cuda.tiles import SPLIT

COUNT = 7
CUT = Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, seed=5)
DEEP_2, DEEP_3 = ((2, 0), (4, 1)), ((1, 0), (2, 1), (4, 2))


# Padding rows of attention have nothing to see; what they come to is never stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
small, plain = small_models(), plain_answers(COUNT)


def check_like_local(model, run, split, text, *, head, **options):
    """Event by event as the in-process runner, on fresh runners of both kinds."""
    if model.same_numbers:
        count = options.pop("count", COUNT)
        assert_same_events(run, ask(model.local(split, head=head), text, count=count, **options))


@pytest.mark.parametrize("kind", cuda_cases.KINDS)
def test_every_architecture(small, plain, kind):
    """Plain, naive split and guesses by raw exit; the prompt has three chunks and a window."""
    model, text = small(kind), prompt(19)
    reference = plain(kind, 19)
    check_like_local(model, reference, (model.layers,), text, head=None, drafting=False)
    splits = [(1, model.layers - 1), (1, 1, model.layers - 2)]
    for split in splits:
        naive = ask(model.graph(split, head=None), text, count=COUNT, drafting=False)
        assert_exact(naive, reference)
        check_like_local(model, naive, split, text, head=None, drafting=False)
    split = splits[kind in ("llama", "qwen2")]
    run = ask(model.graph(split, head="raw"), text, count=COUNT)
    assert_exact(run, reference)
    check_like_local(model, run, split, text, head="raw")


@pytest.mark.parametrize(
    ("split", "pattern"),
    [
        ((2, 2), "always"),
        ((2, 2), "never"),
        ((2, 2), "alternating"),
        ((1, 2, 1), "always"),
        ((1, 2, 1), "thirds"),
        ((1, 1, 1, 1), "never"),
        ((1, 1, 1, 1), "thirds"),
    ],
    ids=str,
)
def test_guesses_right_never_and_sometimes(small, plain, split, pattern):
    reference = plain("llama", 12)
    guesses = forced_drafts(reference.ids, pattern, VOCABULARY)
    runner = small("llama").graph(split)
    run = ask(runner, prompt(12), count=COUNT, forced=guesses)
    assert_exact(run, reference)
    accepted, corrected = run.count(Outcome.ACCEPTED), run.count(Outcome.CORRECTED)
    assert accepted + corrected == COUNT - 2, "all but the first and the last, which is not fed"
    assert (accepted == 0) == (pattern == "never")
    assert (corrected == 0) == (pattern == "always")
    ticks = run.commits[-1].tick - run.commits[0].tick
    assert ticks == accepted + len(split) * (COUNT - 1 - accepted)
    check_like_local(small("llama"), run, split, prompt(12), head="raw", forced=guesses)


@pytest.mark.parametrize(
    ("kind", "split", "taps", "changes"),
    [
        ("llama", (2, 2), ((2, 0),), {"blocks": 1}),
        ("llama", (2, 2), ((2, 0),), {"kind": "mlp", "ids": 3}),
        ("llama", (2, 2), DEEP_2, {"blocks": 2}),
        ("llama", (1, 3), ((1, 0), (3, 1)), {"blocks": 1}),
        ("llama", (1, 1, 2), DEEP_3, {"blocks": 1}),
        ("llama", (2, 1, 1), ((2, 0), (2, 1), (4, 2)), {"blocks": 1, "ids": 2}),
        ("biases", (1, 1, 1), ((1, 0), (2, 1), (3, 2)), {"blocks": 1}),
        ("qwen3", (1, 2), ((1, 0), (3, 1)), {"blocks": 1}),
    ],
    ids=str,
)
def test_draft_heads(small, plain, kind, split, taps, changes):
    """Logits of every guess, live and void, and what follows from them; some guesses are right."""
    model, reference = small(kind), plain(kind, 11)
    head = model.head(taps, **changes)
    guesses = forced_drafts(reference.ids, "thirds", VOCABULARY)[:4]
    run = ask(model.graph(split, head=head), prompt(11), count=COUNT, forced=guesses)
    assert_exact(run, reference)
    assert len(cuda_cases.drafts(run.results)) >= COUNT - 2
    check_like_local(model, run, split, prompt(11), head=head, forced=guesses)


@pytest.mark.parametrize("length", [1, 2])
def test_lags_before_the_first_token(small, plain, length):
    """A deep head looks back further than the prompt reaches."""
    model, reference = small("llama"), plain("llama", length)
    head = model.head(DEEP_3, blocks=1)
    run = ask(model.graph((1, 1, 2), head=head), prompt(length), count=COUNT)
    assert_exact(run, reference)
    check_like_local(model, run, (1, 1, 2), prompt(length), head=head)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.8, seed=7), CUT], ids=["all", "cut"])
def test_sampling(small, plain, sampling):
    """The text of a seed, whatever the split; draft and target share their noise."""
    model, reference = small("llama"), plain("llama", 12, sampling=sampling)
    assert reference.ids != plain("llama", 12).ids
    check_like_local(
        model, reference, (4,), prompt(12), head=None, drafting=False, sampling=sampling
    )
    run = ask(model.graph((3, 1)), prompt(12), count=COUNT, sampling=sampling)
    assert_exact(run, reference)
    check_like_local(model, run, (3, 1), prompt(12), head="raw", sampling=sampling)
    head = model.head(DEEP_2, blocks=1, ids=2)
    run = ask(model.graph((2, 2), head=head), prompt(12), count=4, sampling=sampling)
    assert run.ids == reference.ids[:4]
    check_like_local(model, run, (2, 2), prompt(12), head=head, sampling=sampling, count=4)


def test_settings_change_from_answer_to_answer(small, plain):
    """Graphs are recorded for each kind of request; the seed is none of their business."""
    runner, reference = small("llama").graph((2, 2)), plain("llama", 12)
    samplings = [Sampling(temperature=0.8, seed=7), CUT, Sampling(temperature=0.8, seed=8)]
    expected = [plain("llama", 12, sampling=s) for s in samplings]
    assert len({tuple(run.ids) for run in expected}) == 3
    for sampling, run in zip(samplings, expected, strict=True):
        assert_exact(ask(runner, prompt(12), count=COUNT, sampling=sampling), run)
        assert ask(runner, prompt(12), count=3).ids == reference.ids[:3]
        assert ask(runner, prompt(12), count=3, drafting=False).ids == reference.ids[:3]


def test_ahead_of_the_host(small, plain):
    """Without logits ticks run ahead; the events are those of a runner in step."""
    model, reference = small("llama"), plain("llama", 12)
    guesses = forced_drafts(reference.ids, "thirds", VOCABULARY)
    runner = model.graph((1, 2, 1))
    inner = ask(runner, prompt(12), count=COUNT, forced=guesses, keep_logits=False)
    assert runner.lookahead > 0
    expected = ask(model.graph((1, 2, 1)), prompt(12), count=COUNT, forced=guesses)
    assert cuda_cases.facts(inner.events) == cuda_cases.facts(expected.events)


@pytest.mark.parametrize("split", [(4,), (2, 2), (1, 2, 1)], ids=str)
def test_leftovers_do_not_reach_the_next_answer(small, plain, split):
    """Ends by EOS, by length 1 and 2 and by a reader who leaves, each with nodes in flight."""
    runner, reference = small("llama").graph(split), plain("llama", 12)
    firsts = [i for i, token in enumerate(reference.ids) if token not in reference.ids[:i]]
    assert len(firsts) > 2
    for keep in (False, True):
        guesses = forced_drafts(reference.ids, "always", VOCABULARY)
        run = ask(
            runner, prompt(12), count=COUNT, forced=guesses, keep_logits=keep,
            eos={reference.ids[firsts[2]]}, drafting=len(split) > 1,
        )  # fmt: skip
        assert run.ids == reference.ids[: firsts[2] + 1]
        assert run.reason is FinishReason.STOP
        for count in (1, 2):
            other = ask(runner, prompt(9, seed=2), count=count, drafting=False, keep_logits=keep)
            assert len(other.ids) == count
        run = ask(runner, prompt(12), count=2, keep_logits=keep, drafting=len(split) > 1)
        assert run.ids == reference.ids[:2]
    leave(runner, prompt(9, seed=3), events=14, drafting=len(split) > 1)
    assert runner.pending == 0
    run = ask(runner, prompt(12), count=COUNT, drafting=len(split) > 1)
    assert_exact(run, reference)


def leave(runner, text, *, events, drafting):
    """Begin an answer and close its generator after some events."""
    from cuda_cases import CHUNK

    from ppsd_cli.core.decode import decode
    from ppsd_cli.core.plan import Request
    from ppsd_cli.core.schedule import Limits, Schedule

    limits = Limits(40, CONTEXT)
    request = Request(Sampling(), drafting, limits.feed_limit(len(text)), None, len(text))
    schedule = Schedule(text, stages=runner.stages, chunk=CHUNK, request=request, limits=limits)
    answer = decode(runner, schedule)
    seen = [next(answer) for _ in range(events)]
    assert any(isinstance(event, Committed) for event in seen)
    answer.close()


@pytest.mark.parametrize("slots", [13, 14, 16])
def test_context_edge(small, plain, slots):
    """Slots end where the context does; feeding one token more would write to the spare slot."""
    model, reference = small("llama"), plain("llama", 12)
    for pattern in ("always", "alternating"):
        guesses = forced_drafts(reference.ids, pattern, VOCABULARY)
        runner = model.graph((1, 2, 1), slots=slots)
        run = ask(runner, prompt(12), count=COUNT, forced=guesses, context=slots)
        assert run.ids == reference.ids[: slots - 12]
        assert run.reason is FinishReason.CONTEXT
        assert torch.equal(run.logits, reference.logits[: slots - 12])
        fed = [e.position + e.tokens - 1 for e in run.events if isinstance(e, Entered)]
        assert max(fed) < slots


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_longer_than_one_program_of_attention(small, kind):
    """The answer passes the slot from which on attention joins partial results."""
    model, text = small(kind), prompt(SPLIT - 3)
    reference = model.plain(text, 6)
    check_like_local(model, reference, (model.layers,), text, head=None, drafting=False, count=6)
    head = model.head(((1, 0), (model.layers, 1)), blocks=1)
    guesses = forced_drafts(reference.ids, "alternating", VOCABULARY)
    split = (1, model.layers - 1)
    run = ask(model.graph(split, head=head), text, count=6, forced=guesses)
    assert_exact(run, reference)
    check_like_local(model, run, split, text, head=head, forced=guesses, count=6)


@pytest.mark.parametrize("where", ["target", "draft"])
def test_weights_that_are_not_numbers(small, where):
    """An error with a remedy, not a token."""
    model = small("llama")
    runner = model.graph((2, 2), head=model.head(((2, 0),), blocks=1))
    ask(runner, prompt(6), count=2)
    broken = runner.stage_list[-1].layers[-1].mlp_norm
    if where == "draft":
        broken = runner._head.weights.blocks[0].mlp_norm
    broken.fill_(float("nan"))
    with pytest.raises(StageError, match="not numbers"):
        ask(runner, prompt(6), count=6)
