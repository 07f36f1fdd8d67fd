"""Several devices behind one runner: event by event the in-process runner, bit by bit one device.

One device plays them all, with streams, boxes and graphs of their own; on a machine with several
GPUs each is one of them.
"""

from functools import cache

import cuda_cases
import pytest
import torch
from cuda_cases import (
    CONTEXT,
    VOCABULARY,
    Small,
    ask,
    assert_exact,
    assert_same_events,
    prompt,
    replay_backwards,
)
from cuda_fixtures import PLACES
from models import forced_drafts
from test_cuda_engine import DEEP_3

from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda import clock, crew
from ppsd_cli.runtime.cuda.relay import Box

COUNT = 7
DRAWN = Sampling(temperature=0.8, seed=7)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(scope="module", params=PLACES)
def model(request, tmp_path_factory):
    device, dtype = request.param
    folder = tmp_path_factory.mktemp("several")
    return Small(cuda_cases.save_small(folder / "model", "llama"), device, dtype, folder)


@pytest.fixture(scope="module")
def plain(model):
    """Plain decoding on one device, each answer made once."""

    @cache
    def run(length, count=COUNT, sampling=None):
        options = {} if sampling is None else {"sampling": sampling}
        return model.plain(prompt(length), count, **options)

    return run


def check(model, reference, split, groups, *, head="raw", length=12, **options):
    run = ask(model.graph(split, head=head, groups=groups), prompt(length), **options)
    assert_exact(run, reference)
    if model.same_numbers:
        assert_same_events(run, ask(model.local(split, head=head), prompt(length), **options))


@pytest.mark.parametrize(
    ("split", "groups"), [((2, 2), (1, 1)), ((1, 2, 1), (1, 1, 1)), ((1, 1, 1, 1), (1, 2, 1))]
)
@pytest.mark.parametrize("pattern", ["always", "never", "thirds"])
def test_guesses_right_never_and_sometimes(model, plain, split, groups, pattern):
    reference = plain(12)
    guesses = forced_drafts(reference.ids, pattern, VOCABULARY)
    check(model, reference, split, groups, count=COUNT, forced=guesses)


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1), (1, 2)])
def test_deeper_states_come_back(model, plain, groups):
    """The head's taps lie on other devices; the prompt has three chunks."""
    head = model.head(DEEP_3, blocks=2)
    check(model, plain(19), (1, 1, 2), groups, head=head, length=19, count=COUNT)


@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1)])
def test_naive_split(model, plain, groups):
    check(model, plain(12), (1, 1, 2), groups, head=None, count=COUNT, drafting=False)


def test_sampling(model, plain):
    reference = plain(12, sampling=DRAWN)
    check(model, reference, (1, 3), (1, 1), count=COUNT, sampling=DRAWN)


def test_answers_after_each_other(model, plain):
    """Ends with nodes in flight, ahead of the host, and the next answer is right from the start."""
    runner, reference = model.graph((1, 2, 1), groups=(1, 1, 1)), plain(12)
    guesses = forced_drafts(reference.ids, "always", VOCABULARY)
    for keep in (False, True, False):
        run = ask(runner, prompt(12), count=COUNT, forced=guesses, keep_logits=keep)
        assert run.ids == reference.ids
        assert ask(runner, prompt(30, seed=2), count=2, keep_logits=keep).ids
        assert ask(runner, prompt(12), count=3, drafting=False).ids == reference.ids[:3]


def test_whoever_works_first(model, plain, monkeypatch):
    """No device depends on what another one does in the same tick."""
    if model.device != "cpu":
        pytest.skip("the interpreter's order")
    replay_backwards(monkeypatch)
    head = model.head(DEEP_3, blocks=1)
    check(model, plain(12), (1, 1, 2), (1, 1, 1), head=head, count=COUNT)


def stale_place(self):
    self.header[:, 1].fill_(3)


@pytest.mark.parametrize("fault", ["bubbles are seen", "returned states are dropped"])
def test_planted_faults_are_caught(model, plain, monkeypatch, fault):
    """Those of the kernels are in ``cuda_faults``."""
    if model.device != "cpu":
        pytest.skip("faults are planted in the interpreter")
    head = model.head(DEEP_3, blocks=1)
    reference = plain(12)
    options = {"head": head, "count": COUNT}
    if fault == "bubbles are seen":
        monkeypatch.setattr(Box, "clear", stale_place)
        options["forced"] = forced_drafts(reference.ids, "thirds", VOCABULARY)
    else:
        monkeypatch.setattr(crew, "inside", lambda *_: False)
    with pytest.raises(AssertionError):
        check(model, reference, (1, 1, 2), (1, 1, 1), **options)


def test_context_edge(model, plain):
    reference = plain(12)
    runner = model.graph((1, 2, 1), groups=(1, 1, 1), slots=14)
    run = ask(runner, prompt(12), count=COUNT, context=14)
    assert run.ids == reference.ids[:2]
    assert CONTEXT > 14


def test_a_clock_is_read_on_its_own_device(monkeypatch):
    """Triton launches on the current device, wherever the memory lies that a kernel writes to."""
    current, read = ["cuda:0"], []

    class Device:
        def __init__(self, device):
            self.device = str(device)

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    kernel = {(1,): lambda _out: read.append(current[-1])}
    monkeypatch.setattr(clock, "_now_kernel", kernel)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    other = clock.DeviceClock(None)
    other._device, other._out = torch.device("cuda:1"), torch.zeros(1, dtype=torch.int64)
    other.again(tries=2)
    assert read == ["cuda:1"] * 2
