"""Bursts on the graph runner: event by event those of the in-process runner, drafts included.

Without a GPU the kernels run in Triton's interpreter; with one, compiled, in two formats.
"""

from contextlib import nullcontext

import cuda_cases
import pytest
import triton_cpu
from cuda_cases import VOCABULARY, ask, assert_same_events, prompt
from cuda_fixtures import plain_answers, small_models
from eesd import bursts_of, expected_bursts
from models import forced_drafts, wrong
from test_cuda_engine import CUT, DEEP_2, DEEP_3
from test_cuda_faults import swap_kernels

from ppsd_cli.core.events import FinishReason
from ppsd_cli.core.plan import Sampling
from ppsd_cli.errors import StageError

COUNT = 7
SAMPLING = Sampling(temperature=0.8, seed=7)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
small, plain = small_models(), plain_answers(COUNT, local=True)


def ask_both(model, split, text, *, head="raw", **options):
    """The graph runner's answer, compared with the in-process runner's."""
    options.setdefault("count", COUNT)
    run = ask(model.graph(split, head=head), text, **options)
    if model.same_numbers:
        assert_same_events(run, ask(model.local(split, head=head), text, **options))
    return run


def right_then_wrong(ids):
    """A burst of three is right in full, the next not, and then the head says what it likes."""
    return [*ids[:5], wrong(ids[5], VOCABULARY)]


def rows_of(run):
    """Token rows that entered in each tick with any."""
    fed = ([n for n in r.entered if n.token_id is not None] for r in run.results)
    return [len(nodes) for nodes in fed if nodes]


@pytest.mark.parametrize(
    ("split", "length", "pattern"),
    [
        ((2, 2), 1, "always"),
        ((1, 3), 5, "thirds"),
        ((1, 2, 1), 2, "alternating"),
        ((4,), 2, "always"),
    ],
    ids=str,
)
def test_draft_lengths_and_patterns(small, plain, split, length, pattern):
    """Right text, in exactly the bursts and ticks that the pattern of right guesses gives."""
    model, reference = small("llama"), plain("llama", 12)
    forced = forced_drafts(reference.ids, pattern, VOCABULARY)
    run = ask_both(model, split, prompt(12), forced=forced, draft_length=length)
    if not model.same_numbers:
        return
    assert run.ids == reference.ids
    right = [f == t for f, t in zip(forced, reference.ids, strict=True)]
    accepted = expected_bursts(right, length)
    assert bursts_of(run) == [*accepted, *[0] * (len(bursts_of(run)) - len(accepted))]
    assert run.commits[-1].tick - run.commits[0].tick == len(split) * len(accepted)


@pytest.mark.parametrize(
    ("kind", "split", "taps", "changes"),
    [
        ("llama", (2, 2), ((2, 0),), {"blocks": 2}),
        ("llama", (2, 2), DEEP_2, {"blocks": 2}),
        ("llama", (1, 1, 2), DEEP_3, {"blocks": 2, "ids": 2}),
        ("llama", (2, 1, 1), ((2, 0), (2, 1), (4, 2)), {"blocks": 1}),
        ("biases", (1, 1, 1), ((1, 0), (2, 1), (3, 2)), {"blocks": 1}),
        ("qwen3", (1, 2), ((1, 0), (3, 1)), {"blocks": 1}),
    ],
    ids=str,
)
def test_draft_heads(small, plain, kind, split, taps, changes):
    """Logits of every guess, with exit states in place of those that do not exist yet."""
    model, reference = small(kind), plain(kind, 11, count=9)
    forced = right_then_wrong(reference.ids)
    head = model.head(taps, **changes)
    options = {"count": 9, "forced": forced, "draft_length": 3}
    run = ask_both(model, split, prompt(11), head=head, **options)
    assert len(cuda_cases.drafts(run.results)) >= 6
    if model.same_numbers:
        assert run.ids == reference.ids


@pytest.mark.parametrize(("length", "burst"), [(1, 3)])
def test_positions_before_the_first_token(small, length, burst):
    """A head's call over the newest rows reaches back behind the prompt's start."""
    model = small("llama")
    head = model.head(DEEP_3, blocks=2)
    ask_both(model, (1, 1, 2), prompt(length), head=head, draft_length=burst, count=5)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_windows_and_norms_of_heads(small, plain, kind):
    """Void rows fill and pass the window while guesses are wrong."""
    model, reference = small(kind), plain(kind, 7)
    forced = forced_drafts(reference.ids, "alternating", VOCABULARY)
    ask_both(model, (1, 2), prompt(7), forced=forced, draft_length=4)


@pytest.mark.parametrize("sampling", [SAMPLING, CUT], ids=["all", "cut"])
def test_sampling(small, plain, sampling):
    """Guesses and answers of all rows share the noise of their positions."""
    model, reference = small("llama"), plain("llama", 12, sampling=sampling)
    head = model.head(DEEP_2, blocks=1, ids=2)
    forced = right_then_wrong(reference.ids)[:2]
    options = {"sampling": sampling, "forced": forced, "draft_length": 3}
    run = ask_both(model, (2, 2), prompt(12), head=head, **options)
    if model.same_numbers:
        assert run.ids == reference.ids
        assert run.ids != plain("llama", 12).ids


@pytest.mark.parametrize("count", [1, 3])
def test_the_wanted_length_cuts_a_burst(small, plain, count):
    model, reference = small("llama"), plain("llama", 12)
    forced = forced_drafts(reference.ids, "always", VOCABULARY)
    run = ask_both(model, (2, 2), prompt(12), count=count, forced=forced, draft_length=3)
    assert run.reason is FinishReason.LENGTH
    assert sum(rows_of(run)) == count - 1, "the last token that is wanted is not fed"


@pytest.mark.parametrize(("slots", "pattern"), [(13, "always"), (15, "never")])
def test_context_edge(small, plain, slots, pattern):
    """Slots end where the context does; rows behind it go to the spare slot."""
    model, reference = small("llama"), plain("llama", 12)
    head = model.head(DEEP_2, blocks=1)
    forced = forced_drafts(reference.ids, pattern, VOCABULARY)
    runner = model.graph((2, 2), head=head, slots=slots)
    run = ask(runner, prompt(12), count=COUNT, forced=forced, context=slots, draft_length=4)
    assert run.reason is FinishReason.CONTEXT
    assert sum(rows_of(run)) >= slots - 12 - 1
    if model.same_numbers:
        assert run.ids == reference.ids[: slots - 12]


def test_decoders_one_after_another_on_the_same_stages(small, plain):
    """What a burst leaves in caches, rings and logs does no harm to the next answer."""
    model, reference = small("llama"), plain("llama", 12)
    head = model.head(DEEP_3, blocks=1)
    runner = model.graph((1, 1, 2), head=head)
    firsts = [i for i, token in enumerate(reference.ids) if token not in reference.ids[:i]]
    forced = forced_drafts(reference.ids, "always", VOCABULARY)
    for options in (
        {"draft_length": 4, "forced": forced, "eos": {reference.ids[firsts[2]]}},
        {"drafting": False, "count": 3},
        {"draft_length": 2, "count": 5},
        {"count": 5},
        {"draft_length": 1, "sampling": SAMPLING, "count": 3},
        {"draft_length": 4, "count": 3},
    ):
        settings = {"count": COUNT} | options
        run = ask(runner, prompt(12), **settings)
        if model.same_numbers:
            fresh = ask(model.local((1, 1, 2), head=head), prompt(12), **settings)
            assert_same_events(run, fresh)
    ask(runner, prompt(9, seed=2), count=3, draft_length=2, keep_logits=False)
    assert runner.pending == 0


def test_ahead_of_the_host(small, plain):
    """Without logits the next burst is launched before the last is read; events are the same."""
    model, reference = small("llama"), plain("llama", 12)
    forced = forced_drafts(reference.ids, "thirds", VOCABULARY)
    runner = model.graph((2, 2))
    options = {"count": COUNT, "forced": forced, "draft_length": 2}
    inner = ask(runner, prompt(12), keep_logits=False, **options)
    assert runner.lookahead == 2, "the next burst, beside the bubble of this one"
    expected = ask(runner, prompt(12), **options)
    assert cuda_cases.facts(inner.events) == cuda_cases.facts(expected.events)


def test_the_longest_burst(small, plain):
    """Fifteen guesses; more are refused before anything loads (test_cli.py)."""
    model, reference = small("llama"), plain("llama", 5, count=17)
    forced = forced_drafts(reference.ids, "always", VOCABULARY)
    head = model.head(((1, 0), (4, 1)), blocks=1)
    options = {"head": head, "count": 17, "forced": forced, "draft_length": 15}
    run = ask_both(model, (1, 3), prompt(5), **options)
    assert max(rows_of(run)) == 16


@pytest.mark.parametrize("where", ["target", "draft"])
def test_weights_that_are_not_numbers(small, where):
    """An error, not a token."""
    model = small("llama")
    runner = model.graph((2, 2), head=model.head(DEEP_2, blocks=1))
    ask(runner, prompt(6), count=2, draft_length=2)
    broken = runner.stage_list[-1].layers[-1].mlp_norm
    if where == "draft":
        broken = runner._head.weights.blocks[0].mlp_norm
    broken.fill_(float("nan"))
    with pytest.raises(StageError, match="not numbers"):
        ask(runner, prompt(6), count=6, draft_length=2)


def no_call_over_several_rows(patch):
    from ppsd_cli.runtime.cuda import lanes

    patch.setattr(lanes.HeadLane, "widened", lambda self, _width: self)


def two_rows_for_a_deep_head(patch):
    from ppsd_cli.runtime.cuda import lanes

    widened = lanes.HeadLane.widened
    patch.setattr(lanes.HeadLane, "widened", lambda self, _width: widened(self, 2))


FAULTS = [
    ("heir == target", "heir != target"),
    ("tl.where(r == last, place + 1, 0)", "tl.where(r == last, place, 0)"),
    ("enters = (tl.load(before + 1) > 0) & (position < limit)", "enters = position < limit"),
    ("tl.where(enters, position, trash)", "position"),
    ("inner = row - (W - 1) + w - lag", "inner = row - (W - 1) + w"),
    ("tl.load(mine + 3) % RING, RING", "(tl.load(mine + 3) + 1) % RING, RING"),
    ("tl.load(source_ptr + lag)", "lag"),
]


@pytest.mark.parametrize("fault", [*range(len(FAULTS)), "one row", "two rows", None], ids=str)
def test_a_planted_fault_is_caught(tmp_path_factory, monkeypatch, small, plain, fault):
    """Changes of the burst's kernels, and heads that do not make rows anew."""
    model, reference = small("biases"), plain("biases", 12)
    if not model.same_numbers or triton_cpu.missing():
        pytest.skip("in the interpreter")
    head = model.head(((1, 0), (2, 1), (3, 2)), blocks=2)
    forced = right_then_wrong(reference.ids)
    options = {"count": 7, "forced": forced, "draft_length": 3}
    expected = ask(model.local((1, 1, 1), head=head), prompt(12), **options)

    if fault == "one row":
        no_call_over_several_rows(monkeypatch)
    elif fault == "two rows":
        two_rows_for_a_deep_head(monkeypatch)
    elif fault is not None:
        folder = tmp_path_factory.mktemp("kernels")
        swap_kernels(monkeypatch, folder, "burst_control", *FAULTS[fault])
    with nullcontext() if fault is None else pytest.raises((AssertionError, ValueError)):
        run = ask(model.graph((1, 1, 1), head=head), prompt(12), **options)
        assert_same_events(run, expected)
