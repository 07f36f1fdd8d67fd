"""The accept rule and the ledger of nodes in flight, for chains as tables and for trees against
a model by brute force; the rule's tensor form on real traces.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Node
from ppsd_cli.core.tree import Tree, accepts, best_children


def node(serial, position, token=7, *, tokens=1, drafted=True, final=True):
    return Node(serial, position, token, tokens, drafted=drafted, final=final)


def test_first_token_of_an_answer_is_undrafted_and_due():
    chain = Tree()
    chain.enter(node(0, 0, None, tokens=4, drafted=False, final=False))
    chain.enter(node(1, 4, None, tokens=3, drafted=False))
    assert chain.verify(0, 1) is None, "an early chunk decides nothing"
    verdict = chain.verify(1, 42)
    assert verdict is not None
    assert (verdict.position, verdict.token_id, verdict.void) == (7, 42, ())
    assert verdict.outcome is Outcome.UNDRAFTED
    assert chain.due == (7, 42)
    assert chain.next_position() == 7
    chain.enter(node(2, 7, 42, drafted=False))
    assert chain.due is None
    assert chain.next_position() == 8


def test_right_guess_stays_and_wrong_guess_voids_everything_behind():
    chain = Tree()
    for serial, token in enumerate((10, 11, 12, 13)):
        chain.enter(node(serial, serial, token))
    right = chain.verify(0, 11)
    assert right is not None
    assert (right.position, right.outcome, right.draft_id) == (1, Outcome.ACCEPTED, None)
    assert chain.next_position() == 4
    flush = chain.verify(1, 99)
    assert flush is not None
    assert (flush.position, flush.token_id, flush.draft_id) == (2, 99, 12)
    assert flush.outcome is Outcome.CORRECTED
    assert [each.serial for each in flush.void] == [2, 3]
    assert chain.due == (2, 99)
    assert chain.verify(2, 13) is None, "a void node's answer is ignored"
    assert chain.verify(3, 99) is None


def test_void_and_live_nodes_of_one_position_are_told_apart_by_serial():
    chain = Tree()
    for serial, token in enumerate((10, 11, 12)):
        chain.enter(node(serial, serial, token))
    assert chain.verify(0, 50) is not None
    chain.enter(node(3, 1, 50, drafted=False))
    chain.enter(node(4, 2, 51))
    assert chain.verify(1, 51) is None, "serial 1 is void though its position is the live one"
    assert chain.verify(2, 51) is None
    verdict = chain.verify(3, 51)
    assert verdict is not None
    assert verdict.outcome is Outcome.ACCEPTED


def test_a_new_answer_voids_what_is_in_flight():
    chain = Tree()
    chain.enter(node(0, 0))
    chain.enter(node(1, 1))
    chain.clear()
    assert chain.newest is None
    assert chain.verify(0, 7) is None
    chain.enter(node(2, 0, None, tokens=1, drafted=False))
    assert chain.verify(1, 7) is None
    assert chain.verify(2, 7) is not None


def test_an_undrafted_token_after_a_correction_is_not_a_guess():
    """The first node behind a correction is what the correction's target is compared with."""
    chain = Tree()
    chain.enter(node(0, 0, None, drafted=False))
    assert chain.verify(0, 5) is not None
    chain.enter(node(1, 1, 5, drafted=False))
    verdict = chain.verify(1, 6)
    assert verdict is not None
    assert verdict.outcome is Outcome.UNDRAFTED, "nothing was behind it"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=50))
def test_tensor_form_equals_python_form(pairs):
    fed, target = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert accepts(fed, target).tolist() == [accepts(f, t) for f, t in pairs]


# Trees against a model by brute force: a node is live if the text that it stands on is true


SHARES = (-0.125, -0.5, -1.0, -1.0, -2.5)  # exact in binary, with a tie


class Forest:
    """All nodes that ever entered, each with the whole text up to and with its own token."""

    def __init__(self, *, stages, width, vocabulary, order):
        self.stages, self.width, self.vocabulary, self.order = stages, width, vocabulary, order
        self.tree, self.serial, self.levels = Tree(), 0, []
        self.text, self.texts, self.nodes, self.scores = [0], {}, {}, {}
        self.settled, self.slots, self.held = set(), {}, {}
        self.outcomes = []

    def candidates(self, text):
        """Tokens with log shares behind ``text``, best first."""
        ranked = self.order(text, self.vocabulary)
        return list(zip(ranked, SHARES, strict=False))[: self.width]

    def run(self, target, ticks):
        """``target(text)`` is the model's token; every fact of every tick is checked."""
        for tick in range(ticks):
            self.boundary(tick, target)
            self.feed()
            self.check_state()

    def boundary(self, tick, target):
        if tick < self.stages:
            return
        for node in self.levels[tick - self.stages]:
            token = target(self.texts[node.serial])
            was_live = node.serial in self.expected_live()
            self.settled.add(node.serial)
            verdict = self.tree.verify(node.serial, token)
            assert (verdict is not None) == was_live, "only true texts decide"
            if verdict is not None:
                self.settle(verdict, token)

    def settle(self, verdict, token):
        before = self.expected_live()
        assert verdict.position == len(self.text)
        self.text.append(token)
        after = self.expected_live()
        known = any(self.texts[serial] == self.text for serial in self.nodes)
        expected = Outcome.ACCEPTED if known else Outcome.CORRECTED
        assert verdict.outcome is (expected if before else Outcome.UNDRAFTED)
        assert [n.serial for n in verdict.void] == sorted(before - after)
        assert (self.tree.due == (verdict.position, token)) == (not known)
        self.outcomes.append(verdict.outcome)

    def expected_live(self):
        true = self.text
        return {
            serial
            for serial, text in self.texts.items()
            if serial not in self.settled and text[: len(true)] == true[: len(text)]
        }

    def feed(self):
        if self.tree.due is not None:
            position, token = self.tree.due
            entering = [(None, token, 0.0, list(self.text))]
            assert position == len(self.text) - 1
        elif not self.nodes:
            entering = [(None, self.text[0], 0.0, list(self.text))]
        else:
            entering = self.best_by_brute_force()
            leaves = self.tree.leaves
            offered = [self.candidates(self.texts[leaf.serial]) for leaf in leaves]
            chosen = best_children(leaves, offered, self.width)
            assert [(c.parent.serial, c.token_id, c.score) for c in chosen] == [
                (parent, token, score) for parent, token, score, _ in entering
            ]
        level = []
        for (parent, token, score, text), slot in zip(
            entering, self.tree.slots.lowest(len(entering)), strict=True
        ):
            level.append(self.make(parent, token, score, text, slot))
        self.tree.enter_level(level)
        self.levels.append(level)

    def best_by_brute_force(self):
        live = self.expected_live()
        deepest = max(len(self.texts[serial]) for serial in live)
        options = []
        for serial in sorted(live):
            text = self.texts[serial]
            if len(text) < deepest:
                continue
            for rank, (token, share) in enumerate(self.candidates(text)):
                score = self.scores[serial] + share
                options.append((-score, serial, rank, token, [*text, token]))
        options.sort()
        return [(serial, token, -score, text) for score, serial, _, token, text in options][
            : self.width
        ]

    def make(self, parent, token, score, text, slot):
        taken = {self.slots[s] for s in self.expected_live()} | set(self.committed_slots())
        assert slot == min(set(range(len(taken) + 1)) - taken), "the lowest free slot"
        made = Node(
            self.serial, len(text) - 1, token, 1, drafted=parent is not None, final=True,
            parent=parent, slot=slot, score=score,
        )  # fmt: skip
        assert self.tree.end_of_parent(made) == made.position or not self.nodes
        self.texts[self.serial], self.nodes[self.serial] = text, made
        self.scores[self.serial], self.slots[self.serial] = score, slot
        self.serial += 1
        return made

    def committed_slots(self):
        """Slots of settled nodes whose text is true: they keep them."""
        true = [s for s in self.settled if self.texts[s] == self.text[: len(self.texts[s])]]
        return [self.slots[serial] for serial in true]

    def check_state(self):
        assert {n.serial for n in self.tree.live} == self.expected_live()
        kept = self.committed_slots() + [self.slots[s] for s in self.expected_live()]
        assert len(kept) == len(set(kept)), "two nodes in one slot"
        bound = len(self.committed_slots()) + self.stages * self.width
        assert self.tree.slots.end <= bound
        assert all(slot < bound for slot in kept)
        if self.width == 1:
            assert all(self.slots[n.serial] == n.position for n in self.tree.live)


def by_hash(seed):
    def order(text, vocabulary):
        start = hash((seed, *text))
        return [(start + step) % vocabulary for step in range(vocabulary)]

    return order


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_small_tree(stages, width):
    """All sequences of eight targets over two tokens, or six over three."""
    seen = set()
    for vocabulary, ticks in ((2, 8), (3, 6)):
        for script in product(range(vocabulary), repeat=ticks):
            forest = Forest(stages=stages, width=width, vocabulary=vocabulary, order=by_hash(1))
            forest.run(lambda text, script=script: script[(len(text) - 1) % len(script)], ticks + 3)
            seen.update(forest.outcomes)
    everything_fits = stages == 2 and width == 3
    both = {Outcome.ACCEPTED} if everything_fits else {Outcome.ACCEPTED, Outcome.CORRECTED}
    assert seen == ({Outcome.UNDRAFTED} if stages == 1 else both)


@settings(max_examples=150, deadline=None)
@given(
    stages=st.integers(1, 6),
    width=st.integers(1, 5),
    vocabulary=st.integers(2, 5),
    seed=st.integers(0, 1000),
    mistakes=st.sets(st.integers(0, 30)),
)
def test_any_tree(stages, width, vocabulary, seed, mistakes):
    """Targets near the guesses, so that paths live long, with mistakes in between."""
    order = by_hash(seed)

    def target(text):
        ranked = order(text, vocabulary)
        rank = hash((seed, len(text))) % min(width, vocabulary)
        return ranked[-1 if len(text) in mistakes else rank]

    forest = Forest(stages=stages, width=width, vocabulary=vocabulary, order=order)
    forest.run(target, 40)


def test_a_node_behind_a_void_one_is_refused():
    tree = Tree()
    tree.enter(node(0, 0, 5, drafted=False))
    for serial, token in ((1, 7), (2, 8)):
        tree.enter(replace(node(serial, 1, token), parent=0))
    verdict = tree.verify(0, 8)
    assert verdict is not None
    assert [n.serial for n in verdict.void] == [1]
    assert tree.slots.lowest(2) == (1, 3)
    with pytest.raises(AssertionError, match="void"):
        tree.enter(replace(node(3, 2, 9), parent=1))
    with pytest.raises(AssertionError, match="slot"):
        tree.enter(replace(node(3, 2, 9), parent=2, slot=3))


def test_nothing_without_a_share_enters():
    leaf = node(0, 0, 5)
    offered = [(1, -0.5), (2, float("-inf"))]
    assert [child.token_id for child in best_children([leaf], [offered], 4)] == [1]
