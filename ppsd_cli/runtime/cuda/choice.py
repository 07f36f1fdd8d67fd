"""The LM head with the choice of a token in it: logits, shared noise, and the largest of each tile.

The noise is that of ``core.choose.gumbel``: a hash of (seed, position, token id), so drafts and
targets share it and nothing is kept between ticks. Top-k, top-p and min-p need all logits at once;
where they are on, ``vote_kernel`` runs over scores that ``core.choose.restrict`` has cut.

Shapes: W rows, WP padded rows, K inputs, V columns (draft or full vocabulary), T tiles of BN.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.linear import products, store_time, wait_for_predecessor


@triton.jit
def _mix(x):
    """The finaliser of splitmix64 on uint64."""
    x = (x ^ (x >> 30)) * tl.full([1, 1], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([1, 1], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def gumbel_noise(seed, position, token_id):
    """Standard Gumbel noise of one (seed, position, token id), in float32."""
    golden = tl.full([1, 1], 0x9E3779B97F4A7C15, tl.uint64)
    row = _mix(_mix(position.to(tl.uint64) + seed.to(tl.uint64)) + golden)
    bits = _mix(row + token_id.to(tl.uint64) * golden)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * (1.0 / 4503599627370496.0)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _store_votes(scores, columns, ok, ws, W, tiles, vote_ptr, vote_id_ptr, WP: tl.constexpr):
    """The largest of ``scores`` [BN, WP] a row, lowest column on ties; id -1 where NaN occurs."""
    scores = tl.where(ok[:, None], scores, float("-inf"))
    bad = tl.max((scores != scores).to(tl.int32), axis=0) > 0
    scores = tl.where(scores != scores, float("inf"), scores)
    best = tl.max(scores, axis=0)
    column = tl.where(scores == best[None, :], columns[:, None], 2147483647)
    winner = tl.min(column, axis=0)
    at = ws * tiles + tl.program_id(0)
    tl.store(vote_ptr + at, tl.where(bad, float("inf"), best), mask=ws < W)
    tl.store(vote_id_ptr + at, tl.where(bad, -1, winner), mask=ws < W)


@triton.jit
def noise_of(place_ptr, seed_ptr, id_ptr, columns, ok, ws, W, MAPPED: tl.constexpr):
    """Noise [BN, WP] of the tokens that follow the rows' positions."""
    ids = columns.to(tl.int64)
    if MAPPED:
        ids = tl.load(id_ptr + columns, mask=ok, other=0)
    position = tl.load(place_ptr + ws * 2, mask=ws < W, other=0).to(tl.int64) + 1
    seed = tl.load(seed_ptr + tl.zeros([1, 1], dtype=tl.int32))
    return gumbel_noise(seed, position[None, :], ids[:, None])


@triton.jit
def output_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    id_ptr,
    place_ptr,
    seed_ptr,
    temperature_ptr,
    logits_ptr,
    vote_ptr,
    vote_id_ptr,
    stamp_ptr,
    board_ptr,
    W: tl.constexpr,
    eps,
    V,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    SAMPLE: tl.constexpr,
    MAPPED: tl.constexpr,
    STAMP: tl.constexpr,
    STAMPS: tl.constexpr,
    DOT: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits [W, V] in float32 of norm(x) [W, K], and each tile's best score with its column.

    ``SAMPLE``: scores are logits over the temperature plus the noise of ``id_ptr`` [V] (``MAPPED``:
    ids of the full vocabulary). ``vote_ptr``, ``vote_id_ptr`` [W, T].
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = columns < V
    sums, _, squares = products(
        x_ptr,
        norm_ptr,
        w_ptr,
        columns,
        columns,
        ok,
        W,
        K,
        BN,
        BK,
        WP,
        True,
        False,
        DOT,
        SLICES,
        PDL,
    )
    logits = sums * tl.rsqrt(squares / K + eps)[None, :]
    ws = tl.arange(0, WP)
    inside = ok[:, None] & (ws < W)[None, :]
    tl.store(logits_ptr + ws[None, :] * V + columns[:, None], logits, mask=inside)
    if SAMPLE:
        logits = logits / tl.load(temperature_ptr)
        logits += noise_of(place_ptr, seed_ptr, id_ptr, columns, ok, ws, W, MAPPED)
    _store_votes(logits, columns, ok, ws, W, tl.num_programs(0), vote_ptr, vote_id_ptr, WP)
    if STAMP:
        if tl.program_id(0) == 0:
            store_time(stamp_ptr, board_ptr, STAMPS)


@triton.jit
def vote_kernel(
    scores_ptr,
    id_ptr,
    place_ptr,
    seed_ptr,
    vote_ptr,
    vote_id_ptr,
    W,
    V,
    BN: tl.constexpr,
    WP: tl.constexpr,
    MAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Votes over scores [W, V] that top-k, top-p or min-p have cut: adds the noise."""
    wait_for_predecessor(PDL)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = columns < V
    ws = tl.arange(0, WP)
    inside = ok[:, None] & (ws < W)[None, :]
    scores = tl.load(
        scores_ptr + ws[None, :] * V + columns[:, None], mask=inside, other=float("-inf")
    )
    scores += noise_of(place_ptr, seed_ptr, id_ptr, columns, ok, ws, W, MAPPED)
    _store_votes(scores, columns, ok, ws, W, tl.num_programs(0), vote_ptr, vote_id_ptr, WP)


@triton.jit
def elect(vote_ptr, vote_id_ptr, tiles, BLOCK: tl.constexpr):
    """The column with the best score of one row's ``tiles`` votes; -1 where NaN occurred."""
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    winner = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(vote_ptr + at, mask=at < tiles, other=float("-inf"))
        column = tl.load(vote_id_ptr + at, mask=at < tiles, other=2147483647)
        better = (score > top) | ((score == top) & (column < winner))
        top = tl.where(better, score, top)
        winner = tl.where(better, column, winner)
    best = tl.max(top, axis=0)
    return tl.min(tl.where(top == best, winner, 2147483647), axis=0)


@triton.jit
def elect_token(vote_ptr, vote_id_ptr, tiles, id_ptr, BLOCK: tl.constexpr, MAPPED: tl.constexpr):
    """``elect`` as a token id of the full vocabulary, which ``id_ptr`` names where ``MAPPED``."""
    token = elect(vote_ptr, vote_id_ptr, tiles, BLOCK).to(tl.int64)
    if MAPPED:
        token = tl.where(token >= 0, tl.load(id_ptr + tl.maximum(token, 0)), token)
    return token
