"""Drafts of a chosen quality, and what formulae promise for them. Pure.

``n`` stages, ``a`` the probability that a draft is right, ``k`` the draft length of EESD, ``E`` of
``L`` layers before the exit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from ppsd_cli.bench_records import Key

DRAFT_LENGTHS = (2, 3, 4, 6)
"""Draft lengths among which the best one is looked for."""
_LEAST_SHARE = 1e-9


def forced_drafts(
    answer: Sequence[int], *, acceptance: float, vocabulary: int, seed: int, key: Key
) -> tuple[int, ...]:
    """Guesses for every token of ``answer``, each right with probability ``acceptance``.

    A wrong guess is the next token id. The draw depends on seed, question, turn and position
    only: it is the same in every repetition and for every decoder, and a guess that is right at
    some acceptance is right at every higher one.
    """
    return tuple(
        token if _uniform(seed, key, position) < acceptance else (token + 1) % vocabulary
        for position, token in enumerate(answer)
    )


@dataclass(frozen=True, slots=True)
class ForcedTree:
    """Right tokens, where each stands among its siblings, and the log shares of these by rank."""

    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...]


def forced_tree(
    answer: Sequence[int], fixed: tuple[float, float], width: int, *, seed: int, key: Key
) -> ForcedTree:
    """Guesses for a tree: the right token is the best with probability ``fixed[0]``, and among the
    ``width`` best with probability ``fixed[1]``.

    Of what is between the two, each rank after the first gets half of what the one before it gets.
    The draws are those of ``forced_drafts``.
    """
    best, among = fixed
    halves = [2.0**-rank for rank in range(1, width)]
    shares = [best, *((among - best) * half / sum(halves) for half in halves)]
    bounds = list(accumulate(shares))
    draws = [_uniform(seed, key, position) for position in range(len(answer))]
    ranks = tuple(sum(draw >= bound for bound in bounds) for draw in draws)
    scores = tuple(math.log(max(share, _LEAST_SHARE)) for share in shares)
    return ForcedTree(tuple(answer), ranks, scores)


def chain_speedup(stages: int, acceptance: float) -> float:
    """PPSD over plain decoding with equal stages and a free head (arXiv 2509.19368)."""
    return stages / (1 + (stages - 1) * (1 - acceptance))


def burst_speedup(draft_length: int, acceptance: float, *, exit_layer: int, layers: int) -> float:
    """EESD over plain decoding, where a pass over k + 1 tokens costs what one over 1 token does.

    Tokens of a burst: (1 - a^(k+1)) / (1 - a) (Leviathan et al., 2023). Its cost in passes of the
    full model: (k + 1) E / L for drafting, (L - E) / L for verifying.
    """
    k, a = draft_length, acceptance
    tokens = k + 1.0 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)
    return tokens / ((k + 1) * exit_layer / layers + (layers - exit_layer) / layers)


def best_draft_length(acceptance: float, *, exit_layer: int, layers: int) -> int:
    """The draft length of ``DRAFT_LENGTHS`` for which the formula promises most."""
    return max(
        DRAFT_LENGTHS,
        key=lambda k: burst_speedup(k, acceptance, exit_layer=exit_layer, layers=layers),
    )


def _uniform(seed: int, key: Key, position: int) -> float:
    """A number in [0, 1) that is a hash of its arguments."""
    text = f"{seed}|{key.task}|{key.question_id}|{key.turn}|{position}"
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56
