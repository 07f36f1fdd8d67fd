"""What the draft head reads in a tick of a tree: states of a node's own ancestors, and for a second
depth the best guesses of the first.

Records are those of ``tree_control.py``; ``first`` is that of ``tree_best.py``.

Shapes: W rows of a level, WP padded, R guesses with others behind them, P nodes of a path, K taps,
L = K - 1, H hidden, S slots.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.control import leave_tap, normed
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.tree_best import best_children, open_leaves


@triton.jit
def tree_gather_kernel(
    rings_ptr,
    norms_ptr,
    kin_ptr,
    taps_ptr,
    own_ptr,
    beside_ptr,
    eps,
    W: tl.constexpr,
    LAGS: tl.constexpr,
    STRIDE: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tapped states of every leaf's own ancestors: program (lag, row) takes the state of tap
    ``lag``.

    ``rings_ptr`` [K, RING + 1, H] by slot; ``kin_ptr`` [W, K]. ``leave_tap`` says where it goes.
    """
    wait_for_predecessor(PDL)
    lag = tl.program_id(0)
    row = tl.program_id(1)
    slot = tl.load(kin_ptr + row * (LAGS + 1) + lag)
    h = tl.arange(0, BH)
    inside = (h < H) & (slot >= 0)
    source = rings_ptr + (lag * (RING + 1) + tl.maximum(slot, 0)) * H + h
    state = tl.load(source, mask=inside, other=0.0)
    leave_tap(
        state, lag, row, norms_ptr, taps_ptr, own_ptr, beside_ptr, eps, W, LAGS, STRIDE, H, BH
    )


@triton.jit
def tree_first_kernel(
    board_ptr,
    tree_ptr,
    nodes_ptr,
    alive_ptr,
    scores_ptr,
    lineage_ptr,
    kin_ptr,
    head_place_ptr,
    token_ptr,
    share_ptr,
    states_ptr,
    own_ptr,
    embedding_ptr,
    state_norm_ptr,
    token_norm_ptr,
    eps,
    first_ptr,
    first_score_ptr,
    before_ptr,
    pair_ptr,
    place_ptr,
    path_ptr,
    W: tl.constexpr,
    WP: tl.constexpr,
    R: tl.constexpr,
    PATH: tl.constexpr,
    PATHS: tl.constexpr,
    LAGS: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first depth, and what the second level reads behind the best R guesses of it.

    Program r < R prepares row r: the head's state before the guess in ``before_ptr`` [R, H], norms
    of it and of the guess's embedding beside each other in ``pair_ptr`` [R, 2 H], its position (and
    row) in ``place_ptr`` [R, 2], and the path that it sees in ``path_ptr`` [R, P]. The others keep
    the head's states of this tick, ``states_ptr`` [W, H], by slot in ``own_ptr`` [S, H].
    """
    wait_for_predecessor(PDL)
    pid = tl.program_id(0)
    h = tl.arange(0, BH)
    if pid >= R:
        row = pid - R
        slot = tl.load(head_place_ptr + row * 2 + 1)
        state = tl.load(states_ptr + row * H + h, mask=h < H)
        tl.store(own_ptr + slot * H + h, state, mask=h < H)
        return
    due = tl.load(tree_ptr + 2) > 0
    due_position = tl.load(board_ptr + 3)
    limit = tl.load(board_ptr + 7)
    before = tl.load(tree_ptr + 4)
    alive = tl.load(alive_ptr + before)
    mask = open_leaves(nodes_ptr, lineage_ptr, alive, before, limit, W, WP, PATH)
    leaf, token, score = best_children(token_ptr, share_ptr, scores_ptr + before * W, mask, W, WP)
    i = tl.arange(0, WP)
    drafts = tl.load(board_ptr + 6) > 0
    leaf = tl.where(drafts & (leaf >= 0), leaf, -2)
    root = (i == 0) & (due_position < limit)
    leaf = tl.where(due, tl.where(root, -1, -2), leaf)
    token = tl.where(due, tl.load(board_ptr + 4), token)
    score = tl.where(due, 0.0, score)
    if pid == 0:
        tl.store(first_ptr + i * 2, leaf.to(tl.int64), mask=i < W)
        tl.store(first_ptr + i * 2 + 1, token, mask=i < W)
        tl.store(first_score_ptr + i, score, mask=i < W)
    mine = tl.sum(tl.where(i == pid, leaf, 0), axis=0)
    guess = tl.sum(tl.where(i == pid, token, 0), axis=0)
    row = tl.maximum(mine, 0)
    stands = before * W + row
    position = tl.load(nodes_ptr + stands * 6 + 1) + 1
    position = tl.where(due, due_position, position)
    tl.store(place_ptr + pid * 2, tl.where(mine > -2, position, 0))
    tl.store(place_ptr + pid * 2 + 1, pid.to(tl.int64))
    j = tl.arange(0, PATHS)
    path = tl.load(lineage_ptr + stands * PATH + j, mask=(j < PATH) & (mine >= 0), other=0)
    tl.store(path_ptr + pid * PATH + j, path, mask=j < PATH)
    tip = tl.load(kin_ptr + tl.load(tree_ptr + 1) * (LAGS + 1))
    state = tl.load(states_ptr + row * H + h, mask=(h < H) & (due == 0), other=0.0)
    kept = tl.load(own_ptr + tl.maximum(tip, 0) * H + h, mask=(h < H) & due, other=0.0)
    state = tl.where(due, kept, state)
    said = tl.load(embedding_ptr + tl.maximum(guess, 0) * H + h, mask=h < H, other=0.0)
    tl.store(before_ptr + pid * H + h, state, mask=h < H)
    pair = pair_ptr + pid * 2 * H + h
    tl.store(pair, normed(state, state_norm_ptr, eps, H, BH), mask=h < H)
    tl.store(pair + H, normed(said, token_norm_ptr, eps, H, BH), mask=h < H)
