"""The chain's output is the model's own: token ids and logits bit-equal to plain decoding."""

from functools import cache

import pytest
import torch
from models import CHUNK, CONTEXT, WINDOW, answer, forced_drafts, prompt_of, save_head

from ppsd_cli.core.events import Entered, FinishReason, Outcome
from ppsd_cli.core.plan import Sampling

SPLITS = [(6,), (3, 3), (1, 5), (4, 2), (2, 2, 2), (1, 2, 3), (1,) * 6]
PATTERNS = ["always", "never", "alternating", "thirds"]
COUNT = 40


@pytest.fixture(scope="module")
def plain(tiny):
    """Plain decoding of one stage, by model, number format and prompt length."""

    @cache
    def run(kind, length, dtype="float32", sampling=None):
        runner = tiny(kind).runner((6,), head=None, dtype=dtype)
        options = {} if sampling is None else {"sampling": sampling}
        return answer(runner, prompt_of(length), count=COUNT, drafting=False, **options)

    return run


def assert_same(run, reference):
    assert run.ids == reference.ids
    assert torch.equal(run.logits, reference.logits), "logits are not bit-equal"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "biases"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_and_pattern(tiny, plain, kind, split):
    """Raw exit and forced guesses one after another on the same stages: leftovers do no harm."""
    reference = plain(kind, 37)
    runner = tiny(kind).runner(split)
    assert_same(answer(runner, prompt_of(37), count=COUNT, drafting=False), reference)
    assert_same(answer(runner, prompt_of(37), count=COUNT), reference)
    for pattern in PATTERNS:
        forced = forced_drafts(reference.ids, pattern)
        run = answer(runner, prompt_of(37), count=COUNT, forced=forced)
        assert_same(run, reference)
        if len(split) > 1:
            check_costs(run, pattern, len(split))


def check_costs(run, pattern, stages):
    """Guesses that were forced are counted right, and ticks follow from them."""
    accepted, corrected = run.count(Outcome.ACCEPTED), run.count(Outcome.CORRECTED)
    assert accepted + corrected == COUNT - 2, "all but the first and the last, which is not fed"
    if pattern == "always":
        assert corrected == 0
    if pattern == "never":
        assert accepted == 0
    first, last = run.commits[0], run.commits[-1]
    assert last.tick - first.tick == accepted + stages * (COUNT - 1 - accepted)


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 3])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompt_lengths(tiny, plain, kind, length):
    reference = plain(kind, length)
    for split in ((2, 4), (1, 3, 2)):
        runner = tiny(kind).runner(split)
        for pattern in ("alternating", "never"):
            forced = forced_drafts(reference.ids, pattern)
            assert_same(answer(runner, prompt_of(length), count=COUNT, forced=forced), reference)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("split", [(6,), (2, 4), (2, 2, 2), (1,) * 6], ids=str)
def test_bfloat16(tiny, plain, kind, split):
    reference = plain(kind, 37, "bfloat16")
    runner = tiny(kind).runner(split, dtype="bfloat16")
    for pattern in ("alternating", "never", "always"):
        forced = forced_drafts(reference.ids, pattern)
        assert_same(answer(runner, prompt_of(37), count=COUNT, forced=forced), reference)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("split", "taps"),
    [
        ((2, 4), [(2, 0), (6, 1)]),
        ((2, 2, 2), [(2, 0), (3, 1), (6, 2)]),
        ((1, 2, 3), [(1, 0), (3, 1), (5, 2)]),
        ((2, 2, 2), [(2, 0)]),
    ],
    ids=str,
)
def test_with_a_trained_kind_of_head(tiny, plain, kind, split, taps, tmp_path):
    """A deep (or block) head drafts, whatever it says."""
    model = tiny(kind)
    save_head(tmp_path, model, taps)
    for dtype in ("float32", "bfloat16"):
        reference = plain(kind, 37, dtype)
        runner = model.runner(split, head=str(tmp_path), dtype=dtype)
        assert_same(answer(runner, prompt_of(37), count=COUNT), reference)
        forced = forced_drafts(reference.ids, "thirds")
        assert_same(answer(runner, prompt_of(37), count=COUNT, forced=forced), reference)


@pytest.mark.parametrize("split", [(6,), (2, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("pattern", ["always", "never", "alternating"])
def test_end_of_text_at_many_offsets_and_the_next_answer(tiny, plain, split, pattern):
    reference = plain("llama", 20).ids
    runner = tiny("llama").runner(split)
    firsts = [i for i, token in enumerate(reference) if token not in reference[:i]]
    assert len(firsts) > 10
    for offset in firsts[:8] + firsts[-2:]:
        forced = forced_drafts(reference, pattern)
        eos = {reference[offset], 200}
        run = answer(runner, prompt_of(20), count=COUNT, forced=forced, eos=eos, keep_logits=False)
        assert run.ids == reference[: offset + 1]
        assert run.reason is FinishReason.STOP
    assert_same(answer(runner, prompt_of(20), count=COUNT), plain("llama", 20))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("split", [(6,), (2, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("slots", [38, 39, 41, 48])
def test_context_edge(tiny, plain, kind, split, slots):
    """Slots end exactly where the context does: feeding one token more would fail."""
    reference = plain(kind, 37)
    room = slots - 37
    runner = tiny(kind).runner(split, slots=slots)
    for pattern in ("always", "never", "alternating"):
        forced = forced_drafts(reference.ids, pattern)
        run = answer(runner, prompt_of(37), count=COUNT, forced=forced, context=slots)
        assert run.ids == reference.ids[:room]
        assert torch.equal(run.logits, reference.logits[:room])
        assert run.reason is FinishReason.CONTEXT
        fed = [e.position + e.tokens - 1 for e in run.events if isinstance(e, Entered)]
        assert max(fed) < slots


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("length", [WINDOW - 3, WINDOW - 1, WINDOW, WINDOW + 1])
def test_sliding_window_edge(tiny, plain, kind, length):
    """Void tokens fill and pass the window while guesses are wrong."""
    reference = plain(kind, length)
    for split in ((2, 4), (1,) * 6):
        runner = tiny(kind).runner(split)
        for pattern in ("never", "alternating", "always"):
            forced = forced_drafts(reference.ids, pattern)
            assert_same(answer(runner, prompt_of(length), count=COUNT, forced=forced), reference)
    expected = tiny(kind).logits((*prompt_of(length), *reference.ids[:-1]))[length - 1 :]
    scale = expected.std().item()
    torch.testing.assert_close(reference.logits, expected, rtol=1e-3, atol=2e-3 * scale)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_chunk_sizes(tiny, chunk):
    model, prompt = tiny("qwen2"), prompt_of(37)
    whole = model.runner((6,), head=None, chunk=chunk)
    reference = answer(whole, prompt, count=20, drafting=False, chunk=chunk)
    runner = model.runner((1, 2, 3), chunk=chunk)
    forced = forced_drafts(reference.ids, "alternating")
    assert_same(answer(runner, prompt, count=20, forced=forced, chunk=chunk), reference)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02, "top_k": 50, "top_p": 0.95}]
)
def test_sampled_text_is_the_same_for_twenty_seeds(tiny, plain, options):
    """By raw exit's own guesses, and by guesses that are right now and then."""
    texts = set()
    runners = [tiny("llama").runner(split) for split in ((2, 4), (1, 2, 3))]
    for seed in range(20):
        sampling = Sampling(temperature=1.5, seed=seed, **options)
        reference = plain("llama", 12, sampling=sampling)
        texts.add(tuple(reference.ids))
        runner = runners[seed % 2]
        forced = None if seed % 4 < 2 else forced_drafts(reference.ids, "thirds")
        run = answer(runner, prompt_of(12), count=COUNT, sampling=sampling, forced=forced)
        assert_same(run, reference)
    assert len(texts) == 20


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_an_exit_that_equals_the_model_is_always_right(tiny, temperature):
    """Draft and target share their noise: equal logits give equal tokens, also when sampling."""
    for split in ((2, 4), (2, 2, 2), (3, 1, 1, 1)):
        runner = tiny("echo").runner(split)
        for seed in range(3):
            sampling = Sampling(temperature, top_p=0.98, seed=seed)
            run = answer(runner, prompt_of(20, seed=seed), count=COUNT, sampling=sampling)
            assert run.count(Outcome.ACCEPTED) == COUNT - 2
            assert run.count(Outcome.CORRECTED) == 0


def test_a_reader_that_leaves_early_does_no_harm(tiny, plain):
    from ppsd_cli.core.decode import decode
    from ppsd_cli.core.plan import Request
    from ppsd_cli.core.schedule import Limits, Schedule

    reference = plain("llama", 37)
    runner = tiny("llama").runner((1, 2, 3))
    limits = Limits(COUNT, CONTEXT)
    for leave in range(1, 30, 3):
        request = Request(Sampling(), True, limits.feed_limit(50), None, 50)
        schedule = Schedule(
            prompt_of(50, seed=leave), stages=3, chunk=CHUNK, request=request, limits=limits
        )
        events = decode(runner, schedule)
        for _ in range(leave):
            next(events)
        events.close()
        assert runner.pending == 0
        assert_same(answer(runner, prompt_of(37), count=COUNT), reference)
