"""Planted faults in the kernels that decide on the device, and in what surrounds them.

A fault is a text of a kernel's source and what stands there instead; the check beside it must
notice. All in Triton's interpreter, on small models. Without a fault every check passes.
"""

import importlib.util
import inspect
import sys
from functools import cache

import cuda_cases
import pytest
import triton_cpu
from cuda_cases import VOCABULARY, Small, ask, assert_exact, assert_same_events, prompt
from cuda_faults import FAULTS
from models import forced_drafts
from trees import right_and_ranks

from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda.tiles import SPLIT

_MISSING = triton_cpu.missing()
if _MISSING is None:
    from triton.runtime.interpreter import InterpretedFunction

    from ppsd_cli.runtime.cuda import board, first_token, launch, prompt_head
    from ppsd_cli.runtime.cuda.control import TICKS
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=str(_MISSING)),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
COUNT, STAGES = 6, (1, 1, 1)
SAMPLING = Sampling(temperature=1.2, seed=3)
PACKAGE = "ppsd_cli.runtime.cuda."


def ledger_kept(patch):
    begin = board.Board.begin

    def keep(self, *args, **kwargs):
        before = self.ledger.clone()
        begin(self, *args, **kwargs)
        self.ledger.copy_(before)

    patch.setattr(board.Board, "begin", keep)


def seed_forgotten(patch):
    begin = board.Board.begin

    def forget(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.noise.seed.zero_()

    patch.setattr(board.Board, "begin", forget)


def states_of_the_prompt_forgotten(patch):
    patch.setattr(prompt_head.PromptHead, "run", lambda *_: None)


def states_of_other_devices_forgotten(patch):
    patch.setattr(prompt_head.PromptHead, "take", lambda *_: None)


def first_token_by_the_noise_of_the_next(patch):
    choose = first_token.FirstToken.choose

    def late(self, states, position, sampling):
        return choose(self, states, position + 1, sampling)

    patch.setattr(first_token.FirstToken, "choose", late)


def weights_of_the_first_stage_for_all(patch):
    table = launch.Launcher.table

    def same(self, members, *, aligned):
        offsets = table(self, members, aligned=aligned).clone()
        offsets[:, 2] = 0
        return offsets

    patch.setattr(launch.Launcher, "table", same)


HOST_FAULTS = [
    (ledger_kept, "leftovers"),
    (seed_forgotten, "sampled"),
    (states_of_the_prompt_forgotten, "chain"),
    (states_of_other_devices_forgotten, "several"),
    (first_token_by_the_noise_of_the_next, "sampled"),
    (weights_of_the_first_stage_for_all, "chain"),
]


class Checks:
    """Checks by name. What they compare with is made at once, before any fault is planted."""

    def __init__(self, folder):
        self._folder = folder
        self._small = cache(self._make)
        deep = self._small("biases").head(((1, 0), (2, 1), (3, 2)), blocks=1)
        taps = ((1, 0), (1, 1), (2, 2), (2, 3), (3, 4))
        twice = self._small("biases").head(taps, depth=2)
        guessed = {"head": deep, "guess": True}
        plain = {"head": None, "drafting": False}
        seeded = {"head": "raw", "sampling": SAMPLING}
        long = prompt(SPLIT - 1)
        self._checks = {
            "chain": self._equality("biases", STAGES, prompt(9), count=COUNT, **guessed),
            "sampled": self._equality("llama", (2, 2), prompt(9), count=3, **seeded),
            "naive": self._equality("llama", (2, 2), self._with_token_0(), count=3, **plain),
            "window": self._equality("mistral", (3,), prompt(12), count=2, **plain),
            "long": self._equality("llama", (4,), long, count=4, **plain),
            "leftovers": self._leftovers(),
            "tree": self._tree(deep),
            "depth": self._tree(twice, depth=2),
            "several": self._equality(
                "biases", STAGES, prompt(9), count=COUNT, groups=(1, 2), **guessed
            ),
        }

    def run(self, name):
        self._checks[name]()

    def _make(self, kind):
        folder = self._folder / kind
        folder.mkdir()
        return Small(cuda_cases.save_small(folder / "model", kind), "cpu", "float32", folder)

    def _equality(self, kind, split, text, *, head, **options):
        """Text, logits and events of an answer."""
        model = self._small(kind)
        groups = options.pop("groups", None)
        sampling = {key: options[key] for key in ("sampling",) if key in options}
        reference = model.plain(text, options["count"], **sampling)
        if options.pop("guess", False):
            options["forced"] = forced_drafts(reference.ids, "thirds", VOCABULARY)[:5]
        expected = ask(model.local(split, head=head), text, **options)

        def check():
            run = ask(model.graph(split, head=head, groups=groups), text, **options)
            assert_exact(run, reference)
            assert_same_events(run, expected)

        return check

    def _tree(self, head, *, depth=1):
        """An answer by trees, with guesses right at various ranks; the prompt is two chunks."""
        model, wide = self._small("biases"), {"width": 3, "depth": depth}
        reference = model.plain(prompt(9), COUNT + 3 * depth)
        options = {"count": COUNT + 3 * depth} | wide | right_and_ranks(reference, 3, seed=1)
        expected = ask(model.local(STAGES, head=head, **wide), prompt(9), **options)

        def check():
            run = ask(model.graph(STAGES, head=head, **wide), prompt(9), **options)
            assert run.ids == reference.ids
            assert_same_events(run, expected, tree=True)

        return check

    def _leftovers(self):
        """An answer longer than the ledger, then one to a prompt that covers its slots."""
        model = self._small("llama")
        ids = ask(model.local((4,), head=None), prompt(5), count=TICKS // 2 + 2, drafting=False).ids
        never = forced_drafts(ids, "never", VOCABULARY)
        reference = model.plain(prompt(44), 2)

        def check():
            runner = model.graph((1, 3))
            ask(runner, prompt(9), count=2)  # recording a graph would clear the ledger, too
            run = ask(runner, prompt(5), count=len(ids), forced=never, keep_logits=False)
            assert run.commits[-1].tick > TICKS
            assert run.ids == ids
            assert_exact(ask(runner, prompt(44), count=2), reference)

        return check

    def _with_token_0(self):
        """A prompt that token 0 follows, but not at once."""
        runner = self._small("llama").local((4,), head=None)
        for seed in range(1000):
            text = prompt(5, seed)
            ids = ask(runner, text, count=2, drafting=False, keep_logits=False).ids
            if ids[1] == 0:
                return text
        raise AssertionError("no such prompt")


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return Checks(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "check",
    ["chain", "sampled", "naive", "window", "long", "leftovers", "tree", "depth", "several"],
)
def test_without_a_fault_the_check_passes(checks, check):
    checks.run(check)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(checks, monkeypatch, tmp_path, name):
    module, old, new, check = FAULTS[name]
    swap_kernels(monkeypatch, tmp_path, module, old, new)
    assert caught(checks, check)


@pytest.mark.parametrize(("plant", "check"), HOST_FAULTS)
def test_a_fault_of_the_host_is_caught(checks, monkeypatch, plant, check):
    plant(monkeypatch)
    assert caught(checks, check)


def caught(checks, name) -> bool:
    """Whether the check fails as checks do: numbers or events are not the expected ones."""
    try:
        checks.run(name)
    except AssertionError:
        return True
    return False


def swap_kernels(patch, folder, module, old, new):
    """Put kernels of a changed source in the place of the engine's, wherever they are used."""
    original = sys.modules[PACKAGE + module]
    source = inspect.getsource(original)
    assert source.count(old) >= 1, f"{module}.py has changed: adapt the fault {old!r}"
    path = folder / f"{module}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"faulty_{module}", path)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    kernels = {
        id(value): getattr(faulty, name)
        for name, value in vars(original).items()
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == original.__name__
    }
    users = [m for name, m in list(sys.modules.items()) if name.startswith(PACKAGE)]
    for user in users:
        for name, value in list(vars(user).items()):
            if id(value) in kernels:
                patch.setattr(user, name, kernels[id(value)])
