"""Two depths a tick on the graph runner: event by event the in-process runner, as for one depth."""

import pytest
from cuda_cases import ask, prompt
from cuda_fixtures import plain_answers, small_models
from test_cuda_trees import check, nodes_of
from trees import right_and_ranks

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Sampling

COUNT = 6
DRAWN = Sampling(temperature=0.9, seed=7)
TAPS_3 = ((1, 0), (1, 1), (2, 2), (2, 3), (4, 4))
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
small, plain = small_models(), plain_answers(COUNT)


def two_depths(model, taps=((1, 0),), **changes):
    return model.head(taps, depth=2, **changes)


@pytest.mark.parametrize(
    ("kind", "split", "taps", "width"),
    [
        ("llama", (1, 1, 2), TAPS_3, 4),
        ("mistral", (1, 1, 1), ((1, 0),), 8),
        ("qwen3", (2, 1), ((2, 0),), 2),
    ],
    ids=str,
)
def test_right_guesses_at_both_depths(small, plain, kind, split, taps, width):
    """At various ranks; three chunks of prompt."""
    model, reference = small(kind), plain(kind, 19)
    options = {"head": two_depths(model, taps), "width": width, "depth": 2}
    run = check(model, reference, split, 19, **options, **right_and_ranks(reference, width))
    assert run.count(Outcome.ACCEPTED) > 0
    levels = [{node.serial: node.parent for node in result.entered} for result in run.results]
    assert any(parent in level for level in levels for parent in level.values())
    assert max(map(len, levels)) == width


@pytest.mark.parametrize("groups", [None, (1, 2)], ids=str)
def test_the_heads_own_guesses(small, plain, groups):
    """On one device and on several: logits behind every node are those of its path."""
    model = small("llama")
    options = {"head": two_depths(model, TAPS_3), "width": 4, "depth": 2, "groups": groups}
    run = check(model, plain("llama", 12), (1, 1, 2), 12, **options)
    assert len(nodes_of(run)) > COUNT


def test_sampling_and_a_reduced_vocabulary(small, plain):
    model, reference = small("llama"), plain("llama", 12, 6, DRAWN)
    head = two_depths(model, ids=2)
    check(model, reference, (2, 2), 12, head=two_depths(model, ((2, 0),)), width=3, depth=2,
          sampling=DRAWN, tree_scale=0.7)  # fmt: skip
    check(model, reference, (1, 3), 12, head=head, width=3, depth=2, sampling=DRAWN)


def test_two_tokens_a_tick(small, plain):
    """Always right at both depths: with two stages a tick commits two tokens."""
    model, reference = small("llama"), plain("llama", 5)
    ticks = {}
    for depth in (1, 2):
        run = check(
            model, reference, (1, 3), 5, head=two_depths(model), width=2, depth=depth,
            forced=reference.ids, ranks=(0,) * COUNT, rank_scores=(-0.1, -9.0),
        )  # fmt: skip
        ticks[depth] = run.commits[-1].tick - run.commits[1].tick
    if model.same_numbers:
        assert ticks[1] == COUNT - 2
        assert ticks[2] <= COUNT / 2


def test_answers_of_one_depth_and_of_two(small, plain):
    """After each other on one runner, ahead of the host; a prompt of one token."""
    model, reference = small("llama"), plain("llama", 12)
    runner = model.graph((1, 1, 2), head=two_depths(model, TAPS_3), width=4, depth=2)
    for width, depth in ((4, 2), (1, 1), (4, 1)):
        forced = right_and_ranks(reference, width) if width > 1 else {}
        options = {"count": COUNT, "width": width, "depth": depth, "keep_logits": False}
        run = ask(runner, prompt(12), **options, **forced)
        assert run.ids == reference.ids or not model.same_numbers
        assert depth == 1 or ask(runner, prompt(1, seed=2), **options | {"count": 2}).ids


@pytest.mark.parametrize("slots", [14, 16])
def test_context_edge(small, plain, slots):
    model, reference = small("llama"), plain("llama", 12)
    forced = right_and_ranks(reference, 4)
    head = two_depths(model, TAPS_3)
    runner = model.graph((1, 1, 2), slots=slots, head=head, width=4, depth=2)
    run = ask(runner, prompt(12), count=COUNT, context=slots, width=4, depth=2, **forced)
    assert run.ids == reference.ids[: slots - 12] or not model.same_numbers
    assert max(position for _, position, *_ in nodes_of(run)) <= slots - 2
    assert max(slot for *_, slot, _, _ in nodes_of(run)) < slots + 12


def test_many_ticks_wrap_the_records(small):
    model = small("llama")
    if model.device == "cpu":
        pytest.skip("a minute in the interpreter; one depth does it there")
    reference = model.plain(prompt(5), 75)
    runner = model.graph((1, 3), head=two_depths(model), width=2, depth=2)
    forced = right_and_ranks(reference, 3)
    options = {"count": 75, "width": 2, "depth": 2, "keep_logits": False}
    run = ask(runner, prompt(5), **options, **forced)
    assert run.ids == reference.ids or not model.same_numbers
    assert len(run.results) > 64 or not model.same_numbers
