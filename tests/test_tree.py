"""The accept rule and the ledger of nodes in flight, as tables; its tensor form on real traces."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Node
from ppsd_cli.core.tree import Tree, accepts


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
