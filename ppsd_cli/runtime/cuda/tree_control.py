"""The boundary and the entry of a tick that carries a level of a tree, decided on the device.

The rule is ``core.tree``'s, on arrays of fixed size. The nodes of a level entered in one tick; the
level of tick t - n leaves the last of n stages at tick t, and has at most one live node, the root.
If a live child of the root has the root's target as its token, it is the next root, and of each
later level those nodes stay live whose parent does; otherwise all die and the token is due. Slots
of dead nodes are free at once; nodes that enter take the lowest free ones. They stand on the newest
level with live nodes, the *leaves*, which need not be that of the last tick.

Records, by tick modulo TICKS: ``nodes`` [TICKS, W, 6] int64 (``NODE_FIELDS``); ``alive`` [TICKS]
int64, a bit for each row; ``scores`` [TICKS, W], log shares summed along the path; ``lineage``
[TICKS, W, n] int32, the numbers of a node and its ancestors (0: none); ``kin`` [TICKS, W, K] int64,
their slots (-1: none). The number of a node is 16 times its tick plus its row.
``pool`` [POOL] int64: free slots below the highest one used, lowest first, then NO_SLOT.
``tree`` [5] int64: ``TREE_FIELDS``. ``log`` [TICKS, 4 + 8 W] int64: ``HEAD_FIELDS``, then W times
``ROW_FIELDS``.

Shapes: n stages, W rows of a level, WP padded, K taps, L = K - 1, H hidden.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import elect
from ppsd_cli.runtime.cuda.control import leave_tap
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.relay import moved_row
from ppsd_cli.runtime.cuda.tree_choice import index_of, key_of, score_of

NODE_FIELDS = ("entered", "position", "token", "slot", "parent", "serial")
TREE_FIELDS = ("end", "tip", "due", "holes", "leaves")
HEAD_FIELDS = ("tick", "boundary_time", "entry_time", "drafted")
ROW_FIELDS = ("entered", "serial", "position", "token", "slot", "parent", "parent_serial", "target")
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
    row = tl.min(tl.where((mask >> i) & 1 > 0, i, WP - 1), axis=0)
    row = tl.minimum(row, W - 1)
    target = _target_of(row, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
    position = tl.load(nodes_ptr + (oldest * W + row) * 6 + 1)
    was_due = tl.load(board_ptr + 2)
    kept = tl.where(level == 0, mask, tl.zeros([LEVELS], dtype=tl.int64))
    deaths = 0
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
        heir = lives & (behind == 0) & (token == target)
        stays = tl.where(behind == 0, heir, (above >> (parent & 15)) & 1 > 0)
        dies = lives & (stays == 0) & live
        bits = tl.where(lives & (dies == 0), tl.full([WP], 1, tl.int64) << i, 0)
        alive = tl.sum(bits, axis=0)
        kept = tl.where(level == j, alive, kept)
        leaves = tl.where(alive != 0, at, leaves)
        slot = tl.load(node + 3, mask=dies, other=0)
        tl.store(owner_ptr + slot, tl.full([WP], 2147483647, tl.int32), mask=dies)
        gone = tl.where(dies, slot, 4611686018427387904)
        tl.store(pool_ptr + HOLES + (j - 1) * WP + i, gone)
        if LOCAL < STAGES:
            tl.store(freed_ptr + ((tick % 64) * (STAGES - 1) + j - 1) * WP + i, gone)
        deaths += tl.sum(dies.to(tl.int32), axis=0)
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
        tl.store(tree_ptr + 1, (oldest * W + row).to(tl.int64))
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
    LOCAL: tl.constexpr,
    MOVES: tl.constexpr,
    BOX: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    LEVELS: tl.constexpr,
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
    [m, W, 2], paths [m, W, n], views [m + 1, 2] for m = ``LOCAL`` (the last is the head's), and its
    ``head_place_ptr`` [2 + L, W, 2] and ``head_kin_ptr`` [W, K]. The next programs carry out moves
    as in ``control.boundary_kernel``, a row each, with rings by slot; the last W log each row's
    target. ``LOCAL``: stages on this device; if it lacks some, targets [W] come through the box,
    and slots of nodes that die are listed in ``freed_ptr`` [TICKS, n - 1, WP].
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr) + 1
    pid = tl.program_id(0)
    half = (tick + 1) % 2
    come_ptr = header_ptr + half * W
    if pid > MOVES * W:
        row = pid - MOVES * W - 1
        target = _target_of(row, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
        tl.store(log_ptr + (tick % 64) * (4 + 8 * W) + 4 + row * 8 + 7, target)
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
    log = log_ptr + (tick % 64) * (4 + 8 * W)
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
    i = tl.arange(0, WP)
    j = tl.arange(0, LEVELS)
    both = (i < W)[:, None] & (j < STAGES)[None, :]
    for s in tl.static_range(1, LOCAL):
        at = ((tick + 64 - s) % 64) * W + i
        node = nodes_ptr + at * 6
        there = tl.load(node, mask=i < W, other=0) > 0
        position = tl.load(node + 1, mask=there, other=0)
        slot = tl.load(node + 3, mask=there, other=0)
        place = place_ptr + (s * W + i) * 2
        tl.store(place, position, mask=i < W)
        tl.store(place + 1, tl.where(there, slot, trash), mask=i < W)
        path = tl.load(lineage_ptr + at[:, None] * STAGES + j[None, :], mask=both, other=0)
        tl.store(path_ptr + (s * W + i[:, None]) * STAGES + j[None, :], path, mask=both)
        tl.store(view_ptr + s * 2, end)
        tl.store(view_ptr + s * 2 + 1, horizon)
    at = leaves * W + i
    node = nodes_ptr + at * 6
    there = tl.load(node, mask=i < W, other=0) > 0
    position = tl.load(node + 1, mask=there, other=0)
    slot = tl.load(node + 3, mask=there, other=0)
    path = tl.load(lineage_ptr + at[:, None] * STAGES + j[None, :], mask=both, other=0)
    tl.store(head_path_ptr + i[:, None] * STAGES + j[None, :], path, mask=both)
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


@triton.jit
def _best_children(
    token_ptr,
    share_ptr,
    score_ptr,
    mask,
    W: tl.constexpr,
    WP: tl.constexpr,
):
    """Leaf, token and path score of the W best children over all live leaves, best first; leaf -1
    where there are not so many. Ties go to the earlier leaf, then to the better guess.
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
    embedding_ptr,
    inputs_ptr,
    trash,
    STAGES: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    LAGS: tl.constexpr,
    POOL: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose what enters stage 0: the due token, the best guesses, or nothing.

    Program r embeds row r; program 0 keeps the records. What the others read, it does not change.
    """
    wait_for_predecessor(PDL)
    r = tl.program_id(0)
    tick = tl.load(board_ptr + 10)
    due = tl.load(tree_ptr + 2) > 0
    before = tl.load(tree_ptr + 4)
    mask = tl.load(alive_ptr + before)
    leaf, token, score = _best_children(token_ptr, share_ptr, scores_ptr + before * W, mask, W, WP)
    i = tl.arange(0, WP)
    due_position = tl.load(board_ptr + 3)
    position = tl.where(due, due_position, tl.load(nodes_ptr + before * W * 6 + 1) + 1)
    drafts = (tl.load(board_ptr + 6) > 0) & (due == 0)
    enters = (due & (i == 0)) | (drafts & (leaf >= 0))
    enters = enters & (position < tl.load(board_ptr + 7)) & (i < W)
    token = tl.where(due, tl.load(board_ptr + 4), token)
    token = tl.where(enters, token, 0)
    h = tl.arange(0, BH)
    mine = tl.sum(tl.where(i == r, token, 0), axis=0)
    state = tl.load(embedding_ptr + tl.maximum(mine, 0) * H + h, mask=h < H)
    tl.store(inputs_ptr + r * H + h, state, mask=h < H)
    if r > 0:
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
    parent = tl.where(due, -1, leaf)
    above = before * W + tl.maximum(leaf, 0)
    stands_on = enters & (parent >= 0)
    parent_serial = tl.load(nodes_ptr + above * 6 + 5, mask=stands_on, other=-1)
    parent_number = tl.load(lineage_ptr + above * STAGES, mask=stands_on, other=0)
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
    tl.store(node + 4, parent_number.to(tl.int64), mask=ok)
    tl.store(node + 5, serial + i, mask=ok)
    tl.store(scores_ptr + now * W + i, tl.where(due, 0.0, score), mask=ok)
    number = (tick * 16 + i).to(tl.int32)
    for j in tl.static_range(STAGES):
        if j == 0:
            older = number
        else:
            older = tl.load(lineage_ptr + above * STAGES + j - 1, mask=stands_on, other=0)
        older = tl.where(enters, older, 0)
        tl.store(lineage_ptr + (now * W + i) * STAGES + j, older, mask=ok)
        tl.store(path_ptr + i * STAGES + j, older, mask=ok)
    stands = tl.where(due, tip, above)
    for lag in tl.static_range(LAGS + 1):
        if lag == 0:
            behind = slot
        else:
            behind = tl.load(kin_ptr + stands * (LAGS + 1) + lag - 1, mask=enters, other=-1)
        behind = tl.where(enters, behind, -1)
        tl.store(kin_ptr + (now * W + i) * (LAGS + 1) + lag, behind, mask=ok)
    tl.store(owner_ptr + slot, number, mask=enters)
    tl.store(where_ptr + slot, (position + i * 0).to(tl.int32), mask=enters)
    tl.store(place_ptr + i * 2, tl.where(enters, position, 0), mask=ok)
    tl.store(place_ptr + i * 2 + 1, tl.where(enters, slot, trash), mask=ok)
    tl.store(view_ptr, end)
    tl.store(view_ptr + 1, (tick - STAGES) * 16 + 15)
    log = log_ptr + now * (4 + 8 * W)
    tl.store(log + 3, drafts.to(tl.int64))
    row = log + 4 + i * 8
    tl.store(row, enters.to(tl.int64), mask=ok)
    tl.store(row + 1, serial + i, mask=ok)
    tl.store(row + 2, position + i * 0, mask=ok)
    tl.store(row + 3, token, mask=ok)
    tl.store(row + 4, slot, mask=ok)
    tl.store(row + 5, parent.to(tl.int64), mask=ok)
    tl.store(row + 6, parent_serial, mask=ok)
    if CLOCK:
        tl.store(log + 2, tl.extra.cuda.globaltimer().to(tl.int64))


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
