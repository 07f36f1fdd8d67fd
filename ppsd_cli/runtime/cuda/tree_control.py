"""The boundary and the entry of a tick that carries a level of a tree, decided on the device.

The rule is ``core.tree``'s, on arrays of fixed size. The nodes of a level entered in one tick; the
level of tick t - n leaves the last of n stages at tick t, and its first live node is the root. If a
live child of the root has the root's target as its token, it is the next root, and of each later
level those nodes stay live whose parent does; otherwise all die and the token is due. With two
depths a tick (``DEPTH`` 2) the next root may be of the same level; then its target is here, too,
and the rule applies again. Slots of dead nodes are free at once; nodes that enter take the lowest
free ones. They stand on the newest level with live nodes, that of the *leaves*, which need not be
that of the last tick.

Records, by tick modulo TICKS: ``nodes`` [TICKS, W, 6] int64 (``NODE_FIELDS``); ``alive`` [TICKS]
int64, a bit for each row; ``scores`` [TICKS, W], log shares summed along the path; ``lineage``
[TICKS, W, P] int32, the numbers of a node and its ancestors (0: none); ``kin`` [TICKS, W, K] int64,
their slots (-1: none). The number of a node is 16 times its tick plus its row.
``pool`` [POOL] int64: free slots below the highest one used, lowest first, then NO_SLOT.
``tree`` [5] int64: ``TREE_FIELDS``. ``log`` [TICKS, 3 + 8 W] int64: ``HEAD_FIELDS``, then W times
``ROW_FIELDS``, of which ``logits`` is the row of the draft logits (those of the second depth behind
those of the first), -1 for a token that was due.

Shapes: n stages, W rows of a level, WP padded, P = n * DEPTH nodes of a path, K taps, L = K - 1,
H hidden, F = n - 1 (one depth) or n (two) levels in which nodes may die.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import elect
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.relay import moved_row

NODE_FIELDS = ("entered", "position", "token", "slot", "parent", "serial")
TREE_FIELDS = ("end", "tip", "due", "holes", "leaves")
HEAD_FIELDS = ("tick", "boundary_time", "entry_time")
ROW_FIELDS = ("entered", "serial", "position", "token", "slot", "logits", "parent_serial", "target")
NO_SLOT = 2**62
FREE = 2**31 - 1
PROMPT = -(2**31)


@triton.jit
def _target_of(
    row, vote_ptr, vote_id_ptr, tiles, come_ptr, AWAY: tl.constexpr, BLOCK: tl.constexpr
):
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
    """Free the slots of nodes that die, listing them at ``ROOM`` of the pool and, with ``TOLD``, of
    ``freed_ptr``. Returns their number.
    """
    slot = tl.load(slot_ptr, mask=dies, other=0)
    tl.store(owner_ptr + slot, slot.to(tl.int32) * 0 + 2147483647, mask=dies)
    gone = tl.where(dies, slot, 4611686018427387904)
    tl.store(pool_ptr + i, gone)
    if TOLD:
        tl.store(freed_ptr + ROOM + i, gone)
    return tl.sum(dies.to(tl.int32), axis=0)


@triton.jit
def _settle(
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
    target = _target_of(root, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
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
            pool_ptr + HOLES + (STAGES - 1) * WP,
            freed_ptr,
            i,
            (STAGES - 1) * WP,
            LOCAL < STAGES,
        )
        if second < WP:
            root = second
            target = _target_of(root, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
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
            pool_ptr + HOLES + (j - 1) * WP,
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


@triton.jit
def tree_boundary_kernel(
    board_ptr,
    tree_ptr,
    nodes_ptr,
    alive_ptr,
    lineage_ptr,
    kin_ptr,
    owner_ptr,
    pool_ptr,
    freed_ptr,
    log_ptr,
    place_ptr,
    path_ptr,
    view_ptr,
    head_place_ptr,
    head_path_ptr,
    head_kin_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    move_ptr,
    states_ptr,
    box_ptr,
    header_ptr,
    inputs_ptr,
    rings_ptr,
    trash,
    STAGES: tl.constexpr,
    DEPTH: tl.constexpr,
    LOCAL: tl.constexpr,
    MOVES: tl.constexpr,
    BOX: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    LEVELS: tl.constexpr,
    PATHS: tl.constexpr,
    LAGS: tl.constexpr,
    HOLES: tl.constexpr,
    POOL: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BLOCK: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take in what the stages finished in the last tick, and decide.

    Program 0 applies the rule and says what the rows of stages 1 and on and of the head are: places
    [m, W, 2], paths [m, W, P], views [m + 1, 2] for m = ``LOCAL`` (the last is the head's), and its
    ``head_place_ptr`` [2 + L, W, 2] and ``head_kin_ptr`` [W, K]. The next programs carry out moves
    as in ``control.boundary_kernel``, a row each, with rings by slot; the last W log each row's
    target. ``LOCAL``: stages on this device; if it lacks some, targets [W] come through the box,
    and slots of nodes that die are listed in ``freed_ptr`` [TICKS, F, WP]. ``PATHS``: P, padded.
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr) + 1
    pid = tl.program_id(0)
    half = (tick + 1) % 2
    come_ptr = header_ptr + half * W
    if pid > MOVES * W:
        row = pid - MOVES * W - 1
        target = _target_of(row, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
        tl.store(log_ptr + (tick % 64) * (3 + 8 * W) + 3 + row * 8 + 7, target)
        return
    if pid > 0:
        move = move_ptr + ((pid - 1) // W) * 5
        row = (pid - 1) % W
        where = tl.load(move + 2)
        left = (tick + 64 - 1 - tl.load(move + 3)) % 64
        node = nodes_ptr + (left * W + row) * 6
        h = tl.arange(0, BH)
        state = moved_row(states_ptr, box_ptr, move, half, row, h, W, BOX, H)
        if tl.load(move + 1) == 0:
            tl.store(inputs_ptr + (where * W + row) * H + h, state, mask=h < H)
        else:
            place = tl.where(tl.load(node) > 0, tl.load(node + 3), RING)
            tl.store(rings_ptr + (where * (RING + 1) + place) * H + h, state, mask=h < H)
        return
    # The tick is counted by the entry kernel, after all programs here have read it.
    tl.store(board_ptr + 10, tick)
    log = log_ptr + (tick % 64) * (3 + 8 * W)
    tl.store(log, tick)
    if CLOCK:
        tl.store(log + 1, tl.extra.cuda.globaltimer().to(tl.int64))
    leaves = _settle(
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
        STAGES,
        DEPTH,
        LOCAL,
        W,
        WP,
        LEVELS,
        HOLES,
        POOL,
        BLOCK,
    )
    end = tl.load(tree_ptr)
    horizon = (tick - STAGES) * 16 + 15
    PATH: tl.constexpr = STAGES * DEPTH
    i = tl.arange(0, WP)
    j = tl.arange(0, PATHS)
    both = (i < W)[:, None] & (j < PATH)[None, :]
    for s in tl.static_range(1, LOCAL):
        at = ((tick + 64 - s) % 64) * W + i
        node = nodes_ptr + at * 6
        there = tl.load(node, mask=i < W, other=0) > 0
        position = tl.load(node + 1, mask=there, other=0)
        slot = tl.load(node + 3, mask=there, other=0)
        place = place_ptr + (s * W + i) * 2
        tl.store(place, position, mask=i < W)
        tl.store(place + 1, tl.where(there, slot, trash), mask=i < W)
        path = tl.load(lineage_ptr + at[:, None] * PATH + j[None, :], mask=both, other=0)
        tl.store(path_ptr + (s * W + i[:, None]) * PATH + j[None, :], path, mask=both)
        tl.store(view_ptr + s * 2, end)
        tl.store(view_ptr + s * 2 + 1, horizon)
    at = leaves * W + i
    node = nodes_ptr + at * 6
    there = tl.load(node, mask=i < W, other=0) > 0
    position = tl.load(node + 1, mask=there, other=0)
    slot = tl.load(node + 3, mask=there, other=0)
    path = tl.load(lineage_ptr + at[:, None] * PATH + j[None, :], mask=both, other=0)
    tl.store(head_path_ptr + i[:, None] * PATH + j[None, :], path, mask=both)
    tl.store(head_place_ptr + i * 2, position, mask=i < W)
    tl.store(head_place_ptr + i * 2 + 1, tl.where(there, slot, trash), mask=i < W)
    for lag in tl.static_range(0, LAGS + 1):
        behind = tl.load(kin_ptr + at * (LAGS + 1) + lag, mask=i < W, other=-1)
        tl.store(head_kin_ptr + i * (LAGS + 1) + lag, behind, mask=i < W)
        mine = head_place_ptr + ((1 + lag) * W + i) * 2
        tl.store(mine, tl.maximum(position - lag, 0), mask=i < W)
        if lag < LAGS:
            near = (i * LAGS + lag).to(tl.int64)
        else:
            near = tl.where(there & (behind >= 0), behind, trash)
        tl.store(mine + 1, near, mask=i < W)
    tl.store(view_ptr + LOCAL * 2, end)
    tl.store(view_ptr + LOCAL * 2 + 1, horizon)
