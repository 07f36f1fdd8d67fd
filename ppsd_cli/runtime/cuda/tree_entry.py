"""What enters stage 0 in a tick that carries a level of a tree, chosen on the device.

With one depth the best children of the leaves enter. With two, ``tree_first_kernel`` has found
these first, and the head has gone on behind the best R of them, or behind a token that is due; the
best of both enter. Records are those of ``tree_control.py``; ``first`` is that of ``tree_best.py``.

Shapes: n stages, W rows of a level, WP padded, R guesses with others behind them, P nodes of a
path, K taps, L = K - 1, H hidden.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.tree_best import best_children, best_of_two


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
        enters, leaf, stands, logits, token, score = best_of_two(
            first_ptr, first_score_ptr, token_ptr, share_ptr, second_place_ptr, due, limit,
            W, WP, R, ALL,
        )  # fmt: skip
        above = before * W + tl.maximum(leaf, 0)
        position = tl.load(nodes_ptr + above * 6 + 1, mask=enters, other=0) + 1
        position = tl.where(due, due_position, position) + (stands >= 0).to(tl.int64)
        enters = enters & (i < W)
    else:
        mask = tl.load(alive_ptr + before)
        leaf, token, score = best_children(
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
