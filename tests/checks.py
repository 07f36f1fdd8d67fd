"""Compact checks of the promises, each of which some planted fault must break (test_faults.py)."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import test_schedule_eesd
import test_schedule_tree
import torch
from eesd import bursts_of, expected_bursts
from fake_pipeline import FakePipeline, continuation
from fake_tree import FakeTree
from models import (
    WINDOW,
    Tiny,
    answer,
    forced_drafts,
    prompt_of,
    save_head,
)
from scipy import stats
from test_exact_eesd import check_drafts, drafts_of_burst
from test_heads import PlainHead, assert_drafts
from test_schedule import check_answer, make_schedule
from trees import HeadOnText, assert_costs, assert_equal_answers, check_path_drafts, right_and_ranks

from ppsd_cli.core import choose as choosing
from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import Entered, Outcome
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits

PROMPT, COUNT = 37, 30
Models = Callable[[str], Tiny]


def check_schedule() -> None:
    """Fake pipelines: right text, right ticks, several answers in a row."""
    for stages, lookahead in ((1, 0), (3, 0), (3, 2)):
        pipeline = FakePipeline(stages, lookahead=lookahead, right=lambda i: i % 3 != 1)
        for prompt in ((3, 1, 4, 1, 5), (2, 7)):
            for eos in ((), continuation(prompt, 12)[7:8]):
                limits = Limits(12, 64, frozenset(eos))
                events = list(decode(pipeline, make_schedule(stages, prompt, limits=limits)))
                check_answer(events, prompt, limits, stages=stages, drafting=True)


def check_reference(tiny: Models, kind: str) -> None:
    """Plain decoding's logits are close to transformers' on the same text."""
    model, prompt = tiny(kind), prompt_of(PROMPT)
    run = answer(model.runner((6,), head=None), prompt, count=COUNT, drafting=False)
    expected = model.logits((*prompt, *run.ids[:-1]))[PROMPT - 1 :]
    torch.testing.assert_close(run.logits, expected, rtol=1e-3, atol=2e-3 * expected.std().item())


def check_exact(tiny: Models, kind: str) -> None:
    """Chains equal plain decoding of one stage bit for bit, whatever the guesses."""
    model = tiny(kind)
    whole = model.runner((6,), head=None)
    runner = model.runner((1, 2, 3))
    for length in (WINDOW - 1, PROMPT):
        prompt = prompt_of(length)
        reference = answer(whole, prompt, count=COUNT, drafting=False)
        for pattern in ("never", "alternating", "thirds", "always"):
            forced = forced_drafts(reference.ids, pattern)
            run = answer(runner, prompt, count=COUNT, forced=forced)
            assert run.ids == reference.ids
            assert torch.equal(run.logits, reference.logits)


def check_bursts() -> None:
    """Draft, then verify, on fake pipelines: right text, right bursts, several answers in a row."""
    for stages, lookahead, length in ((1, 0, 2), (2, 0, 1), (2, 2, 4), (3, 1, 3)):
        pipeline = FakePipeline(stages, lookahead=lookahead, right=lambda i: i % 5 != 3)
        for prompt in ((3, 1, 4, 1, 5), (2, 7)):
            for eos in ((), continuation(prompt, 12)[7:8]):
                limits = Limits(12, 64, frozenset(eos))
                schedule = test_schedule_eesd.make_schedule(
                    stages, prompt, limits=limits, draft_length=length
                )
                events = list(decode(pipeline, schedule))
                test_schedule_eesd.check_bursts(
                    events, prompt, limits, stages=stages, draft_length=length
                )


def check_bursts_of_a_model(tiny: Models) -> None:
    """Draft, then verify, says what plain decoding says, in the bursts that the guesses allow."""
    model, prompt = tiny("llama"), prompt_of(PROMPT)
    reference = answer(model.runner((6,), head=None), prompt, count=COUNT, drafting=False)
    runner = model.runner((1, 2, 3))
    for pattern, length in (("never", 3), ("always", 4), ("thirds", 2), ("alternating", 5)):
        forced = forced_drafts(reference.ids, pattern)
        run = answer(runner, prompt, count=COUNT, forced=forced, draft_length=length)
        assert run.ids == reference.ids
        torch.testing.assert_close(run.logits, reference.logits, rtol=1e-3, atol=1e-2)
        right = [f == t for f, t in zip(forced, reference.ids, strict=True)]
        assert bursts_of(run) == expected_bursts(right, length)


def check_bursts_that_are_right(tiny: Models) -> None:
    """An exit with the model's own logits guesses every sampled token of every burst."""
    runner = tiny("echo").runner((2, 4))
    for sampling in (Sampling(), Sampling(1.5, seed=3)):
        run = answer(runner, prompt_of(20), count=COUNT, sampling=sampling, draft_length=4)
        assert run.count(Outcome.CORRECTED) == 0


def check_head_in_bursts(tiny: Models, folder: Path) -> None:
    """A deep head's guesses in bursts equal their one-pass reference."""
    model, prompt = tiny("qwen2"), prompt_of(PROMPT)
    _, weights = save_head(folder, model, [(2, 0), (4, 1), (6, 2)])
    right = answer(model.runner((6,), head=None), prompt, count=16, drafting=False).ids
    text = (*prompt, *right)
    expected = cache(lambda due: drafts_of_burst(model, weights, text, due))
    runner = model.runner((2, 4), head=str(folder))
    for pattern in ("always", "thirds"):
        forced = forced_drafts(right, pattern)
        run = answer(runner, prompt, count=16, forced=forced, draft_length=4)
        assert check_drafts(run, expected, text) > 8


def check_trees() -> None:
    """Trees of guesses on fake pipelines: right text, right ticks, several answers in a row."""
    for stages, lookahead, width in ((1, 0, 2), (3, 0, 2), (3, 2, 4), (4, 1, 3)):
        pipeline = FakeTree(stages, lookahead=lookahead, rank=lambda i: (0, 1, 0, 3, 20)[i % 5])
        for prompt in ((3, 1, 4, 1, 5), (2, 7)):
            for eos in ((), continuation(prompt, 16)[7:8]):
                limits = Limits(16, 64, frozenset(eos))
                events = test_schedule_tree.run(pipeline, prompt, limits=limits, width=width)
                test_schedule_tree.check_tree(events, prompt, limits, stages=stages, width=width)
                right = [e for e in events if getattr(e, "outcome", None) is Outcome.ACCEPTED]
                assert stages == 1 or len(right) > 2


def check_trees_of_a_model(tiny: Models, kind: str) -> None:
    """Trees say in float64 what plain decoding says, several answers in a row."""
    model = tiny(kind)
    whole, runner = model.double((6,), head=None), model.double((1, 2, 3), width=5)
    for length, seed in ((WINDOW - 1, 1), (PROMPT, 2)):
        prompt = prompt_of(length)
        reference = answer(whole, prompt, count=COUNT, drafting=False)
        forced = right_and_ranks(reference, 5, seed=seed)
        run = answer(runner, prompt, count=COUNT, width=5, **forced)
        assert_equal_answers(run, reference)
        assert_costs(run, 3)
        assert run.count(Outcome.ACCEPTED) > COUNT / 2


def check_trees_that_are_right(tiny: Models) -> None:
    """An exit with the model's own logits has every sampled token as its best child."""
    runner = tiny("echo").runner((2, 2, 2), width=3)
    for sampling in (Sampling(), Sampling(1.5, seed=3)):
        run = answer(
            runner, prompt_of(20), count=COUNT, sampling=sampling, width=3, tree_scale=30.0
        )
        assert run.count(Outcome.ACCEPTED) == COUNT - 2


def check_head_in_trees(tiny: Models, folder: Path) -> None:
    """A deep head's guesses on every path are those of one pass over its text."""
    model, prompt = tiny("qwen2"), prompt_of(PROMPT)
    _, weights = save_head(folder, model, [(1, 0), (3, 1), (5, 2)])
    reference = answer(model.runner((6,), head=None), prompt, count=12, drafting=False)
    runner = model.runner((1, 2, 3), head=str(folder), width=4)
    forced = right_and_ranks(reference, 4, seed=2)
    run = answer(runner, prompt, count=12, width=4, **forced)
    assert run.ids == reference.ids
    count, aside = check_path_drafts(run, prompt, HeadOnText(model, weights))
    assert count > 15
    assert aside > 2


def check_two_depths() -> None:
    """Two depths a tick on fake pipelines."""
    for stages, lookahead, width in ((2, 0, 3), (3, 2, 5), (4, 1, 8)):
        pipeline = FakeTree(
            stages, lookahead=lookahead, rank=lambda i: (0, 1, 0, 0, 0, 3, 20)[i % 7],
            shares=(-0.2, -1.0, -2.0, -3.0, -4.0),
        )  # fmt: skip
        for prompt in ((3, 1, 4, 1, 5), (2, 7)):
            limits = Limits(20, 64)
            events = test_schedule_tree.run(pipeline, prompt, limits=limits, width=width, depth=2)
            test_schedule_tree.check_tree(
                events, prompt, limits, stages=stages, width=width, depth=2
            )


def check_second_level(tiny: Models, folder: Path) -> None:
    """Both depths of guesses on every path are those of one pass over its text."""
    model, prompt = tiny("qwen2"), prompt_of(PROMPT)
    _, weights = save_head(folder, model, [(1, 0), (1, 1), (3, 2), (3, 3), (5, 4)], depth=2)
    reference = answer(model.runner((6,), head=None), prompt, count=12, drafting=False)
    runner = model.runner((1, 2, 3), head=str(folder), width=6, depth=2)
    forced = right_and_ranks(reference, 6, seed=2)
    run = answer(runner, prompt, count=12, width=6, depth=2, **forced)
    assert run.ids == reference.ids
    count, aside = check_path_drafts(run, prompt, HeadOnText(model, weights))
    assert count > 30
    assert aside > 5


def check_context_edge(tiny: Models) -> None:
    """The token that fills the context is not fed, let alone one beyond."""
    model, prompt = tiny("llama"), prompt_of(PROMPT)
    slots = PROMPT + 5
    runner = model.runner((2, 2, 2), slots=slots)
    reference = answer(model.runner((6,), head=None), prompt, count=5, drafting=False).ids
    for pattern in ("always", "never"):
        forced = forced_drafts(reference, pattern)
        run = answer(runner, prompt, forced=forced, context=slots)
        assert run.ids == reference
        assert max(e.position for e in run.events if isinstance(e, Entered)) == slots - 2


def check_head(tiny: Models, folder: Path) -> None:
    """A deep head's guesses equal its one-pass reference after flushes at every phase."""
    model, prompt = tiny("qwen2"), prompt_of(PROMPT)
    _, weights = save_head(folder, model, [(1, 0), (3, 1), (5, 2)])
    right = answer(model.runner((6,), head=None), prompt, count=16, drafting=False).ids
    expected = PlainHead(model, weights).draft_logits((*prompt, *right))
    runner = model.runner((1, 2, 3), head=str(folder))
    for phase in range(4):
        forced = [t if i % 4 != phase else (t + 1) % 128 for i, t in enumerate(right)]
        run = answer(runner, prompt, count=16, forced=forced)
        assert assert_drafts(run, prompt, expected) >= 14


def check_noise() -> None:
    """The noise is Gumbel over tokens and positions, and no position repeats another's."""
    noise = choosing.gumbel(3, torch.arange(64), torch.arange(512)).double()
    for sample in (noise.flatten(), noise[:, 0], noise[0]):
        assert stats.kstest(sample.numpy(), "gumbel_r").pvalue > 1e-4
    correlations = torch.corrcoef(noise) - torch.eye(64)
    assert correlations.abs().max() < 0.3
    columns = torch.corrcoef(choosing.gumbel(3, torch.arange(500), torch.arange(40)).T)
    assert (columns - torch.eye(40)).abs().max() < 0.3
    other = choosing.gumbel(4, torch.arange(64), torch.arange(512)).double()
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.03


def check_draws() -> None:
    """Sampled tokens of one row follow the restricted distribution, for each restriction."""
    logits = torch.tensor([0.45, 0.25, 0.2, 0.06, 0.04]).log()
    table = [
        (Sampling(1.0), 1.0, 5),
        (Sampling(2.0), 0.5, 5),
        (Sampling(1.0, top_k=3), 1.0, 3),
        (Sampling(1.0, top_p=0.75), 1.0, 3),
        (Sampling(1.0, min_p=0.5), 1.0, 2),
    ]
    for sampling, power, kept in table:
        rows = logits.expand(20_000, 5)
        counts = torch.bincount(choosing.choose(rows, sampling, torch.arange(20_000)), minlength=5)
        expected = (logits * power).exp()[:kept]
        expected = expected / expected.sum() * 20_000
        assert counts[kept:].sum() == 0
        observed, wanted = counts[:kept].double().numpy(), expected.double().numpy()
        assert stats.chisquare(observed, wanted * (20_000 / wanted.sum())).pvalue > 1e-4


def check_reduced_vocabulary() -> None:
    """Columns of a reduced vocabulary get the noise of their full ids."""
    ids = torch.tensor([2, 11, 40])
    logits = torch.full((200, 64), -torch.inf)
    logits[:, ids] = 0.0
    full = choosing.choose(logits, Sampling(1.0), torch.arange(200))
    reduced = choosing.choose(logits[:, ids], Sampling(1.0), torch.arange(200), token_ids=ids)
    assert torch.equal(full, reduced)


def check_shared_noise(tiny: Models) -> None:
    """An exit with the model's own logits guesses every sampled token."""
    runner = tiny("echo").runner((2, 2, 2))
    for sampling in (Sampling(), Sampling(1.5, seed=3)):
        run = answer(runner, prompt_of(20), count=COUNT, sampling=sampling)
        assert run.count(Outcome.ACCEPTED) == COUNT - 2


def check_sampled(tiny: Models) -> None:
    """The text of a seed is the same for plain decoding and chains, and seeds differ."""
    model, prompt = tiny("llama"), prompt_of(12)
    whole, chain = model.runner((6,), head=None), model.runner((2, 2, 2))
    texts = set()
    for seed in range(4):
        sampling = Sampling(1.5, top_p=0.95, seed=seed)
        reference = answer(whole, prompt, count=20, drafting=False, sampling=sampling)
        forced = forced_drafts(reference.ids, "thirds")
        run = answer(chain, prompt, count=20, sampling=sampling, forced=forced)
        assert run.ids == reference.ids
        texts.add(tuple(run.ids))
    assert len(texts) == 4
    free = answer(chain, prompt, count=20, sampling=Sampling(40.0, seed=1))
    assert len({*free.ids}) > 8, "nearly uniform draws must not repeat each other"
