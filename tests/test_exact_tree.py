"""Trees of guesses: the answer is the model's, on every width, split and kind of model.

The comparisons are in float64, where the width of a matrix cannot change a token: what differs is
a fault. Numbers in float32 are in docs/trees.md.
"""

from functools import cache
from itertools import product

import pytest
import torch
from models import CHUNK, CONTEXT, WINDOW, answer, forced_drafts, prompt_of, save_head
from trees import HeadOnText, assert_costs, assert_equal_answers, check_path_drafts, right_and_ranks

from ppsd_cli.core.events import Entered, FinishReason, Flushed, Outcome
from ppsd_cli.core.plan import Sampling

COUNT = 30
HOT = Sampling(1.5, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def plain(tiny):
    """Plain decoding of one stage in float64, by model, prompt length and sampling."""

    @cache
    def run(kind, length, sampling=None):
        runner = tiny(kind).double((6,), head=None)
        options = {} if sampling is None else {"sampling": sampling}
        return answer(runner, prompt_of(length), count=COUNT, drafting=False, **options)

    return run


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("llama", (3, 3)),
        ("llama", (1, 1, 1, 1, 2)),
        ("mistral", (1, 2, 3)),
        ("qwen2", (1, 2, 3)),
        ("qwen3", (1, 2, 3)),
    ],
    ids=str,
)
def test_every_width_and_split(tiny, plain, kind, split):
    """Guesses of the raw exit, and right ones at various ranks; prompts of several chunks."""
    runner = tiny(kind).double(split, width=8)
    for width, sampling in product((2, 8), (None, HOT)):
        reference = plain(kind, 37, sampling)
        options = {"width": width} | ({} if sampling is None else {"sampling": sampling})
        for forced in ({}, right_and_ranks(reference, width)):
            run = answer(runner, prompt_of(37), count=COUNT, **options, **forced)
            assert_equal_answers(run, reference)
            assert_costs(run, len(split))
        assert run.count(Outcome.ACCEPTED) > COUNT / 3, "most ranks are in the tree"


@pytest.mark.parametrize("length", [1, CHUNK, 3 * CHUNK + 3])
def test_prompt_lengths_and_several_answers(tiny, plain, length):
    """Leftovers of one answer do no harm to the next, of whatever width."""
    runner = tiny("qwen2").double((2, 2, 2), width=6)
    reference = plain("qwen2", length)
    for width in (6, 1, 3, 6):
        forced = right_and_ranks(reference, width) if width > 1 else {}
        run = answer(runner, prompt_of(length), count=COUNT, width=width, **forced)
        assert_equal_answers(run, reference)
        answer(runner, prompt_of(50, seed=3), count=9, width=4)


@pytest.mark.parametrize("length", [WINDOW - 3, WINDOW, 2 * WINDOW + 1])
def test_sliding_window_counts_positions_not_slots(tiny, plain, length):
    """Void nodes pass the window; committed nodes lie in slots far from their positions."""
    reference, runner = plain("mistral", length), tiny("mistral").double((2, 4), width=8)
    for seed in range(4):
        forced = right_and_ranks(reference, 8, seed=seed)
        run = answer(runner, prompt_of(length), count=COUNT, width=8, **forced)
        assert_equal_answers(run, reference)
        nodes = [node for result in run.results for node in result.entered]
        assert any(node.slot != node.position for node in nodes)


def test_end_of_text_at_every_offset_and_the_next_answer(tiny, plain):
    reference, runner = plain("llama", 20), tiny("llama").double((2, 2, 2), width=4)
    firsts = [i for i, token in enumerate(reference.ids) if token not in reference.ids[:i]]
    assert len(firsts) > 8
    for offset in firsts:
        forced = right_and_ranks(reference, 4, seed=offset)
        run = answer(
            runner, prompt_of(20), count=COUNT, eos={reference.ids[offset]}, width=4, **forced
        )
        assert_equal_answers(run, reference, count=offset + 1)
        assert run.reason is FinishReason.STOP
    assert_equal_answers(answer(runner, prompt_of(20), count=COUNT, width=2), reference)


@pytest.mark.parametrize("count", range(1, 8))
def test_the_wanted_length_ends_a_tree(tiny, plain, count):
    reference, runner = plain("llama", 37), tiny("llama").double((2, 2, 2), width=3)
    run = answer(runner, prompt_of(37), count=count, width=3, **right_and_ranks(reference, 3))
    assert_equal_answers(run, reference, count=count)
    fed = [e.position for e in run.events if isinstance(e, Entered) and e.token_id is not None]
    assert max(fed, default=0) < 37 + count - 1, "the last token that is wanted is not fed"


@pytest.mark.parametrize("slots", [38, 39, 48])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_context_edge(tiny, plain, kind, slots):
    """Caches end with the context and what is in flight: one slot more would fail."""
    reference = plain(kind, 37)
    runner = tiny(kind).double((2, 2, 2), slots=slots, width=8)
    for seed in range(3):
        forced = right_and_ranks(reference, 8, seed=seed)
        run = answer(runner, prompt_of(37), context=slots, width=8, **forced)
        assert_equal_answers(run, reference, count=slots - 37)
        assert run.reason is FinishReason.CONTEXT


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"min_p": 0.02, "top_p": 0.95}])
def test_sampled_text_of_a_seed_is_that_of_plain_decoding(tiny, plain, options):
    runner = tiny("llama").double((1, 2, 3), width=4)
    texts = set()
    for seed in range(5):
        sampling = Sampling(temperature=1.5, seed=seed, **options)
        reference = plain("llama", 12, sampling)
        run = answer(runner, prompt_of(12), count=COUNT, sampling=sampling, width=4)
        assert_equal_answers(run, reference)
        texts.add(tuple(run.ids))
    assert len(texts) == 5


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_an_exit_that_equals_the_model_is_always_right(tiny, temperature):
    """Its own choice, noise included, is the best child of every node."""
    runner = tiny("echo").runner((2, 2, 2), width=4)
    for seed in range(3):
        sampling = Sampling(temperature, top_p=0.98, seed=seed)
        run = answer(
            runner, prompt_of(20, seed=seed), count=COUNT, sampling=sampling, width=4,
            tree_scale=30.0,
        )  # fmt: skip
        assert run.count(Outcome.ACCEPTED) == COUNT - 2
        assert not any(isinstance(e, Flushed) for e in run.events)


HEADS = [
    ((2, 2, 2), [(2, 0), (4, 1), (6, 2)]),
    ((2, 2, 2), [(2, 0), (3, 1), (5, 2)]),
    ((2, 4), [(2, 0), (6, 1)]),
    ((2, 1, 1, 1, 1), [(2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]),
    ((2, 2, 2), [(2, 0)]),
]


@pytest.mark.parametrize(("split", "taps"), HEADS, ids=str)
@pytest.mark.parametrize("kind", ["qwen2"])
def test_a_head_sees_the_states_of_its_own_path(tiny, plain, tmp_path, kind, split, taps):
    """Guesses on every path, also those that turn out wrong, are those of a chain on that path."""
    model, reference, prompt = tiny(kind), plain(kind, 37), prompt_of(37)
    _, weights = save_head(tmp_path, model, taps)
    head = HeadOnText(model, weights)
    runner = model.runner(split, head=str(tmp_path), width=4)
    for seed in range(2):
        forced = right_and_ranks(reference, 4, seed=seed)
        run = answer(runner, prompt, count=16, width=4, **forced)
        assert run.ids == reference.ids[:16]
        count, aside = check_path_drafts(run, prompt, head)
        assert count > 20
        assert aside > 5 or len(split) == 2, "over two stages every leaf is on the true path"


def test_one_head_serves_chains_and_trees_by_turns(tiny, plain, tmp_path):
    model, reference = tiny("qwen3"), plain("qwen3", 20)
    save_head(tmp_path, model, [(2, 0), (4, 1), (6, 2)])
    alone = model.double((2, 2, 2), head=str(tmp_path))
    both = model.double((2, 2, 2), head=str(tmp_path), width=5)
    chain = answer(alone, prompt_of(20), count=COUNT)
    for width in (1, 5, 1, 2):
        run = answer(both, prompt_of(20), count=COUNT, width=width)
        assert_equal_answers(run, reference)
        if width == 1:
            drafts = [d for r in run.results for d in r.draft_logits]
            expected = [d for r in chain.results for d in r.draft_logits]
            assert all(torch.equal(a, b) for a, b in zip(drafts, expected, strict=True))
    assert max(chain.ids) < CONTEXT


def test_forced_guesses_at_a_rank(tiny, plain):
    """Rank 0 never flushes, the width's rank always does; shares decide who enters between."""
    reference, runner = plain("llama", 20), tiny("llama").double((2, 2, 2), width=4)
    for rank, flushes in ((0, 0), (4, COUNT - 2)):
        run = answer(
            runner, prompt_of(20), count=COUNT, width=4, forced=reference.ids,
            ranks=(rank,) * COUNT, rank_scores=(-0.4, -2.0, -3.0, -4.0),
        )  # fmt: skip
        assert run.ids == reference.ids
        assert sum(isinstance(e, Flushed) for e in run.events) == flushes
    wrong = forced_drafts(reference.ids, "never")
    run = answer(runner, prompt_of(20), count=COUNT, width=4, forced=wrong)
    assert run.ids == reference.ids
