"""Trees over several devices: event by event the in-process runner, slots and parents included.

One device plays them all, as in ``test_cuda_several.py``.
"""

import pytest
from cuda_cases import ask, prompt
from cuda_fixtures import plain_answers, small_models
from test_cuda_engine import DEEP_3
from test_cuda_trees import COUNT, DRAWN, check, nodes_of
from trees import right_and_ranks

from ppsd_cli.runtime.cuda import crew
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
        ("llama", (1, 1, 1, 1), (1, 2, 1), 3),
        ("llama", (1, 1, 1, 1), (2, 2), 8),
    ],
    ids=str,
)
def test_right_guesses_at_various_ranks(small, plain, kind, split, groups, width):
    reference = plain(kind, 12)
    forced = right_and_ranks(reference, width)
    check(small(kind), reference, split, 12, width=width, groups=groups, **forced)


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1), (1, 2)], ids=str)
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
    for width, keep in ((4, False), (1, True), (2, True), (4, False)):
        forced = right_and_ranks(reference, width) if width > 1 else {}
        options = {"count": COUNT, "width": width, "keep_logits": keep} | forced
        run = ask(runner, prompt(12), **options)
        assert ask(runner, prompt(30, seed=2), count=2, width=width).ids
        assert not small("llama").same_numbers or run.ids == reference.ids


def forget_freed(self, *, first):
    """A follower that is never told which slots lost their nodes."""
    size = (self.total - 1) * self.padded
    self.box.header[:, -size:] = 2**62
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
    reference = plain("llama", 12, 14)
    head = model.head(DEEP_3, blocks=1)
    forced = right_and_ranks(reference, 4)
    monkeypatch.setattr(*FAULTS[name])

    def both():
        for options in (forced, {}):
            options = {"head": head, "width": 4, "groups": (1, 1, 1)} | options
            check(model, reference, (1, 1, 2), 12, **options)

    with pytest.raises(AssertionError):
        both()
