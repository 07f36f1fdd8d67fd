"""Trees on the graph runner: event by event the in-process runner, slots and parents included.

A level's rows share their products, which round otherwise than one row does; so in bfloat16 only
what the engine itself says is compared (the text is checked where a token is not nearly level).
"""

import pytest
from cuda_cases import ask, assert_same_events, prompt
from cuda_fixtures import plain_answers, small_models
from test_cuda_engine import CUT, DEEP_2, DEEP_3
from trees import right_and_ranks

from ppsd_cli.core.events import Flushed, Outcome, Pruned
from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda.tiles import SPLIT

COUNT = 6
DRAWN = Sampling(temperature=0.9, seed=7)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
small, plain = small_models(), plain_answers(COUNT)


def nodes_of(run):
    """What entered, with slots and parents, serials counted from the first."""
    fed = [node for result in run.results for node in result.entered if node.token_id is not None]
    first = fed[0].serial
    return [
        (n.serial - first, n.position, n.token_id, n.slot, n.parent and n.parent - first, n.drafted)
        for n in fed
    ]


def check(model, reference, split, length, *, width, **options):
    """As the in-process runner does it; the answer is the model's own."""
    head, groups = options.pop("head", "raw"), options.pop("groups", None)
    options = {"count": len(reference.ids), "width": width} | options
    same = {"head": head, "width": width, "depth": options.get("depth", 1)}
    run = ask(model.graph(split, groups=groups, **same), prompt(length), **options)
    if model.same_numbers:
        local = model.local(split, **same)
        expected = ask(local, prompt(length), **options)
        assert expected.ids == reference.ids
        assert run.ids == reference.ids
        assert nodes_of(run) == nodes_of(expected)
        assert_same_events(run, expected, tree=True)
    assert len(run.ids) == len(reference.ids)
    return run


@pytest.mark.parametrize(
    ("kind", "split", "width"),
    [
        ("llama", (2, 2), 2),
        ("llama", (1, 1, 1, 1), 3),
        ("qwen2", (1, 1, 1), 4),
        ("qwen3", (1, 2), 4),
        ("biases", (1, 1, 1), 5),
    ],
    ids=str,
)
def test_every_architecture_and_width(small, plain, kind, split, width):
    """Right guesses at various ranks; three chunks of prompt."""
    reference = plain(kind, 19)
    forced = right_and_ranks(reference, width)
    run = check(small(kind), reference, split, 19, width=width, **forced)
    assert run.count(Outcome.ACCEPTED) > 0
    assert any(isinstance(event, Flushed | Pruned) for event in run.events)


@pytest.mark.parametrize("length", [6, 12])
def test_sliding_window_counts_positions(small, plain, length):
    """Slots of nodes in flight lie far from their positions, and void nodes pass the window."""
    reference = plain("mistral", length, 10)
    forced = right_and_ranks(reference, 4)
    run = check(small("mistral"), reference, (1, 1, 1), length, width=4, **forced)
    assert any(slot != position for _, position, _, slot, *_ in nodes_of(run))


@pytest.mark.parametrize(
    ("split", "taps", "changes", "width"),
    [
        ((2, 2), ((2, 0),), {"kind": "mlp", "ids": 3}, 3),
        ((2, 2), DEEP_2, {"blocks": 2}, 4),
        ((1, 1, 2), DEEP_3, {"blocks": 1, "ids": 2}, 4),
    ],
    ids=str,
)
def test_draft_heads_on_every_path(small, plain, split, taps, changes, width):
    """The head's own guesses: logits behind every node, live or void, are those of its path."""
    model, reference = small("llama"), plain("llama", 11)
    head = model.head(taps, **changes)
    check(model, reference, split, 11, head=head, width=width)
    if "ids" not in changes:
        forced = right_and_ranks(reference, width)
        check(model, reference, split, 11, head=head, width=width, **forced)


def test_a_prompt_of_one_token(small, plain):
    """A deep head looks back further than the text reaches."""
    head = small("llama").head(DEEP_3, blocks=1)
    check(small("llama"), plain("llama", 1), (1, 1, 2), 1, head=head, width=3)


@pytest.mark.parametrize("sampling", [DRAWN, CUT], ids=["all", "cut"])
def test_sampling(small, plain, sampling):
    """Children are the top of the perturbed logits, with a reduced vocabulary, too."""
    model, reference = small("llama"), plain("llama", 12, 6, sampling)
    check(model, reference, (2, 2), 12, width=3, sampling=sampling, tree_scale=0.7)
    head = model.head(DEEP_2, blocks=1, ids=2)
    check(model, reference, (2, 2), 12, head=head, width=3, sampling=sampling)


def test_shares_by_rank(small, plain):
    """Forced guesses with given shares, never among the children and always the best one."""
    reference = plain("llama", 12, 6)
    for rank in (0, 3):
        run = check(
            small("llama"), reference, (1, 1, 2), 12, width=3, forced=reference.ids,
            ranks=(rank,) * 6, rank_scores=(-0.5, -2.0, -3.0),
        )  # fmt: skip
        flushes = sum(isinstance(event, Flushed) for event in run.events)
        assert flushes == (0 if rank == 0 else 4) or not small("llama").same_numbers


def test_answers_after_each_other(small, plain):
    """Ahead of the host, of several widths, after ends with nodes in flight."""
    model, reference = small("llama"), plain("llama", 12)
    runner = model.graph((1, 2, 1), width=4)
    for width, keep in ((4, False), (1, True), (4, True)):
        forced = right_and_ranks(reference, 4) if width > 1 else {}
        run = ask(runner, prompt(12), count=COUNT, width=width, keep_logits=keep, **forced)
        assert run.ids == reference.ids or not model.same_numbers
        assert ask(runner, prompt(9, seed=2), count=2, width=4, keep_logits=keep).ids
        assert ask(runner, prompt(12), count=3, drafting=False).ids == reference.ids[:3]


@pytest.mark.parametrize("slots", [14, 16])
def test_context_edge(small, plain, slots):
    """Beside the context there is room for what is in flight, and no more is used."""
    reference = plain("llama", 12)
    forced = right_and_ranks(reference, 4)
    runner = small("llama").graph((1, 2, 1), slots=slots, width=4)
    run = ask(runner, prompt(12), count=COUNT, context=slots, width=4, **forced)
    assert run.ids == reference.ids[: slots - 12] or not small("llama").same_numbers
    assert max(position for _, position, *_ in nodes_of(run)) == slots - 2
    assert max(slot for *_, slot, _, _ in nodes_of(run)) < slots + 12


def test_longer_than_one_program_of_attention(small):
    """The slots in use pass the end of a split, of which attention joins the results."""
    model, text = small("llama"), SPLIT - 3
    reference = model.plain(prompt(text), 6)
    head = model.head(((1, 0), (4, 1)), blocks=1)
    check(model, reference, (1, 3), text, head=head, width=3, **right_and_ranks(reference, 3))


def test_many_ticks_wrap_the_records(small):
    """Records go by tick modulo their number: more ticks than that."""
    model = small("llama")
    if model.device == "cpu":
        pytest.skip("letters do it in the interpreter, on several devices")
    reference = model.plain(prompt(5), 58)
    runner = model.graph((2, 2), width=2)
    forced = right_and_ranks(reference, 2)
    run = ask(runner, prompt(5), count=58, width=2, keep_logits=False, **forced)
    assert run.ids == reference.ids or not model.same_numbers
    assert len(run.results) > 64 or not model.same_numbers
    assert len(run.ids) == 58
