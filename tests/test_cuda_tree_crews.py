"""Trees over several devices: event by event the in-process runner, slots and parents included.

One device plays them all, as in ``test_cuda_several.py``.
"""

import pytest
from cuda_cases import ask, prompt, replay_backwards
from cuda_fixtures import plain_answers, small_models
from test_cuda_engine import DEEP_3
from test_cuda_trees import COUNT, DRAWN, check, nodes_of
from trees import right_and_ranks

from ppsd_cli.runtime.cuda import build, crew
from ppsd_cli.runtime.cuda.relay import Box
from ppsd_cli.runtime.cuda.tree_follower import TreeFollower

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
small, plain = small_models(), plain_answers(COUNT)


@pytest.mark.parametrize(
    ("kind", "split", "groups", "width"),
    [
        ("llama", (2, 2), (1, 1), 2),
        ("biases", (1, 1, 1), (1, 2), 4),
        ("mistral", (1, 1, 1), (2, 1), 4),
        ("llama", (1, 1, 1, 1), (2, 2), 8),
    ],
    ids=str,
)
def test_right_guesses_at_various_ranks(small, plain, kind, split, groups, width):
    reference = plain(kind, 12)
    forced = right_and_ranks(reference, width)
    check(small(kind), reference, split, 12, width=width, groups=groups, **forced)


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1)], ids=str)
def test_deeper_states_come_back(small, plain, groups):
    """The head's own guesses behind every node, live or void, are those of its path."""
    head, reference = small("llama").head(DEEP_3, blocks=1), plain("llama", 12)
    check(small("llama"), reference, (1, 1, 2), 12, head=head, width=4, groups=groups)
    forced = right_and_ranks(reference, 4)
    run = check(
        small("llama"), reference, (1, 1, 2), 12, head=head, width=4, groups=groups, **forced
    )
    assert len(nodes_of(run)) > COUNT


def test_sampling(small, plain):
    reference = plain("llama", 12, 6, DRAWN)
    check(small("llama"), reference, (2, 2), 12, width=3, groups=(1, 1), sampling=DRAWN)


def test_answers_after_each_other(small, plain):
    """Of several widths, ahead of the host, after ends with nodes in flight."""
    reference = plain("llama", 12)
    runner = small("llama").graph((1, 2, 1), groups=(1, 1, 1), width=4)
    for width, keep in ((4, False), (1, True), (2, True)):
        forced = right_and_ranks(reference, width) if width > 1 else {}
        options = {"count": COUNT, "width": width, "keep_logits": keep} | forced
        run = ask(runner, prompt(12), **options)
        assert ask(runner, prompt(30, seed=2), count=2, width=width).ids
        assert not small("llama").same_numbers or run.ids == reference.ids


def test_a_prompt_of_one_token(small, plain):
    """A deep head looks back further than the text reaches; its states come from afar."""
    head = small("llama").head(DEEP_3, blocks=1)
    options = {"head": head, "width": 3, "groups": (1, 1, 1)}
    check(small("llama"), plain("llama", 1), (1, 1, 2), 1, **options)


@pytest.mark.parametrize("slots", [14, 16])
def test_context_edge(small, plain, slots):
    """Letters of levels that nothing may enter any more, and no slot beyond what is in flight."""
    model, reference = small("llama"), plain("llama", 12)
    forced = right_and_ranks(reference, 4)
    runner = model.graph((1, 2, 1), groups=(1, 1, 1), slots=slots, width=4)
    run = ask(runner, prompt(12), count=COUNT, context=slots, width=4, **forced)
    assert len(run.ids) == slots - 12
    assert run.ids == reference.ids[: slots - 12] or not model.same_numbers
    assert max(position for _, position, *_ in nodes_of(run)) == slots - 2
    assert max(slot for *_, slot, _, _ in nodes_of(run)) < slots + 12


def test_many_ticks_wrap_the_letters(small):
    """Letters are kept by tick modulo 64; the second follower's stage reads older ones."""
    model = small("llama")
    reference = model.plain(prompt(5), 50)
    runner = model.graph((2, 1, 1), groups=(1, 2), width=2)
    options = {"count": 50, "width": 2, "keep_logits": False}
    run = ask(runner, prompt(5), **options, **right_and_ranks(reference, 2))
    assert len(run.results) > 64
    assert run.ids == reference.ids or not model.same_numbers


def test_boxes_in_host_memory(small, plain, monkeypatch):
    """Where devices cannot write to each other's memory; the second answer finds them emptied."""
    made, of = [], Box.of

    def noted(*args, through_host=False, **options):
        made.append(through_host)
        return of(*args, through_host=through_host, **options)

    monkeypatch.setattr(build, "devices_reach", lambda _devices: False)
    monkeypatch.setattr(Box, "of", noted)
    model, reference = small("llama"), plain("llama", 12)
    runner = model.graph((1, 1, 2), groups=(1, 1, 1), width=3)
    for _ in range(2):
        run = ask(runner, prompt(12), count=COUNT, width=3, **right_and_ranks(reference, 3))
        assert run.ids == reference.ids or not model.same_numbers
    assert made.count(True) == 6, "three boxes of the chain, three of the trees"


def test_whoever_works_first(small, plain, monkeypatch):
    """No device depends on what another one does in the same tick."""
    model = small("llama")
    if model.device != "cpu":
        pytest.skip("the interpreter's order")

    replay_backwards(monkeypatch)
    head = model.head(DEEP_3, blocks=1)
    options = {"head": head, "width": 3, "groups": (1, 1, 1)}
    check(model, plain("llama", 12), (1, 1, 2), 12, **options)


def forget_freed(self, *, first):
    """A follower that is never told which slots lost their nodes."""
    self.box.header[:, -self.level.freed :] = 2**62
    _FOLLOW(self, first=first)


def horizon_of_its_own(self, *, first):
    """A follower that takes its own tick for the home device's."""
    self.box.header[:, 1] += 16 * self.first
    _FOLLOW(self, first=first)


def one_row_returns(self, sampling, *, single):
    """Only the first row's target comes home."""
    result = _PUSH(self, sampling, single=single)
    for push in self.pushes:
        if push.target:
            push.box.header[:, 1:] = push.box.header[:, :1]
    return result


_FOLLOW, _PUSH = TreeFollower._follow, TreeFollower._push
FAULTS = {
    "freed slots are not told": (TreeFollower, "_follow", forget_freed),
    "the horizon is that of another tick": (TreeFollower, "_follow", horizon_of_its_own),
    "one target for all rows": (TreeFollower, "_push", one_row_returns),
    "returned states are dropped": (crew, "inside", lambda *_: False),
    "boxes keep the last answer": (Box, "clear", lambda _: None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(small, plain, monkeypatch, name):
    """Those of the kernels are in ``cuda_faults``."""
    model = small("llama")
    if model.device != "cpu":
        pytest.skip("faults are planted in the interpreter")
    reference = plain("llama", 12, 11)
    head = model.head(DEEP_3, blocks=1)
    forced = right_and_ranks(reference, 4)
    monkeypatch.setattr(*FAULTS[name])

    def both():
        for options in (forced, {}):
            options = {"head": head, "width": 4, "groups": (1, 1, 1)} | options
            check(model, reference, (1, 1, 2), 12, **options)

    with pytest.raises(AssertionError):
        both()
