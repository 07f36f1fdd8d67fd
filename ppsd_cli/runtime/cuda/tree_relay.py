"""What goes from device to device when ticks carry levels of trees; see ``relay.py`` for the boxes.

A *letter* is the header of a level on its way through the devices: all that a follower must know of
it, as it was on the home device when the level entered. Followers keep an account of slots of their
own and bring it up to date when a letter arrives: first slots that lost their nodes before that
level entered, then those that the level took. So a follower's account is the home device's of some
ticks ago, and what was said there of stages that work on levels of different ages holds here too:
whatever entered after a row is newer than its path.

Shapes: n stages, W rows of a level, WP padded, P nodes of a path, F levels in which nodes may die
(see ``level_shape.py``), H hidden, B states of a box.
``letter`` int64 [E]: end of the slots in use, horizon, W places (position, slot), W paths [P]
(numbers, the row's own first; 0: none), then F * WP freed slots or NO_SLOT.
A box's header at home holds W targets.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import elect
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.relay import moved_row


@triton.jit
def _take_letter(
    letter_ptr,
    place_ptr,
    path_ptr,
    PATH: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PATHS: tl.constexpr,
):
    """Places [W, 2] and paths [W, P] of a letter for a stage's rows."""
    i = tl.arange(0, WP)
    j = tl.arange(0, PATHS)
    both = (i < W)[:, None] & (j < PATH)[None, :]
    at = letter_ptr + 2 + i * 2
    tl.store(place_ptr + i * 2, tl.load(at, mask=i < W, other=0, volatile=True), mask=i < W)
    slot = tl.load(at + 1, mask=i < W, other=0, volatile=True)
    tl.store(place_ptr + i * 2 + 1, slot, mask=i < W)
    paths = i[:, None] * PATH + j[None, :]
    path = tl.load(letter_ptr + 2 + 2 * W + paths, mask=both, other=0, volatile=True)
    tl.store(path_ptr + paths, path.to(tl.int32), mask=both)


@triton.jit
def tree_follow_kernel(
    board_ptr,
    letters_ptr,
    place_ptr,
    path_ptr,
    view_ptr,
    owner_ptr,
    where_ptr,
    header_ptr,
    move_ptr,
    states_ptr,
    box_ptr,
    inputs_ptr,
    LOCAL: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PATH: tl.constexpr,
    PATHS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    FREED: tl.constexpr,
    FREEDP: tl.constexpr,
    BOX: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The boundary of a follower.

    Program 0 keeps the letter that came in ``letters_ptr`` [TICKS, E], brings the account of slots
    up to date, and says what the rows of each of the ``LOCAL`` stages are. The others carry out
    moves as in ``relay.follow_kernel``, a row each.
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr) + 1
    half = (tick + 1) % 2
    pid = tl.program_id(0)
    if pid > 0:
        move = move_ptr + ((pid - 1) // W) * 5
        row = (pid - 1) % W
        h = tl.arange(0, BH)
        state = moved_row(states_ptr, box_ptr, move, half, row, h, W, BOX, H)
        tl.store(inputs_ptr + (tl.load(move + 2) * W + row) * H + h, state, mask=h < H)
        return
    tl.store(board_ptr + 10, tick)
    letter = header_ptr + half * SIZE
    here = tl.arange(0, PADDED)
    whole = tl.load(letter + here, mask=here < SIZE, other=0, volatile=True)
    tl.store(letters_ptr + (tick % 64) * SIZE + here, whole, mask=here < SIZE)
    f = tl.arange(0, FREEDP)
    listed = f < FREED
    freed = tl.load(
        letter + 2 + W * (2 + PATH) + f, mask=listed, other=4611686018427387904, volatile=True
    )
    gone = listed & (freed < 4611686018427387904)
    slots = tl.where(gone, freed, 0)
    tl.store(owner_ptr + slots, tl.full([FREEDP], 2147483647, tl.int32), mask=gone)
    tl.debug_barrier()  # a slot may have been taken again at once
    i = tl.arange(0, WP)
    number = tl.load(letter + 2 + 2 * W + i * PATH, mask=i < W, other=0, volatile=True)
    entered = (i < W) & (number > 0)
    position = tl.load(letter + 2 + i * 2, mask=entered, other=0, volatile=True)
    slot = tl.load(letter + 3 + i * 2, mask=entered, other=0, volatile=True)
    tl.store(owner_ptr + slot, number.to(tl.int32), mask=entered)
    tl.store(where_ptr + slot, position.to(tl.int32), mask=entered)
    end = tl.load(letter, volatile=True)
    horizon = tl.load(letter + 1, volatile=True)
    for s in tl.static_range(LOCAL):
        source = letter
        if s > 0:
            source = letters_ptr + ((tick + 64 - s) % 64) * SIZE
        place = place_ptr + s * W * 2
        _take_letter(source, place, path_ptr + s * W * PATH, PATH, W, WP, PATHS)
        tl.store(view_ptr + s * 2, end)
        tl.store(view_ptr + s * 2 + 1, horizon)


@triton.jit
def _write_letter(
    letter,
    nodes_ptr,
    lineage_ptr,
    freed_ptr,
    ends_ptr,
    tick,
    STAGES: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PATH: tl.constexpr,
    PATHS: tl.constexpr,
    FREED: tl.constexpr,
    FREEDP: tl.constexpr,
):
    """The letter of the level that entered at ``tick``, from the home device's records."""
    now = (tick + 64) % 64
    tl.store(letter, tl.load(ends_ptr + now))
    tl.store(letter + 1, (tick - STAGES) * 16 + 15)
    i = tl.arange(0, WP)
    j = tl.arange(0, PATHS)
    node = nodes_ptr + (now * W + i) * 6
    tl.store(letter + 2 + i * 2, tl.load(node + 1, mask=i < W, other=0), mask=i < W)
    tl.store(letter + 3 + i * 2, tl.load(node + 3, mask=i < W, other=0), mask=i < W)
    both = (i < W)[:, None] & (j < PATH)[None, :]
    paths = i[:, None] * PATH + j[None, :]
    path = tl.load(lineage_ptr + now * W * PATH + paths, mask=both, other=0)
    tl.store(letter + 2 + 2 * W + paths, path.to(tl.int64), mask=both)
    f = tl.arange(0, FREEDP)
    listed = f < FREED
    freed = tl.load(freed_ptr + now * FREED + f, mask=listed, other=0)
    tl.store(letter + 2 + W * (2 + PATH) + f, freed, mask=listed)


@triton.jit
def tree_push_kernel(
    board_ptr,
    nodes_ptr,
    lineage_ptr,
    freed_ptr,
    ends_ptr,
    letters_ptr,
    row_ptr,
    states_ptr,
    box_ptr,
    header_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    rows,
    STAGES: tl.constexpr,
    LOCAL: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    PATH: tl.constexpr,
    PATHS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADER: tl.constexpr,
    PADDED: tl.constexpr,
    FREED: tl.constexpr,
    FREEDP: tl.constexpr,
    BOX: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACE: tl.constexpr,
    TARGET: tl.constexpr,
    HOME: tl.constexpr,
    PDL: tl.constexpr,
):
    """Put what this tick made into another device's box, whose header has ``HEADER`` numbers.

    Program 0: with ``PLACE`` the letter of the level that leaves this device, at ``HOME`` from the
    records, else as it came; it also counts a follower's tick. Then ``rows`` programs for each row:
    states, as in ``relay.push_kernel``. With ``TARGET`` further programs elect the targets [W].
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr + 10)
    half = tick % 2
    header = header_ptr + half * HEADER
    pid = tl.program_id(0)
    if TARGET:
        if pid > rows * W:
            row = pid - rows * W - 1
            target = elect(vote_ptr + row * tiles, vote_id_ptr + row * tiles, tiles, BLOCK)
            tl.store(header + row, target.to(tl.int64))
            return
    if pid > 0:
        pair = row_ptr + ((pid - 1) // W) * 2
        row = (pid - 1) % W
        h = tl.arange(0, BH)
        state = tl.load(states_ptr + (tl.load(pair) * W + row) * H + h, mask=h < H)
        tl.store(box_ptr + (half * BOX + tl.load(pair + 1) * W + row) * H + h, state, mask=h < H)
        return
    if PLACE:
        left = tick - LOCAL + 1
        if HOME:
            _write_letter(
                header, nodes_ptr, lineage_ptr, freed_ptr, ends_ptr, left,
                STAGES, W, WP, PATH, PATHS, FREED, FREEDP,
            )  # fmt: skip
        else:
            here = tl.arange(0, PADDED)
            kept = letters_ptr + ((left + 64) % 64) * SIZE + here
            letter = tl.load(kept, mask=here < SIZE, other=0)
            tl.store(header + here, letter, mask=here < SIZE)
    if HOME == 0:
        tl.store(board_ptr, tick)
