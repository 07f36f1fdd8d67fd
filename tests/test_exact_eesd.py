"""Draft, then verify: the answer is the model's, in as many bursts as the guesses allow.

Verifying several rows at once rounds otherwise than one row at a time, so ids may differ from plain
decoding where two tokens are nearly level; logits are close, not bit-equal.
"""

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from eesd import bursts_of, expected_bursts
from models import (
    CHUNK,
    CONTEXT,
    WINDOW,
    answer,
    forced_drafts,
    prompt_of,
    save_head,
)
from test_heads import PlainHead

from ppsd_cli.core.events import Entered, FinishReason, Outcome
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.stats import StatsBuilder

SPLITS = [(3, 3), (2, 4), (1, 2, 3)]
PATTERNS = ["always", "never", "alternating", "thirds"]
LENGTHS = range(1, 7)
COUNT, LEVEL = 30, 1e-3


@pytest.fixture(scope="module")
def plain(tiny):
    """Plain decoding of one stage, by model, prompt length and sampling."""

    @cache
    def run(kind, length, sampling=None):
        runner = tiny(kind).runner((6,), head=None)
        options = {} if sampling is None else {"sampling": sampling}
        return answer(runner, prompt_of(length), count=COUNT, drafting=False, **options)

    return run


def same(run, reference, *, count: int | None = None) -> bool:
    """Whether ids are equal; where not, the two tokens must have been level."""
    expected = reference.ids[:count]
    first = next((i for i, pair in enumerate(zip(run.ids, expected)) if len({*pair}) > 1), None)  # noqa: B905
    if first is None:
        assert run.ids == expected
        torch.testing.assert_close(
            run.logits, reference.logits[:count], rtol=1e-3, atol=2e-3 * run.logits.std().item()
        )
        return True
    row = reference.logits[first]
    assert row[expected[first]] - row[run.ids[first]] < LEVEL
    return False


def stats_of(run, stages):
    builder = StatsBuilder(stages)
    for event in run.events:
        builder.add(event)
    return builder.snapshot()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_draft_length_and_pattern(tiny, plain, kind, split):
    """Right text, and exactly the bursts and ticks that the pattern of right guesses gives."""
    reference, runner, stages = plain(kind, 37), tiny(kind).runner(split), len(split)
    equal = []
    for length, pattern in product(LENGTHS, PATTERNS):
        forced = forced_drafts(reference.ids, pattern)
        run = answer(runner, prompt_of(37), count=COUNT, forced=forced, draft_length=length)
        equal.append(same(run, reference))
        if not equal[-1]:
            continue
        right = [f == t for f, t in zip(forced, reference.ids, strict=True)]
        accepted = expected_bursts(right, length)
        assert bursts_of(run) == accepted
        stats = stats_of(run, stages)
        assert stats.feeds == len(accepted)
        assert stats.ticks == stages * (1 + len(accepted))
        assert stats.accepted == sum(accepted)
        assert stats.tokens_per_feed == (COUNT - 1) / len(accepted)
        if pattern == "always":
            assert len(accepted) == -(-(COUNT - 1) // (length + 1))
            assert stats.acceptance_rate == 1
        if pattern == "never":
            assert stats.ticks == stages * COUNT
            assert stats.acceptance_rate == 0
    assert sum(equal) >= 0.9 * len(equal)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 3])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_prompt_lengths_with_the_raw_exits_own_guesses(tiny, plain, kind, length):
    reference = plain(kind, length)
    runner = tiny(kind).runner((2, 4))
    assert all(
        same(answer(runner, prompt_of(length), count=COUNT, draft_length=k), reference)
        for k in (1, 4)
    )


@pytest.mark.parametrize("split", [(6,), (2, 4), (2, 2, 2)], ids=str)
def test_decoders_one_after_another_on_the_same_stages(tiny, plain, split):
    """What a burst leaves in caches and rings does no harm to the next answer, and vice versa."""
    runner, reference = tiny("llama").runner(split), plain("llama", 37)
    for _ in range(2):
        for options in ({"draft_length": 5}, {}, {"drafting": False}, {"draft_length": 1}):
            run = answer(runner, prompt_of(37), count=COUNT, **options)
            if options.get("draft_length"):
                assert same(run, reference)
            else:
                assert torch.equal(run.logits, reference.logits)
        answer(runner, prompt_of(50, seed=3), count=9, draft_length=6)


@pytest.mark.parametrize("length", [WINDOW - 3, WINDOW - 1, WINDOW, WINDOW + 1])
def test_sliding_window_edge(tiny, plain, length):
    """Void rows fill and pass the window while guesses are wrong."""
    reference, runner = plain("mistral", length), tiny("mistral").runner((2, 4))
    for pattern in ("never", "alternating", "always"):
        forced = forced_drafts(reference.ids, pattern)
        run = answer(runner, prompt_of(length), count=COUNT, forced=forced, draft_length=6)
        assert same(run, reference)


@pytest.mark.parametrize("draft_length", [1, 3, 6])
@pytest.mark.parametrize("pattern", ["always", "thirds", "never"])
def test_end_of_text_at_every_offset_and_the_next_answer(tiny, plain, pattern, draft_length):
    """Also in the middle of an accepted run: what stands behind it is not said."""
    reference = plain("llama", 20)
    runner = tiny("llama").runner((2, 4))
    firsts = [i for i, token in enumerate(reference.ids) if token not in reference.ids[:i]]
    assert len(firsts) > 8
    for offset in firsts:
        forced = forced_drafts(reference.ids, pattern)
        run = answer(
            runner,
            prompt_of(20),
            count=COUNT,
            forced=forced,
            eos={reference.ids[offset]},
            draft_length=draft_length,
        )
        assert same(run, reference, count=offset + 1)
        assert run.reason is FinishReason.STOP
    assert same(answer(runner, prompt_of(20), count=COUNT, draft_length=2), reference)


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("pattern", ["always", "never"])
def test_the_wanted_length_cuts_a_burst(tiny, plain, pattern, count):
    reference = plain("llama", 37)
    runner = tiny("llama").runner((2, 4))
    forced = forced_drafts(reference.ids, pattern)
    run = answer(runner, prompt_of(37), count=count, forced=forced, draft_length=4)
    assert same(run, reference, count=count)
    assert run.reason is FinishReason.LENGTH
    fed = [e.position for e in run.events if isinstance(e, Entered) and e.token_id is not None]
    assert max(fed, default=0) < 37 + count - 1, "the last token that is wanted is not fed"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("slots", [38, 39, 41, 48])
def test_context_edge(tiny, plain, kind, slots):
    """Slots end exactly where the context does: feeding one token more would fail."""
    reference, room = plain(kind, 37), slots - 37
    runner = tiny(kind).runner((2, 2, 2), slots=slots)
    for pattern, length in product(("always", "never", "alternating"), (1, 4, 6)):
        forced = forced_drafts(reference.ids, pattern)
        run = answer(
            runner, prompt_of(37), forced=forced, context=slots, draft_length=length
        )  # fmt: skip
        assert same(run, reference, count=room)
        assert run.reason is FinishReason.CONTEXT


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"min_p": 0.02, "top_p": 0.95}])
def test_sampled_text_of_a_seed_is_that_of_plain_decoding(tiny, plain, options):
    runners = [tiny("llama").runner(split) for split in ((2, 4), (1, 2, 3))]
    texts, equal = set(), []
    for seed in range(12):
        sampling = Sampling(temperature=1.5, seed=seed, **options)
        reference = plain("llama", 12, sampling=sampling)
        texts.add(tuple(reference.ids))
        run = answer(
            runners[seed % 2],
            prompt_of(12),
            count=COUNT,
            sampling=sampling,
            forced=None if seed % 4 < 2 else forced_drafts(reference.ids, "thirds"),
            draft_length=1 + seed % 5,
        )
        equal.append(run.ids == reference.ids)
    assert sum(equal) >= 11, "but for nearly level tokens, whose noise makes them rare"
    assert len(texts) == 12


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_an_exit_that_equals_the_model_is_always_right(tiny, temperature):
    runner = tiny("echo").runner((2, 4))
    for seed, length in product(range(3), (1, 4)):
        sampling = Sampling(temperature, top_p=0.98, seed=seed)
        run = answer(
            runner, prompt_of(20, seed=seed), count=COUNT, sampling=sampling, draft_length=length
        )
        assert run.count(Outcome.CORRECTED) == 0
        assert len(bursts_of(run)) == -(-(COUNT - 1) // (length + 1))


class Early:
    """A model's states as a burst sees them: from ``due`` on no deeper one than the exit's."""

    def __init__(self, tiny, exit_layer: int, due: int) -> None:
        self._tiny, self._exit, self._due = tiny, exit_layer, due

    def states(self, text):
        seen = [state.clone() for state in self._tiny.states(text)]
        for deeper in seen[self._exit + 1 :]:
            deeper[self._due :] = seen[self._exit][self._due :]
        return seen


def drafts_of_burst(tiny, weights, text, due) -> list[torch.Tensor]:
    """Logits after each position of the text, for a burst that begins at ``due``."""
    head = PlainHead(tiny, weights)
    head.tiny = Early(tiny, weights.taps[0].depth, due)
    return head.draft_logits(text)


def check_drafts(run, expected: Callable[[int], list[torch.Tensor]], text) -> int:
    """Guesses on a right prefix have the logits of ``expected(due)``; how many there were."""
    checked = 0
    for result in run.results:
        nodes = [node for node in result.entered if node.token_id is not None]
        if len(nodes) < 2:
            continue
        reference = expected(nodes[0].position)
        for before, node, logits in zip(nodes, nodes[1:], result.draft_logits, strict=False):
            if before.token_id != text[before.position]:
                break
            row = reference[node.position - 1]
            torch.testing.assert_close(logits, row, rtol=1e-3, atol=2e-3 * row.std().item())
            checked += 1
    return checked


@pytest.mark.parametrize(
    ("split", "taps"),
    [
        ((2, 4), [(2, 0)]),
        ((2, 4), [(2, 0), (6, 1)]),
        ((2, 4), [(2, 0), (4, 1), (6, 2)]),
        ((2, 2, 2), [(2, 0), (3, 1), (6, 2)]),
        ((3, 2, 1), [(3, 0), (3, 1), (6, 2)]),
    ],
    ids=str,
)
def test_guesses_of_block_and_deep_heads(tiny, plain, split, taps, tmp_path):
    """A deep head reads exit states where a burst has no deeper ones, and real ones before it."""
    model, reference = tiny("qwen2"), plain("qwen2", 37)
    _, weights = save_head(tmp_path, model, taps)
    text = (*prompt_of(37), *reference.ids)

    expected = cache(lambda due: drafts_of_burst(model, weights, text, due))

    runner = model.runner(split, head=str(tmp_path))
    checked = 0
    for pattern, draft_length in (("always", 4), ("thirds", 4), (None, 1)):
        forced = None if pattern is None else forced_drafts(reference.ids, pattern)
        run = answer(runner, prompt_of(37), count=COUNT, forced=forced, draft_length=draft_length)
        assert same(run, reference)
        checked += check_drafts(run, expected, text)
    assert checked > 40


def test_the_longest_burst_on_the_smallest_chunks(tiny, tmp_path):
    """Rings hold two bursts beside the prompt."""
    model, prompt = tiny("llama"), prompt_of(3)
    whole = model.runner((6,), head=None, chunk=1)
    reference = answer(whole, prompt, count=150, drafting=False, chunk=1)
    _, weights = save_head(tmp_path, model, [(2, 0), (6, 1)], blocks=1)
    runner = model.runner((2, 4), head=str(tmp_path), chunk=1)
    forced = forced_drafts(reference.ids, "always")
    run = answer(runner, prompt, count=150, forced=forced, chunk=1, draft_length=64)
    assert same(run, reference)
    text = (*prompt, *reference.ids)

    expected = cache(lambda due: drafts_of_burst(model, weights, text, due))

    assert check_drafts(run, expected, text) > 130
    assert len(text) < CONTEXT
