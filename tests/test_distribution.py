"""Sampled text has the model's distribution, and the pipeline gives exactly the draws of a seed."""

import itertools

import pytest
import torch
from models import answer
from scipy import stats
from test_choose import plain_probabilities

from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Sampling

VOCABULARY, DEPTH, DRAWS, PROMPT = 3, 3, 200_000, (0, 2, 1, 1)
SETTINGS = [
    pytest.param({"temperature": 1.0}, id="plain"),
    pytest.param({"temperature": 1.6}, id="hot"),
    pytest.param({"temperature": 0.8, "top_k": 2}, id="top-k"),
    pytest.param({"temperature": 1.2, "top_p": 0.8}, id="top-p"),
    pytest.param({"temperature": 1.5, "min_p": 0.2}, id="min-p"),
    pytest.param({"temperature": 1.3, "top_k": 2, "top_p": 0.9, "min_p": 0.05}, id="all"),
]


@pytest.fixture(scope="module")
def logits(tiny):
    """Logits [3] of the model after every text of at most two tokens behind the prompt."""
    model = tiny("three")
    texts = [t for n in range(DEPTH) for t in itertools.product(range(VOCABULARY), repeat=n)]
    return {text: model.logits((*PROMPT, *text))[-1] for text in texts}


def joint(logits, sampling):
    """Probability of each of the 27 answers, by the chain rule."""
    result = {}
    for text in itertools.product(range(VOCABULARY), repeat=DEPTH):
        result[text] = 1.0
        for i, token in enumerate(text):
            result[text] *= plain_probabilities(logits[text[:i]], sampling)[token]
    return result


def draw(logits, sampling, seeds):
    """An answer [len(seeds), 3] for every seed, all rows of one position in one call."""
    table = torch.zeros(DEPTH, VOCABULARY**DEPTH, VOCABULARY)
    code = torch.zeros(len(seeds), dtype=torch.int64)
    for text, row in logits.items():
        number = sum(t * VOCABULARY**i for i, t in enumerate(text))
        table[len(text), number] = row
    columns = []
    for step in range(DEPTH):
        chosen = choose_per_seed(table[step, code], sampling, len(PROMPT) + step, seeds)
        code += chosen * VOCABULARY**step
        columns.append(chosen)
    return torch.stack(columns, dim=1)


def choose_per_seed(rows, sampling, position, seeds):
    """``choose`` with another seed in every row: a seed enters the hash as a shifted position.

    The noise is a function of position + C * seed (mod 2^64), so shifting the positions by
    C * seed is the same as asking for that seed.
    """
    base = _spread(0)
    shift = torch.tensor([_wrap(_spread(seed) - base) for seed in seeds])
    return choose(rows, sampling, position + shift)


def _spread(seed):
    from ppsd_cli.core.choose import signed_seed

    return signed_seed(seed)


def _wrap(value):
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("options", SETTINGS)
def test_two_hundred_thousand_draws_follow_the_model(logits, options):
    sampling = Sampling(**options)
    probabilities = joint(logits, sampling)
    drawn = draw(logits, sampling, range(DRAWS))
    number = (drawn * torch.tensor([VOCABULARY**i for i in range(DEPTH)])).sum(-1)
    counts = torch.bincount(number, minlength=VOCABULARY**DEPTH).tolist()
    order = {sum(t * VOCABULARY**i for i, t in enumerate(text)): text for text in probabilities}
    observed = [counts[code] for code in sorted(order)]
    expected = [probabilities[order[code]] * DRAWS for code in sorted(order)]
    distance = sum(abs(o - e) for o, e in zip(observed, expected, strict=True)) / (2 * DRAWS)
    assert distance < 0.006
    cells = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    assert all(o == 0 for o, e in zip(observed, expected, strict=True) if e == 0)
    assert len(cells) > 6, "the model is too sure of itself for this test to see much"
    assert min(e for _, e in cells) > 5, "chi-square needs every cell to be expected a few times"
    total = sum(e for _, e in cells)
    scaled = [e * DRAWS / total for _, e in cells]
    assert stats.chisquare([o for o, _ in cells], scaled).pvalue > 1e-4


def test_two_thousand_seeds_through_the_engine_equal_those_draws(tiny, logits):
    sampling = {"temperature": 1.2, "top_k": 3, "top_p": 0.95}
    drawn = draw(logits, Sampling(**sampling), range(2_000)).tolist()
    runner = tiny("three").runner((1, 1), chunk=4, slots=16)
    for seed, expected in enumerate(drawn):
        run = answer(
            runner,
            PROMPT,
            count=DEPTH,
            sampling=Sampling(**sampling, seed=seed),
            context=16,
            chunk=4,
            keep_logits=False,
        )
        assert run.ids == expected, f"seed {seed}"


def test_seeds_differ_and_repeat(tiny):
    runner = tiny("three").runner((1, 1), slots=64)
    texts = [
        answer(runner, PROMPT, count=30, sampling=Sampling(1.5, seed=seed), context=64).ids
        for seed in (0, 1, 2, 0, 1, 2)
    ]
    assert texts[:3] == texts[3:]
    assert len({tuple(text) for text in texts}) == 3
