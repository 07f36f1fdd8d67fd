"""The accept rule of a tree on the device: what stays live, what dies, which token is due.

Records are those of ``tree_control.py``. Shapes: n stages, W rows of a level, WP padded.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import elect


@triton.jit
def target_of(row, vote_ptr, vote_id_ptr, tiles, come_ptr, AWAY: tl.constexpr, BLOCK: tl.constexpr):
    """The full model's token after a row: elected here, or on the device of the last stage."""
    if AWAY:
        target = tl.load(come_ptr + row, volatile=True)
    else:
        target = elect(vote_ptr + row * tiles, vote_id_ptr + row * tiles, tiles, BLOCK)
    return target.to(tl.int64)


@triton.jit
def _bury(
    dies,
    slot_ptr,
    owner_ptr,
    pool_ptr,
    freed_ptr,
    i,
    ROOM: tl.constexpr,
    TOLD: tl.constexpr,
):
    """Free the slots of nodes that die, listing them at ``ROOM`` of ``pool_ptr`` and, with
    ``TOLD``, of ``freed_ptr``. Returns their number.
    """
    slot = tl.load(slot_ptr, mask=dies, other=0)
    tl.store(owner_ptr + slot, slot.to(tl.int32) * 0 + 2147483647, mask=dies)
    gone = tl.where(dies, slot, 4611686018427387904)
    tl.store(pool_ptr + ROOM + i, gone)
    if TOLD:
        tl.store(freed_ptr + ROOM + i, gone)
    return tl.sum(dies.to(tl.int32), axis=0)


@triton.jit
def settle(
    board_ptr,
    tree_ptr,
    nodes_ptr,
    alive_ptr,
    owner_ptr,
    pool_ptr,
    freed_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    come_ptr,
    tick,
    STAGES: tl.constexpr,
    DEPTH: tl.constexpr,
    LOCAL: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    LEVELS: tl.constexpr,
    HOLES: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply the rule to the level that has left the last stage. Returns the leaves' level."""
    i = tl.arange(0, WP)
    level = tl.arange(0, LEVELS)
    oldest = (tick + 64 - STAGES) % 64
    mask = tl.load(alive_ptr + oldest)
    live = mask != 0
    root = tl.min(tl.where((mask >> i) & 1 > 0, i, WP - 1), axis=0)
    root = tl.minimum(root, W - 1)
    target = target_of(root, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
    freed_ptr += (tick % 64) * ((STAGES + DEPTH - 2) * WP)
    deaths = 0
    if DEPTH > 1:
        node = nodes_ptr + (oldest * W + i) * 6
        lives = ((mask >> i) & 1 > 0) & (i < W)
        token = tl.load(node + 2, mask=i < W, other=-1)
        parent = tl.load(node + 4, mask=i < W, other=0)
        right = lives & (parent == (tick - STAGES) * 16 + root) & (token == target)
        second = tl.min(tl.where(right, i, WP), axis=0)
        dies = lives & (i != root) & (i != second)
        deaths += _bury(
            dies,
            node + 3,
            owner_ptr,
            pool_ptr + HOLES,
            freed_ptr,
            i,
            (STAGES - 1) * WP,
            LOCAL < STAGES,
        )
        if second < WP:
            root = second
            target = target_of(root, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
    position = tl.load(nodes_ptr + (oldest * W + root) * 6 + 1)
    was_due = tl.load(board_ptr + 2)
    kept = tl.where(level == 0, mask, tl.zeros([LEVELS], dtype=tl.int64))
    heirs = 0
    leaves = (tick + 64 - 1) % 64
    for j in tl.static_range(1, STAGES):
        at = (oldest + j) % 64
        node = nodes_ptr + (at * W + i) * 6
        old = tl.load(alive_ptr + at)
        lives = ((old >> i) & 1 > 0) & (i < W)
        token = tl.load(node + 2, mask=i < W, other=-1)
        parent = tl.load(node + 4, mask=i < W, other=0)
        behind = (parent >> 4) - (tick - STAGES)
        above = tl.sum(tl.where(behind[:, None] == level[None, :], kept[None, :], 0), axis=1)
        heir = lives & (behind == 0) & ((parent & 15) == root) & (token == target)
        stays = tl.where(behind == 0, heir, (above >> (parent & 15)) & 1 > 0)
        if DEPTH > 1:  # a parent of the same level stays or dies first
            first = tl.where(lives & stays & (behind != j), tl.full([WP], 1, tl.int64) << i, 0)
            first = tl.sum(first, axis=0)
            stays = tl.where(behind == j, (first >> (parent & 15)) & 1 > 0, stays)
        dies = lives & (stays == 0) & live
        bits = tl.where(lives & (dies == 0), tl.full([WP], 1, tl.int64) << i, 0)
        alive = tl.sum(bits, axis=0)
        kept = tl.where(level == j, alive, kept)
        leaves = tl.where(alive != 0, at, leaves)
        deaths += _bury(
            dies,
            node + 3,
            owner_ptr,
            pool_ptr + HOLES,
            freed_ptr,
            i,
            (j - 1) * WP,
            LOCAL < STAGES,
        )
        heirs += tl.sum(heir.to(tl.int32), axis=0)
    tl.debug_barrier()  # every warp has read what changes now
    at = (oldest + level) % 64
    kept = tl.where(level == 0, 0, kept)
    tl.store(alive_ptr + at, kept, mask=(level < STAGES) & live)
    tl.store(tree_ptr + 4, leaves)
    flush = live & (heirs == 0)
    if flush:
        tl.store(board_ptr + 2, 1)
        tl.store(board_ptr + 3, position + 1)
        tl.store(board_ptr + 4, target)
        tl.store(tree_ptr + 1, (oldest * W + root).to(tl.int64))
    tl.store(tree_ptr + 2, tl.where(flush, 1, was_due))
    if deaths > 0:
        _sort_pool(tree_ptr, pool_ptr, POOL)
    return leaves


@triton.jit
def _sort_pool(tree_ptr, pool_ptr, POOL: tl.constexpr):
    """Free slots in order, and how many there are."""
    here = tl.arange(0, POOL)
    slots = tl.load(pool_ptr + here)
    place = tl.zeros([POOL], dtype=tl.int32)
    for start in range(0, POOL, 16):
        others = start + tl.arange(0, 16)
        other = tl.load(pool_ptr + others)
        before = other[None, :] < slots[:, None]
        level = (other[None, :] == slots[:, None]) & (others[None, :] < here[:, None])
        place += tl.sum((before | level).to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(pool_ptr + place, slots)
    real = tl.sum((slots < 4611686018427387904).to(tl.int64), axis=0)
    tl.store(tree_ptr + 3, real)
