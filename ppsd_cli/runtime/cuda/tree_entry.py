"""What enters stage 0 in a tick that carries a level of a tree, chosen on the device.

With one depth the best children of the leaves enter. With two, ``tree_first_kernel`` finds these
first and prepares the second level of the draft head behind the best R of them, or behind a token
that is due; then the best of both enter, the first depth before the second
(``core.tree.best_of_two_depths``). Records are those of ``tree_control.py``.

``first`` [W, 2] int64: leaf (its row; -1 for a token that is due, -2 for none) and token, best
first, with path scores in ``first_score`` [W].

Shapes: n stages, W rows of a level, WP padded, R guesses with others behind them, RP padded,
P nodes of a path, K taps, L = K - 1, H hidden.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.control import leave_tap, normed
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.tree_choice import index_of, key_of, score_of


@triton.jit
def _best_children(
    token_ptr,
    share_ptr,
    score_ptr,
    mask,
    W: tl.constexpr,
    WP: tl.constexpr,
):
    """Leaf, token and path score of the W best children over the leaves in ``mask``, best first;
    leaf -1 where there are not so many. Ties go to the earlier leaf, then to the better guess.
    """
    i = tl.arange(0, WP)
    at = tl.arange(0, WP * WP)
    leaf = at // WP
    rank = at % WP
    ok = (leaf < W) & (rank < W) & ((mask >> leaf) & 1 > 0)
    share = tl.load(share_ptr + leaf * W + rank, mask=ok, other=float("-inf"))
    score = tl.load(score_ptr + leaf, mask=ok, other=0.0) + share
    keys = tl.where(score > float("-inf"), key_of(score, at), -9223372036854775807)
    best_keys = tl.full([WP], -9223372036854775807, dtype=tl.int64)
    for k in tl.static_range(W):
        best = tl.max(keys, axis=0)
        best_keys = tl.where(i == k, best, best_keys)
        keys = tl.where(keys == best, -9223372036854775807, keys)
    real = best_keys > -9223372036854775807
    chosen = tl.where(real, index_of(best_keys), 0)
    token = tl.load(token_ptr + (chosen // WP) * W + chosen % WP, mask=real, other=0)
    return tl.where(real, chosen // WP, -1), token, tl.where(real, score_of(best_keys), 0.0)


@triton.jit
def _open_leaves(
    nodes_ptr,
    lineage_ptr,
    alive,
    before,
    limit,
    W: tl.constexpr,
    WP: tl.constexpr,
    PATH: tl.constexpr,
):
    """Which live rows of level ``before``, as bits, have no child in it and room behind them."""
    i = tl.arange(0, WP)
    node = nodes_ptr + (before * W + i) * 6
    lives = (i < W) & ((alive >> i) & 1 > 0)
    number = tl.load(lineage_ptr + (before * W + i) * PATH, mask=i < W, other=0).to(tl.int64)
    parent = tl.load(node + 4, mask=lives, other=-1)
    children = tl.sum((parent[None, :] == number[:, None]).to(tl.int32), axis=1)
    position = tl.load(node + 1, mask=i < W, other=0)
    ok = lives & (children == 0) & (position + 1 < limit)
    return tl.sum(tl.where(ok, tl.full([WP], 1, tl.int64) << i, 0), axis=0)


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
    mask = _open_leaves(nodes_ptr, lineage_ptr, alive, before, limit, W, WP, PATH)
    leaf, token, score = _best_children(token_ptr, share_ptr, scores_ptr + before * W, mask, W, WP)
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


@triton.jit
def _best_of_two(
    first_ptr,
    first_score_ptr,
    token_ptr,
    share_ptr,
    place_ptr,
    due,
    limit,
    W: tl.constexpr,
    WP: tl.constexpr,
    R: tl.constexpr,
    ALL: tl.constexpr,
):
    """The W best of both depths, the first before the second, and a due token in any case.

    By row: whether there is one, leaf, the row of this level that it stands on (-1: first depth),
    row of the logits it comes from (-1 for a due token), token, path score. ``token_ptr``,
    ``share_ptr`` [R, W]: the second depth.
    """
    i = tl.arange(0, WP)
    at = tl.arange(0, ALL)
    behind = at - WP
    r = tl.maximum(behind, 0) // WP
    rank = tl.maximum(behind, 0) % WP
    is_first = (at < W) & (behind < 0)
    is_second = (behind >= 0) & (r < R) & (rank < W)
    source = tl.where(is_first, at, r)
    some = is_first | is_second
    there = tl.load(first_ptr + source * 2, mask=some, other=-2) > -2
    room = tl.load(place_ptr + r * 2, mask=is_second, other=0) + 1 < limit
    base = tl.load(first_score_ptr + source, mask=some & there, other=0.0)
    second_ok = is_second & there & room
    share = tl.load(share_ptr + r * W + rank, mask=second_ok, other=float("-inf"))
    score = tl.where(is_first, tl.where(due, float("inf"), base), base + share)
    ok = (is_first & there) | (second_ok & (share > float("-inf")))
    keys = tl.where(ok, key_of(score, at), -9223372036854775807)
    best_keys = tl.full([WP], -9223372036854775807, dtype=tl.int64)
    for k in tl.static_range(W):
        best = tl.max(keys, axis=0)
        best_keys = tl.where(i == k, best, best_keys)
        keys = tl.where(keys == best, -9223372036854775807, keys)
    real = best_keys > -9223372036854775807
    chosen = tl.where(real, index_of(best_keys), 0).to(tl.int32)
    late = (real & (chosen >= WP)).to(tl.int32)
    early = (real & (chosen < WP)).to(tl.int32)
    earlier = i[None, :] < i[:, None]
    among_late = tl.sum(tl.where(earlier, late[None, :], 0), axis=1)
    among_early = tl.sum(tl.where(earlier, early[None, :], 0), axis=1)
    target = tl.where(late > 0, tl.sum(early, axis=0) + among_late, among_early)
    moved = (target[None, :] == i[:, None]) & real[None, :]
    enters = tl.sum(moved.to(tl.int32), axis=1) > 0
    chosen = tl.sum(tl.where(moved, chosen[None, :], 0), axis=1)
    second = enters & (chosen >= WP)
    r = tl.where(second, (chosen - WP) // WP, 0)
    rank = tl.where(second, (chosen - WP) % WP, 0)
    source = tl.where(second, r, chosen)
    leaf = tl.load(first_ptr + source * 2, mask=enters, other=-2)
    token = tl.load(first_ptr + source * 2 + 1, mask=enters, other=0)
    late_token = tl.load(token_ptr + r * W + rank, mask=second, other=0)
    score = tl.load(first_score_ptr + source, mask=enters, other=0.0)
    score += tl.load(share_ptr + r * W + rank, mask=second, other=0.0)
    stands = tl.where(second, r, -1)
    logits = tl.where(second, W + r, leaf.to(tl.int32))
    return enters, leaf, stands, logits, tl.where(second, late_token, token), score


@triton.jit
def _of_row(values, row, i):
    """``values`` [WP] at ``row`` [WP]; 0 where that is negative."""
    return tl.sum(tl.where(row[:, None] == i[None, :], values[None, :], 0), axis=1)


@triton.jit
def tree_entry_kernel(
    board_ptr,
    tree_ptr,
    nodes_ptr,
    alive_ptr,
    scores_ptr,
    lineage_ptr,
    kin_ptr,
    owner_ptr,
    where_ptr,
    pool_ptr,
    ends_ptr,
    log_ptr,
    place_ptr,
    path_ptr,
    view_ptr,
    token_ptr,
    share_ptr,
    first_ptr,
    first_score_ptr,
    second_place_ptr,
    embedding_ptr,
    inputs_ptr,
    trash,
    STAGES: tl.constexpr,
    DEPTH: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    R: tl.constexpr,
    ALL: tl.constexpr,
    LAGS: tl.constexpr,
    POOL: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose what enters stage 0: the due token, the best guesses, both (two depths), or nothing.

    Program r embeds row r; program 0 keeps the records. What the others read, it does not change.
    ``token_ptr``, ``share_ptr``: of the leaves [W, W], or with two depths of the second [R, W].
    ``ALL``: at least WP + R * WP, a power of two.
    """
    wait_for_predecessor(PDL)
    PATH: tl.constexpr = STAGES * DEPTH
    pid = tl.program_id(0)
    tick = tl.load(board_ptr + 10)
    due = tl.load(tree_ptr + 2) > 0
    due_position = tl.load(board_ptr + 3)
    limit = tl.load(board_ptr + 7)
    before = tl.load(tree_ptr + 4)
    i = tl.arange(0, WP)
    if DEPTH > 1:
        enters, leaf, stands, logits, token, score = _best_of_two(
            first_ptr, first_score_ptr, token_ptr, share_ptr, second_place_ptr, due, limit,
            W, WP, R, ALL,
        )  # fmt: skip
        above = before * W + tl.maximum(leaf, 0)
        position = tl.load(nodes_ptr + above * 6 + 1, mask=enters, other=0) + 1
        position = tl.where(due, due_position, position) + (stands >= 0).to(tl.int64)
        enters = enters & (i < W)
    else:
        mask = tl.load(alive_ptr + before)
        leaf, token, score = _best_children(
            token_ptr, share_ptr, scores_ptr + before * W, mask, W, WP
        )
        position = tl.where(due, due_position, tl.load(nodes_ptr + before * W * 6 + 1) + 1) + i * 0
        drafts = (tl.load(board_ptr + 6) > 0) & (due == 0)
        enters = (due & (i == 0)) | (drafts & (leaf >= 0))
        enters = enters & (position < limit) & (i < W)
        token = tl.where(due, tl.load(board_ptr + 4), token)
        score = tl.where(due, 0.0, score)
        leaf = tl.where(due, -1, leaf)
        stands = i * 0 - 1
        logits = leaf
        above = before * W + tl.maximum(leaf, 0)
    token = tl.where(enters, token, 0)
    h = tl.arange(0, BH)
    mine = tl.sum(tl.where(i == pid, token, 0), axis=0)
    state = tl.load(embedding_ptr + tl.maximum(mine, 0) * H + h, mask=h < H)
    tl.store(inputs_ptr + pid * H + h, state, mask=h < H)
    if pid > 0:
        return
    serial = tl.load(board_ptr + 5)
    end = tl.load(tree_ptr)
    tip = tl.load(tree_ptr + 1)
    holes = tl.load(tree_ptr + 3)
    count = tl.sum(enters.to(tl.int64), axis=0)
    taken = tl.minimum(count, holes)
    slot = tl.load(pool_ptr + i, mask=enters & (i < holes), other=0)
    slot = tl.where(i < holes, slot, end + i - holes)
    here = tl.arange(0, POOL)
    left = tl.load(pool_ptr + here + taken, mask=here + taken < POOL, other=4611686018427387904)
    on_leaf = enters & (leaf >= 0)
    parent_serial = tl.load(nodes_ptr + above * 6 + 5, mask=on_leaf, other=-1)
    parent_number = tl.load(lineage_ptr + above * PATH, mask=on_leaf, other=0).to(tl.int64)
    number = (tick * 16 + i).to(tl.int32)
    inner = enters & (stands >= 0)
    parent_serial = tl.where(inner, serial + stands, parent_serial)
    parent_number = tl.where(inner, tick * 16 + stands, parent_number)
    tl.debug_barrier()  # every warp has read what changes now
    tl.store(pool_ptr + here, left)
    end = end + count - taken
    tl.store(tree_ptr, end)
    tl.store(ends_ptr + tick % 64, end)
    tl.store(tree_ptr + 3, holes - taken)
    tl.store(board_ptr, tick)
    tl.store(board_ptr + 2, tl.where(count > 0, 0, due.to(tl.int64)))
    tl.store(board_ptr + 5, serial + count)
    now = tick % 64
    bits = tl.where(enters, tl.full([WP], 1, tl.int64) << i, 0)
    tl.store(alive_ptr + now, tl.sum(bits, axis=0))
    node = nodes_ptr + (now * W + i) * 6
    ok = i < W
    tl.store(node, enters.to(tl.int64), mask=ok)
    tl.store(node + 1, tl.where(enters, position, 0), mask=ok)
    tl.store(node + 2, token, mask=ok)
    tl.store(node + 3, tl.where(enters, slot, trash), mask=ok)
    tl.store(node + 4, parent_number, mask=ok)
    tl.store(node + 5, serial + i, mask=ok)
    tl.store(scores_ptr + now * W + i, score, mask=ok)
    for j in tl.static_range(PATH):
        if j == 0:
            older = number
        else:
            older = tl.load(lineage_ptr + above * PATH + j - 1, mask=on_leaf, other=0)
            if DEPTH > 1:  # one more ancestor, of the same level
                if j == 1:
                    older = tl.where(inner, parent_number.to(tl.int32), older)
                else:
                    far = tl.load(lineage_ptr + above * PATH + j - 2, mask=on_leaf, other=0)
                    older = tl.where(inner, far, older)
        older = tl.where(enters, older, 0)
        tl.store(lineage_ptr + (now * W + i) * PATH + j, older, mask=ok)
        tl.store(path_ptr + i * PATH + j, older, mask=ok)
    behind_ptr = kin_ptr + tl.where(leaf >= 0, above, tip) * (LAGS + 1)
    for lag in tl.static_range(LAGS + 1):
        if lag == 0:
            behind = slot
        else:
            behind = tl.load(behind_ptr + lag - 1, mask=enters, other=-1)
            if DEPTH > 1:
                if lag == 1:
                    behind = tl.where(inner, _of_row(slot, stands, i), behind)
                else:
                    far = tl.load(behind_ptr + lag - 2, mask=enters, other=-1)
                    behind = tl.where(inner, far, behind)
        behind = tl.where(enters, behind, -1)
        tl.store(kin_ptr + (now * W + i) * (LAGS + 1) + lag, behind, mask=ok)
    tl.store(owner_ptr + slot, number, mask=enters)
    tl.store(where_ptr + slot, position.to(tl.int32), mask=enters)
    tl.store(place_ptr + i * 2, tl.where(enters, position, 0), mask=ok)
    tl.store(place_ptr + i * 2 + 1, tl.where(enters, slot, trash), mask=ok)
    tl.store(view_ptr, end)
    tl.store(view_ptr + 1, (tick - STAGES) * 16 + 15)
    row = log_ptr + now * (3 + 8 * W) + 3 + i * 8
    tl.store(row, enters.to(tl.int64), mask=ok)
    tl.store(row + 1, serial + i, mask=ok)
    tl.store(row + 2, position, mask=ok)
    tl.store(row + 3, token, mask=ok)
    tl.store(row + 4, slot, mask=ok)
    tl.store(row + 5, logits.to(tl.int64), mask=ok)
    tl.store(row + 6, parent_serial, mask=ok)
    if CLOCK:
        tl.store(log_ptr + now * (3 + 8 * W) + 2, tl.extra.cuda.globaltimer().to(tl.int64))


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
