"""Logits to a token, the same function for drafts and targets.

Sampling is by the Gumbel-max trick with shared noise: add noise that depends only on (seed,
position, token id) and take the largest. Draft and target use the same noise, so they often
agree; the target's choice depends on its own logits alone, so the text follows the model's
distribution whatever the draft was.

Shapes: W rows, V vocabulary.
"""

import torch
from torch import Tensor

from ppsd_cli.core.plan import Sampling

_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9, constants of splitmix64 (Steele et al., 2014)
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15


def choose(
    logits: Tensor, sampling: Sampling, positions: Tensor, *, token_ids: Tensor | None = None
) -> Tensor:
    """The chosen token of every row, as ids [W] (int64).

    ``logits`` [W, V]; ``positions`` [W] of the tokens to be chosen; ``token_ids`` [V] maps
    columns to ids of the full vocabulary where the draft vocabulary is reduced. Ties go to the
    lowest column. Order: temperature, top-k, top-p, min-p, noise. Raises ValueError on NaN rows.
    """
    best, column = perturbed(logits, sampling, positions, token_ids).max(dim=-1)
    _check_numbers(best)
    return column if token_ids is None else token_ids[column]


def best_tokens(
    scores: Tensor, count: int, *, scale: float, token_ids: Tensor | None = None
) -> list[list[tuple[int, float]]]:
    """For every row the ``count`` best tokens with their log shares, best first.

    ``scores`` [W, V] are perturbed logits; the first token of a row is what ``choose`` takes. The
    shares are the log-softmax of ``scale`` times the row. Ties go to the lowest column. Tokens
    that sampling excludes are left out, so a row may have fewer. Raises ValueError on NaN rows.
    """
    count = min(count, scores.shape[-1])
    least = scores.topk(count, dim=-1).values[:, -1:]
    _check_numbers(scores.max(dim=-1).values)
    shares = (scores * scale).log_softmax(dim=-1)
    rows: list[list[tuple[float, int]]] = [[] for _ in scores]
    wanted = (scores >= least) & (scores > -torch.inf)  # more than ``count`` of a row if level
    places = wanted.nonzero()  # by row, then by column
    found = zip(places.tolist(), scores[*places.T].tolist(), strict=True)
    for (row, column), score in found:
        rows[row].append((-score, column))
    best = []
    for row, columns in enumerate(rows):
        chosen = [column for _, column in sorted(columns)[:count]]
        ids = chosen if token_ids is None else token_ids[chosen].tolist()
        best.append(list(zip(ids, shares[row, chosen].tolist(), strict=True)))
    return best


def perturbed(
    logits: Tensor, sampling: Sampling, positions: Tensor, token_ids: Tensor | None = None
) -> Tensor:
    """Scores [W, V] in float32 whose largest is the choice; arguments as for ``choose``."""
    scores = logits.float()
    if sampling.temperature > 0:
        scores = restrict(scores / sampling.temperature, sampling)
        ids = token_ids
        if ids is None:
            ids = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores + gumbel(sampling.seed, positions, ids)
    return scores


def _check_numbers(best: Tensor) -> None:
    if bool(torch.isnan(best).any()):
        raise ValueError("logits are not numbers (NaN)")


def restrict(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [W, V] with everything outside top-k, top-p and min-p at minus infinity.

    Top-p keeps the smallest set of likeliest tokens whose probability reaches p (Holtzman et
    al., 2020), at least one; min-p keeps those of at least p times the likeliest one's.
    """
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability
        drop = torch.zeros_like(before, dtype=torch.bool)
        drop.scatter_(-1, order, before >= sampling.top_p)
        drop.scatter_(-1, order[:, :1], False)
        scores = scores.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0:
        floor = scores.max(dim=-1, keepdim=True).values + torch.tensor(sampling.min_p).log()
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores


def gumbel(seed: int, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise [W, V] (float32), a pure function of seed, position and token id."""
    row = _mix(_mix(positions.to(torch.int64) + signed_seed(seed)) + _GOLDEN)
    bits = _mix(row[:, None] + token_ids.to(torch.int64)[None, :] * _GOLDEN)
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52  # exact, so never 0 or 1
    return (-(-uniform.log()).log()).float()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit integers with full avalanche."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed_seed(seed: int) -> int:
    """A seed as a signed 64-bit integer, spread so that neighbouring seeds differ everywhere."""
    value = (seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) % 2**64
    return value - 2**64 if value >= 2**63 else value
