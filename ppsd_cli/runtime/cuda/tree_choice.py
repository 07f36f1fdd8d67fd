"""The best guesses behind every leaf of a tree, with their log shares.

Two launches. Program (c, r) of the first reads chunk c of leaf r's scores and keeps the best
``KEEP`` of them; program r of the second joins the chunks. What ``core.choose.best_tokens`` does in
torch, with the same ties: the larger score, then the lower column.

A score and its column travel as one int64 *key* that orders like the pair, so that a maximum finds
both.

Shapes: W leaves, KEEP guesses a leaf, C chunks of BN columns, V' draft vocabulary.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import noise_of
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor


@triton.jit
def key_of(score, index):
    """int64 that orders by ``score`` (float32), then by the lower ``index`` (31 bits)."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def score_of(key):
    """The score of a key."""
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    """The index of a key, int64."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def largest(keys, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """The ``COUNT`` largest of ``keys``, which differ, largest first in [PADDED]; -(2^63 - 1) where
    there are not so many.
    """
    i = tl.arange(0, PADDED)
    found = tl.full([PADDED], -9223372036854775807, dtype=tl.int64)
    for k in tl.static_range(COUNT):
        best = tl.max(keys, axis=0)
        found = tl.where(i == k, best, found)
        keys = tl.where(keys == best, -9223372036854775807, keys)
    return found


@triton.jit
def chunk_kernel(
    scores_ptr,
    id_ptr,
    place_ptr,
    seed_ptr,
    temperature_ptr,
    scale_ptr,
    key_ptr,
    top_ptr,
    total_ptr,
    V,
    W: tl.constexpr,
    KEEP: tl.constexpr,
    BN: tl.constexpr,
    DIVIDE: tl.constexpr,
    NOISE: tl.constexpr,
    MAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Keys [W, C, KEEP] of the best scores of each chunk of ``scores_ptr`` [W, V'], best first.

    ``DIVIDE``: by the temperature; ``NOISE``: plus the noise of the token behind ``place_ptr``
    [W, 2]. ``top_ptr``, ``total_ptr`` [W, C]: largest scaled score and the sum of exponentials over
    it, for the log shares; NaN where a score is.
    """
    wait_for_predecessor(PDL)
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    columns = chunk * BN + tl.arange(0, BN)
    ok = columns < V
    scores = tl.load(scores_ptr + row * V + columns, mask=ok, other=float("-inf"))
    if DIVIDE:
        scores = scores / tl.load(temperature_ptr)
    if NOISE:
        rows = row + tl.arange(0, 1)
        noise = noise_of(place_ptr, seed_ptr, id_ptr, columns, ok, rows, W, MAPPED)
        scores += tl.sum(noise, axis=1)
    scores = tl.where(ok, scores, float("-inf"))
    bad = tl.max((scores != scores).to(tl.int32), axis=0) > 0
    scaled = scores * tl.load(scale_ptr)
    top = tl.max(scaled, axis=0)
    total = tl.sum(tl.exp(scaled - tl.where(top == float("-inf"), 0.0, top)), axis=0)
    here = row * tl.num_programs(0) + chunk
    tl.store(top_ptr + here, tl.where(bad, float("nan"), top))
    tl.store(total_ptr + here, total)
    keys = key_of(tl.where(scores != scores, float("inf"), scores), columns)
    for rank in tl.static_range(KEEP):
        best = tl.max(keys, axis=0)
        tl.store(key_ptr + here * KEEP + rank, best)
        keys = tl.where(keys == best, -9223372036854775807, keys)


@triton.jit
def rank_kernel(
    key_ptr,
    top_ptr,
    total_ptr,
    scale_ptr,
    id_ptr,
    board_ptr,
    head_place_ptr,
    forced_ptr,
    ranks_ptr,
    shares_ptr,
    token_ptr,
    share_ptr,
    chunks,
    KEEP: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    MAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tokens and log shares [W, KEEP] of the best guesses behind leaf r, best first.

    A guess that sampling excludes has the share minus infinity, and token -1 stands for logits that
    are not numbers. Where the guess of this position is forced (``forced_ptr``, by position from
    the end of the prompt), it stands at its rank (``ranks_ptr``) among the others; ``shares_ptr``
    [KEEP]: shares by rank for such positions, where the first of them is not NaN.
    """
    wait_for_predecessor(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    count = chunks * KEEP
    keys = tl.load(key_ptr + row * count + at, mask=at < count, other=-9223372036854775807)
    rank = tl.arange(0, KP)
    best_keys = largest(keys, KEEP, KP)
    there = at < chunks
    tops = tl.load(top_ptr + row * chunks + at, mask=there, other=float("-inf"))
    totals = tl.load(total_ptr + row * chunks + at, mask=there, other=0.0)
    bad = tl.max((tops != tops).to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(tops != tops, float("-inf"), tops), axis=0)
    weight = tl.where(totals > 0, totals * tl.exp(tops - top), 0.0)
    scores = score_of(best_keys)
    share = scores * tl.load(scale_ptr) - (top + tl.log(tl.sum(weight, axis=0)))
    share = tl.minimum(share, 0.0)  # also where a fused product rounds otherwise than the top's
    column = tl.minimum(index_of(best_keys), 0x7FFFFFFE)
    real = (rank < KEEP) & (scores > float("-inf"))
    token = column
    if MAPPED:
        token = tl.load(id_ptr + column, mask=real, other=0)
    share = tl.where(real, share, float("-inf"))
    index = tl.load(head_place_ptr + row * 2) + 1 - tl.load(board_ptr + 9)
    if (index >= 0) & (index < tl.load(board_ptr + 8)):
        forced = tl.load(forced_ptr + index)
        asked = tl.load(ranks_ptr + index)
        found = tl.min(tl.where((token == forced) & (rank < KEEP), rank, KEEP), axis=0)
        source = rank - (rank > asked).to(tl.int32)
        source += (source >= found).to(tl.int32)
        moved = tl.where(source[:, None] == rank[None, :], token[None, :], 0)
        token = tl.where(rank == asked, forced, tl.sum(moved, axis=1))
        given = tl.load(shares_ptr + tl.minimum(rank, KEEP - 1))
        share = tl.where(tl.load(shares_ptr) == tl.load(shares_ptr), given, share)
        share = tl.where((source < KEEP) | (rank == asked), share, float("-inf"))
    token = tl.where(bad, -1, token)
    share = tl.where(bad & (rank == 0), 0.0, share)
    out = row * KEEP + rank
    tl.store(token_ptr + out, token, mask=rank < KEEP)
    tl.store(share_ptr + out, share, mask=rank < KEEP)
