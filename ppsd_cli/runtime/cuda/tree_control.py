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

from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.relay import moved_row
from ppsd_cli.runtime.cuda.tree_settle import settle, target_of

NODE_FIELDS = ("entered", "position", "token", "slot", "parent", "serial")
TREE_FIELDS = ("end", "tip", "due", "holes", "leaves")
HEAD_FIELDS = ("tick", "boundary_time", "entry_time")
ROW_FIELDS = ("entered", "serial", "position", "token", "slot", "logits", "parent_serial", "target")
NO_SLOT = 2**62
FREE = 2**31 - 1
PROMPT = -(2**31)


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
        target = target_of(row, vote_ptr, vote_id_ptr, tiles, come_ptr, LOCAL < STAGES, BLOCK)
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
    leaves = settle(
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
