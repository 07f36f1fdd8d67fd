"""A burst (EESD) decided on the device: what enters row by row, and what the model answers.

The rule is ``core.tree``'s, applied to the rows of a burst in their order: a guess stands while it
equals the full model's token for its place; the first one that does not, or the place behind the
last row, is where the next burst begins. No kernel of its own decides that: the first row of the
next burst reads it off the log.

``log`` [TICKS, ROWS, 9] (int64), by burst modulo TICKS: see ``ROW_FIELDS``. Rows that did not enter
(near the end of the answer, or in an idle burst) carry the trash slot, and the position of the row
before them, so that positions never fall.

Shapes: ROWS of a burst, H hidden, K taps, L = K - 1 lags, W rows of the draft head's call.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import elect, elect_token
from ppsd_cli.runtime.cuda.control import leave_tap
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor

ROW_FIELDS = (
    "tick",
    "entered",
    "serial",
    "position",
    "token",
    "target",
    "begin_time",
    "entry_time",
    "done_time",
)


@triton.jit
def _due_token(board_ptr, log_ptr, tick, ROWS: tl.constexpr, R: tl.constexpr):
    """What the last burst left due: whether anything is, position, token id and serial number.

    The first burst of an answer takes that from the board.
    """
    r = tl.arange(0, R)
    row = log_ptr + (((tick + 64 - 1) % 64) * ROWS + r) * 9
    fed = tl.load(row + 1, mask=r < ROWS, other=0) > 0
    target = tl.load(row + 5, mask=r < ROWS, other=0)
    heir_fed = tl.load(row + 9 + 1, mask=r < ROWS - 1, other=0) > 0
    heir = tl.load(row + 9 + 4, mask=r < ROWS - 1, other=0)
    stands = fed & heir_fed & (heir == target)
    last = tl.min(tl.where(stands, ROWS, r), axis=0)
    place = tl.load(row + 3, mask=r < ROWS, other=0)
    serial = tl.load(row + 2, mask=r < ROWS, other=0)
    due = tl.sum(tl.where(r == 0, fed.to(tl.int64), 0), axis=0) > 0
    position = tl.sum(tl.where(r == last, place + 1, 0), axis=0)
    token = tl.sum(tl.where(r == last, target, 0), axis=0)
    serial = tl.sum(tl.where(r == 0, serial, 0) + fed.to(tl.int64), axis=0)
    begins = tick == 1
    due = tl.where(begins, tl.load(board_ptr + 2) > 0, due)
    position = tl.where(begins, tl.load(board_ptr + 3), position)
    token = tl.where(begins, tl.load(board_ptr + 4), token)
    serial = tl.where(begins, tl.load(board_ptr + 5), serial)
    return due, position, token, serial


@triton.jit
def burst_entry_kernel(
    board_ptr,
    log_ptr,
    place_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    id_ptr,
    forced_ptr,
    embedding_ptr,
    input_ptr,
    trash,
    row,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BLOCK: tl.constexpr,
    MAPPED: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row ``row`` enters stage 0: the due token (``FIRST``), or the head's guess behind the row
    before. Logs it, says where it belongs (``place_ptr`` [ROWS, 2]) and embeds it.
    """
    wait_for_predecessor(PDL)
    limit = tl.load(board_ptr + 7)
    if FIRST:
        tick = tl.load(board_ptr) + 1
        mine = log_ptr + (tick % 64) * ROWS * 9
        if CLOCK:
            tl.store(mine + 6, tl.extra.cuda.globaltimer().to(tl.int64))
        due, position, token, serial = _due_token(board_ptr, log_ptr, tick, ROWS, R)
        enters = due & (position < limit)
        lower = position * 0
        # Counted in ``tick_now``; ``tick`` follows when this kernel has read it in all its warps.
        tl.store(board_ptr + 10, tick)
    else:
        tick = tl.load(board_ptr + 10)
        mine = log_ptr + ((tick % 64) * ROWS + row) * 9
        before = mine - 9
        token = elect_token(vote_ptr, vote_id_ptr, tiles, id_ptr, BLOCK, MAPPED)
        position = tl.load(before + 3) + 1
        index = position - tl.load(board_ptr + 9)
        if (index >= 0) & (index < tl.load(board_ptr + 8)):
            token = tl.load(forced_ptr + index)
        enters = (tl.load(before + 1) > 0) & (position < limit)
        serial = tl.load(before + 2) + 1
        lower = tl.load(before + 3)
        tl.store(board_ptr, tick)
    position = tl.where(enters, position, lower)
    token = tl.where(enters, token, 0)
    tl.store(mine, tick)
    tl.store(mine + 1, enters.to(tl.int64))
    tl.store(mine + 2, serial)
    tl.store(mine + 3, position)
    tl.store(mine + 4, token)
    tl.store(place_ptr + row * 2, position)
    tl.store(place_ptr + row * 2 + 1, tl.where(enters, position, trash))
    h = tl.arange(0, BH)
    state = tl.load(embedding_ptr + tl.maximum(token, 0) * H + h, mask=h < H)
    tl.store(input_ptr + h, state, mask=h < H)
    if CLOCK:
        tl.store(mine + 7, tl.extra.cuda.globaltimer().to(tl.int64))


@triton.jit
def burst_gather_kernel(
    board_ptr,
    log_ptr,
    rings_ptr,
    states_ptr,
    source_ptr,
    norms_ptr,
    head_place_ptr,
    taps_ptr,
    own_ptr,
    beside_ptr,
    eps,
    trash,
    row,
    ROWS: tl.constexpr,
    W: tl.constexpr,
    LAGS: tl.constexpr,
    STRIDE: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tapped states for the head's call over the W positions that end at row ``row`` of the burst.

    Program (lag, w) takes the state at ``lag`` tokens before the w-th of them: out of the burst's
    own ``states_ptr`` [depths, ROWS, H], or out of the rings [K, RING + 1, H] where it is older;
    zeros before the start. Within the burst ``source_ptr`` [K] names the depth's row: that of the
    exit where a later stage has not yet made the tapped one. ``leave_tap`` says where it goes.
    ``head_place_ptr``
    [1 + K, W, 2]: position and slot of the rows themselves, then of each lag.
    """
    wait_for_predecessor(PDL)
    lag = tl.program_id(0)
    w = tl.program_id(1)
    tick = tl.load(board_ptr + 10)
    mine = log_ptr + ((tick % 64) * ROWS + row) * 9
    if CLOCK:
        if (lag == 0) & (w == 0):
            tl.store(mine + 8, tl.extra.cuda.globaltimer().to(tl.int64))
    there = tl.load(mine + 1) > 0
    position = tl.load(mine + 3) - (W - 1) + w
    behind = position - lag
    if lag == 0:
        own = head_place_ptr + w * 2
        tl.store(own, tl.maximum(position, 0))
        tl.store(own + 1, tl.where(there & (position >= 0), position, trash))
    place = head_place_ptr + ((1 + lag) * W + w) * 2
    tl.store(place, tl.maximum(behind, 0))
    slot = tl.where(there & (behind >= 0), behind, trash)
    tl.store(place + 1, tl.where(lag < LAGS, slot * 0 + w * LAGS + lag, slot))
    inner = row - (W - 1) + w - lag
    h = tl.arange(0, BH)
    inside = (h < H) & (behind >= 0)
    new = states_ptr + (tl.load(source_ptr + lag) * ROWS + tl.maximum(inner, 0)) * H
    old = rings_ptr + (lag * (RING + 1) + tl.maximum(behind, 0) % RING) * H
    new_state = tl.load(new + h, mask=inside & (inner >= 0), other=0.0)
    old_state = tl.load(old + h, mask=inside & (inner < 0), other=0.0)
    state = tl.where(inner >= 0, new_state, old_state)
    leave_tap(state, lag, w, norms_ptr, taps_ptr, own_ptr, beside_ptr, eps, W, LAGS, STRIDE, H, BH)


@triton.jit
def burst_answer_kernel(
    board_ptr,
    log_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    rings_ptr,
    states_ptr,
    depth_ptr,
    ROWS: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (0, r) logs the full model's token after row r.

    Program (1 + tap, r) puts row r's state of that tap, from the depth that ``depth_ptr`` [K] names
    in ``states_ptr`` [depths, ROWS, H], into its ring; rows that did not enter into its last place.
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr + 10)
    r = tl.program_id(1)
    mine = log_ptr + ((tick % 64) * ROWS + r) * 9
    if tl.program_id(0) == 0:
        target = elect(vote_ptr + r * tiles, vote_id_ptr + r * tiles, tiles, BLOCK)
        tl.store(mine + 5, target.to(tl.int64))
    else:
        tap = tl.program_id(0) - 1
        place = tl.where(tl.load(mine + 1) > 0, tl.load(mine + 3) % RING, RING)
        h = tl.arange(0, BH)
        source = states_ptr + (tl.load(depth_ptr + tap) * ROWS + r) * H
        state = tl.load(source + h, mask=h < H)
        tl.store(rings_ptr + (tap * (RING + 1) + place) * H + h, state, mask=h < H)
