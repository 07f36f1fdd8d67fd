"""Two depths of guesses a tick: the answer is the model's, and every guess that of its own path."""

import json

import pytest
import torch
from models import CONTEXT, answer, prompt_of, save_head
from trees import HeadOnText, assert_costs, assert_equal_answers, check_path_drafts, right_and_ranks

from ppsd_cli.core.events import FinishReason, Outcome
from ppsd_cli.core.plan import Sampling
from ppsd_cli.errors import AssetError
from ppsd_cli.model.head_files import late_tap, read_head, read_info
from ppsd_cli.model.heads import Tap
from ppsd_cli.model.load import Loader
from ppsd_cli.model.weights import Checkpoint

COUNT = 30
HOT = Sampling(1.5, top_p=0.95, seed=3)
HEADS = [
    ((2, 2, 2), [(2, 0), (2, 1), (4, 2), (4, 3), (6, 4)]),
    ((2, 4), [(2, 0), (2, 1), (6, 2)]),
    ((2, 1, 1, 1, 1), [(2, 0), (2, 1), (3, 2)]),
    ((2, 2, 2), [(2, 0)]),
]


def plain(model, prompt, **options):
    return answer(model.double((6,), head=None), prompt, count=COUNT, drafting=False, **options)


@pytest.mark.parametrize(("split", "taps"), HEADS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_answers_over_splits_widths_and_ranks(tiny, tmp_path, kind, split, taps):
    model, prompt = tiny(kind), prompt_of(37)
    save_head(tmp_path, model, taps, depth=2)
    runner = model.double(split, head=str(tmp_path), width=8, depth=2)
    for width, depth, sampling in ((2, 2, Sampling()), (5, 1, HOT), (8, 2, HOT)):
        reference = plain(model, prompt, sampling=sampling)
        for forced in ({}, right_and_ranks(reference, width)):
            run = answer(
                runner, prompt, count=COUNT, width=width, depth=depth, sampling=sampling, **forced
            )
            assert_equal_answers(run, reference)
            assert_costs(run, len(split), depth=depth)
        assert run.count(Outcome.ACCEPTED) > COUNT / 3, "most ranks are in the tree"


@pytest.mark.parametrize(("split", "taps"), HEADS, ids=str)
def test_every_guess_is_that_of_its_own_path(tiny, tmp_path, split, taps):
    """Both depths, also on paths that turn out wrong, with an answer before that left its rows."""
    model, prompt = tiny("qwen2"), prompt_of(37)
    reference = plain(model, prompt)
    _, weights = save_head(tmp_path, model, taps, depth=2)
    head = HeadOnText(model, weights)
    runner = model.runner(split, head=str(tmp_path), width=6, depth=2)
    for seed in range(2):
        forced = right_and_ranks(reference, 6, seed=seed)
        run = answer(runner, prompt, count=16, width=6, depth=2, **forced)
        assert run.ids == reference.ids[:16]
        count, aside = check_path_drafts(run, prompt, head)
        assert count > 40
        assert aside > 5


def test_a_right_second_level_commits_two_tokens_a_tick(tiny, tmp_path):
    model, prompt = tiny("llama"), prompt_of(20)
    save_head(tmp_path, model, [(2, 0)], depth=2)
    runner = model.double((2, 4), head=str(tmp_path), width=2, depth=2)
    reference = plain(model, prompt)
    ticks = {}
    for depth in (1, 2):
        run = answer(
            runner, prompt, count=COUNT, width=2, depth=depth, forced=reference.ids,
            ranks=(0,) * COUNT, rank_scores=(-0.1, -9.0),
        )  # fmt: skip
        assert_equal_answers(run, reference)
        ticks[depth] = run.commits[-1].tick - run.commits[1].tick
    assert ticks[1] == COUNT - 2
    assert ticks[2] <= COUNT / 2


@pytest.mark.parametrize("slots", [38, 39, 40, 49])
def test_context_edge(tiny, tmp_path, slots):
    """Caches end with the context and what is in flight: one slot more would fail."""
    model, prompt = tiny("mistral"), prompt_of(37)
    save_head(tmp_path, model, [(2, 0), (2, 1), (4, 2)], depth=2)
    runner = model.double((2, 2, 2), head=str(tmp_path), slots=slots, width=8, depth=2)
    reference = plain(model, prompt)
    for seed in range(3):
        forced = right_and_ranks(reference, 8, seed=seed)
        run = answer(runner, prompt, context=slots, width=8, depth=2, **forced)
        assert_equal_answers(run, reference, count=slots - 37)
        assert run.reason is FinishReason.CONTEXT
        fed = [node.position for result in run.results for node in result.entered]
        assert max(fed) < slots - 1 or slots == 38


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("length", [1, 16, 37])
def test_prompts_and_wanted_lengths(tiny, tmp_path, length, count):
    model, prompt = tiny("llama"), prompt_of(length)
    save_head(tmp_path, model, [(2, 0), (2, 1), (6, 2)], depth=2)
    runner = model.double((2, 4), head=str(tmp_path), width=3, depth=2)
    reference = plain(model, prompt)
    for width in (3, 2):
        forced = right_and_ranks(reference, width)
        run = answer(runner, prompt, count=count, width=width, depth=2, **forced)
        assert_equal_answers(run, reference, count=count)
    assert length + count < CONTEXT


def test_taps_of_two_depths_share_a_stage():
    taps = tuple(Tap(*each) for each in HEADS[0][1])
    assert late_tap(taps, (2, 2, 2), depth=2) is None
    assert late_tap(taps, (2, 2, 2)) is None, "one depth is later still"
    assert late_tap((Tap(2, 0), Tap(4, 1), Tap(6, 2)), (2, 2, 2), depth=2) == Tap(4, 1)
    assert late_tap(taps, (2, 1, 3), depth=2) == Tap(4, 2)


def test_head_files_of_two_depths(tiny, tmp_path):
    model = tiny("qwen3")
    _, weights = save_head(tmp_path, model, [(2, 0)], depth=2)
    loader = Loader(Checkpoint(model.folder), model.spec, torch.float32, torch.device("cpu"))
    info = read_info(tmp_path)
    found = read_head(tmp_path, info, loader, weights.output.lm_matrix)
    assert info.depth == 2
    assert found.second is not None
    expected = weights.second.tensors()
    assert {name: torch.equal(t, expected[name]) for name, t in found.second.tensors().items()} == {
        name: True for name in expected
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, "cannot have depth 3"),
        ({"kind": "mlp", "depth": 2}, "cannot have depth 2"),
        ({"depth": "two"}, "not a head description"),
    ],
)
def test_descriptions_that_cannot_be(tiny, tmp_path, changes, words):
    save_head(tmp_path, tiny("qwen3"), [(2, 0)], depth=2)
    path = tmp_path / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AssetError, match=words):
        read_info(tmp_path)


def test_a_second_level_that_is_missing(tiny, tmp_path):
    model = tiny("qwen3")
    _, weights = save_head(tmp_path, model, [(2, 0)])
    path = tmp_path / "head.json"
    path.write_text(path.read_text().replace('"stages"', '"depth": 2, "stages"'))
    loader = Loader(Checkpoint(model.folder), model.spec, torch.float32, torch.device("cpu"))
    with pytest.raises(AssetError, match="second"):
        read_head(tmp_path, read_info(tmp_path), loader, weights.output.lm_matrix)
