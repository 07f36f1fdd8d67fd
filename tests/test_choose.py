"""Logits to tokens: against a plain reference, and the noise against its distribution."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ppsd_cli.core.choose import best_tokens, choose, gumbel, perturbed, restrict
from ppsd_cli.core.plan import Sampling


def at(*positions):
    return torch.tensor(positions)


def plain_probabilities(logits, sampling):
    """Temperature, top-k, top-p, min-p on one row of numbers, token by token."""
    scores = np.asarray(logits, dtype=np.float64) / sampling.temperature
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = list(order)
    if 0 < sampling.top_k < len(scores):
        least = scores[order[sampling.top_k - 1]]
        kept = [i for i in order if scores[i] >= least]
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in kept}
    if sampling.top_p < 1:
        total, reached, nucleus = sum(weights.values()), 0.0, []
        for i in kept:
            if nucleus and reached / total >= sampling.top_p:
                break
            nucleus.append(i)
            reached += weights[i]
        weights = {i: weights[i] for i in nucleus}
    weights = {i: w for i, w in weights.items() if w >= sampling.min_p}
    total = sum(weights.values())
    return np.array([weights.get(i, 0.0) / total for i in range(len(scores))])


def test_greedy_takes_the_largest_and_the_lowest_of_equals():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-5.0, -4.0, -4.0, -6.0]])
    assert choose(logits, Sampling(), at(0, 1, 2)).tolist() == [1, 0, 1]
    assert choose(logits, Sampling(seed=9), at(5, 6, 7)).tolist() == [1, 0, 1]


def test_greedy_ties_in_a_large_vocabulary():
    logits = torch.zeros(3, 50_000)
    logits[0, [123, 124, 40_000]] = 1.0
    logits[1, [49_998, 49_999]] = 1.0
    assert choose(logits, Sampling(), at(0, 0, 0)).tolist() == [123, 49_998, 0]


def test_narrow_numbers_are_compared_in_float32():
    logits = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    assert choose(logits, Sampling(), at(0)).tolist() == [1]


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.3, 0.61, 0.9, 0.97, 1.0]),
    st.sampled_from([0.0, 0.01, 0.07, 0.33, 0.9]),
)
def test_restrict_equals_a_plain_reference(tenths, temperature, top_k, top_p, min_p):
    """Ties straddle the edge of top-p only where the order among equals decides: lowest id."""
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = torch.tensor([tenths]) / 10 + torch.arange(len(tenths)) * 1e-3
    ours = restrict(logits / temperature, sampling).double().softmax(-1)[0].numpy()
    np.testing.assert_allclose(ours, plain_probabilities(logits[0], sampling), atol=1e-6)


def test_each_restriction_by_hand():
    scores = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def kept(**options):
        result = restrict(scores, Sampling(1.0, **options))[0]
        return [i for i in range(5) if result[i] > -torch.inf]

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.4) == [0]
    assert kept(top_p=0.65) == [0, 1]
    assert kept(top_p=1e-9) == [0], "at least one token stays"
    assert kept(min_p=0.25) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]
    assert kept(top_k=3, top_p=0.8) == [0, 1], "top-p counts what top-k left as the whole"


def test_rows_do_not_influence_each_other():
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(), Sampling(0.9, 5, 0.8, 0.05, 3)):
        positions = torch.arange(100, 107)
        together = choose(logits, sampling, positions)
        alone = [int(choose(logits[i : i + 1], sampling, positions[i : i + 1])) for i in range(7)]
        assert together.tolist() == alone


def test_very_low_temperature_is_greedy():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(2))
    chosen = choose(logits, Sampling(1e-4, seed=4), torch.arange(50))
    assert torch.equal(chosen, logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 3, 0.9, 0.1)])
def test_nan_is_an_error(sampling):
    logits = torch.zeros(2, 8)
    logits[1, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        choose(logits, sampling, at(0, 1))
    with pytest.raises(ValueError, match="NaN"):
        choose(torch.full((1, 8), torch.nan), sampling, at(0))


def test_a_reduced_vocabulary_gives_full_ids_and_shares_the_noise():
    """Draft columns at their places in the full vocabulary get the full vocabulary's noise."""
    ids = torch.tensor([2, 3, 11, 17, 40, 63])
    noise = gumbel(5, torch.arange(30), torch.arange(64))
    assert torch.equal(gumbel(5, torch.arange(30), ids), noise[:, ids])
    logits = torch.full((400, 64), -torch.inf)
    logits[:, ids] = torch.randn(400, 6, generator=torch.Generator().manual_seed(3))
    for sampling in (Sampling(), Sampling(1.0, seed=8), Sampling(0.8, 3, 0.9, 0.01, 2)):
        full = choose(logits, sampling, torch.arange(400))
        reduced = choose(logits[:, ids], sampling, torch.arange(400), token_ids=ids)
        assert torch.equal(full, reduced)
    assert set(choose(logits, Sampling(1.0), torch.arange(400)).tolist()) == set(ids.tolist())


def test_noise_is_gumbel():
    """Kolmogorov-Smirnov over tokens of one position, over positions of one token, over seeds."""
    samples = {
        "tokens": gumbel(1, at(7), torch.arange(50_000))[0],
        "positions": gumbel(1, torch.arange(50_000), at(7))[:, 0],
        "seeds": torch.cat([gumbel(seed, at(7), at(7))[0] for seed in range(5_000)]),
    }
    for name, sample in samples.items():
        assert torch.isfinite(sample).all()
        assert stats.kstest(sample.double().numpy(), "gumbel_r").pvalue > 1e-4, name


def test_noise_is_independent_over_positions_tokens_and_seeds():
    tokens = torch.arange(20_000)
    rows = [
        gumbel(seed, at(p), tokens)[0] for seed, p in itertools.product((0, 1, 2**40), (0, 1, 2))
    ]
    rows += [gumbel(0, at(0), tokens + 1)[0], gumbel(-1, at(0), tokens)[0]]
    correlations = np.corrcoef(torch.stack(rows).double().numpy())
    others = correlations[~np.eye(len(rows), dtype=bool)]
    assert np.abs(others).max() < 5 / math.sqrt(len(tokens))
    columns = gumbel(3, torch.arange(20_000), torch.arange(12)).double().numpy()
    correlations = np.corrcoef(columns.T)
    assert np.abs(correlations[~np.eye(12, dtype=bool)]).max() < 5 / math.sqrt(20_000)
    shifted = np.corrcoef(columns[:-1, 0], columns[1:, 0])[0, 1]
    assert abs(shifted) < 5 / math.sqrt(20_000)


def test_noise_repeats_and_takes_any_seed():
    for seed in (0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 10**30):
        first = gumbel(seed, at(0, 5, 2**31), torch.arange(10))
        assert torch.equal(first, gumbel(seed, at(0, 5, 2**31), torch.arange(10)))
        assert torch.isfinite(first).all()


def test_noise_equals_splitmix_in_whole_numbers():
    """The same hash with Python's integers: a changed hash would change every seeded text."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, position, token in [(0, 0, 0), (1, 2, 3), (12345, 8191, 151_935), (2**63, 7, 1)]:
        start = (position + seed * 0xD1342543DE82EF95 + golden) & mask
        bits = mix((mix((mix(start) + golden) & mask) + token * golden) & mask)
        uniform = ((bits >> 12) + 0.5) / 2**52
        noise = gumbel(seed, at(position), at(token)).item()
        assert noise == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6)


# The best tokens of a row, for trees


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9, seed=3)], ids=str)
@pytest.mark.parametrize("ids", [None, torch.arange(7, 207)], ids=["full", "reduced"])
def test_the_first_of_the_best_tokens_is_the_choice(sampling, ids):
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 3
    where = torch.full((50,), 9)
    scores = perturbed(logits, sampling, where, ids)
    best = best_tokens(scores, 4, scale=1.5, token_ids=ids)
    assert [row[0][0] for row in best] == choose(logits, sampling, where, token_ids=ids).tolist()
    shares = (scores * 1.5).log_softmax(-1)
    for row, (tokens, scored) in enumerate(zip(best, scores, strict=True)):
        columns = [token - (0 if ids is None else 7) for token, _ in tokens]
        kept = int((scored > -torch.inf).sum())
        assert (
            scored[columns].tolist() == scored.sort(descending=True).values[: min(4, kept)].tolist()
        )
        assert [share for _, share in tokens] == shares[row, columns].tolist()


def test_level_tokens_go_to_the_lowest_column():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0], [0.0] * 6])
    for count, first in ((2, [4, 1]), (3, [4, 1, 0]), (4, [4, 1, 0, 2]), (9, [4, 1, 0, 2, 3, 5])):
        best = best_tokens(scores, count, scale=1.0)
        assert [token for token, _ in best[0]] == first
        assert [token for token, _ in best[1]] == list(range(min(count, 6)))


def test_excluded_tokens_are_left_out_and_nan_is_an_error():
    scores = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf, 0.0, -torch.inf]])
    best = best_tokens(scores, 3, scale=1.0)
    assert [[token for token, _ in row] for row in best] == [[2, 0], [1]]
    with pytest.raises(ValueError, match="NaN"):
        best_tokens(torch.tensor([[1.0, torch.nan]]), 1, scale=1.0)
