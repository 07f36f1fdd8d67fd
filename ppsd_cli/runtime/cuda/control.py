"""The boundary and the entry of a tick, decided on the device.

At the boundary states and places go on by one stage, which needs no decision. So on one device the
LM head of the last stage may run behind it, beside the draft head: the full model's token is taken
in by the entry.

The rule is ``core.tree``'s: the full model's token is final; if stage 0 had fed the same one the
nodes behind it stay, otherwise they are void and the token is due. Here it is stated for a ledger
of the last ticks: the node that leaves the last of n stages at tick t was fed at tick t - n, its
successor at t - n + 1. A flush raises the epoch, which makes every node of an older one void.

All records are int64. ``board``: see the constants. ``ledger`` [TICKS, 5], by tick modulo TICKS:
whether a token entered, its epoch, position, token id and serial. ``log`` [TICKS, 12]: what the
host needs of a tick. Bubbles carry position 0 and the trash slot, which nothing ever sees.

Shapes: n stages, H hidden, T tiles of votes, V' draft vocabulary, L last lag of the draft head.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.choice import elect, elect_token
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor
from ppsd_cli.runtime.cuda.relay import moved

TICKS = 64
BOARD_FIELDS = (
    "tick",
    "epoch",
    "due",
    "due_position",
    "due_token",
    "serial",
    "drafting",
    "feed_limit",
    "forced",
    "prompt_tokens",
    "tick_now",
)
LEDGER_FIELDS = ("entered", "epoch", "position", "token", "serial")
LOG_FIELDS = (
    "tick",
    "arrived",
    "serial",
    "target",
    "live",
    "entered",
    "entered_serial",
    "position",
    "token",
    "drafted",
    "boundary_time",
    "entry_time",
)


@triton.jit
def boundary_kernel(
    board_ptr,
    ledger_ptr,
    log_ptr,
    place_ptr,
    head_place_ptr,
    left_place_ptr,
    move_ptr,
    states_ptr,
    box_ptr,
    inputs_ptr,
    rings_ptr,
    norms_ptr,
    taps_ptr,
    own_ptr,
    beside_ptr,
    eps,
    trash,
    LOCAL: tl.constexpr,
    BOX: tl.constexpr,
    LAGS: tl.constexpr,
    STRIDE: tl.constexpr,
    RING: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Hand on what the stages finished in the last tick.

    Program 0 says where each stage's and the head's rows belong, and the row that has left the
    last stage of this device (``left_place`` [1, 2]). Program i
    carries out move i - 1: (row, kind, where, stage, whether the row lies in the box), from
    ``states`` or box [rows, H] to the input of stage ``where`` (kind 0) or to ring ``where`` (kind
    1) of [taps, RING + 1, H], at the position of the node that left ``stage``; the last place of a
    ring is for bubbles. Then it reads from the ring what the head needs: the state of tap i at lag
    i of the newest node, zeros before the start. ``LOCAL``: stages on this device.
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr)
    if tl.program_id(0) > 0:
        tick += 1
        move = move_ptr + (tl.program_id(0) - 1) * 5
        kind = tl.load(move + 1)
        where = tl.load(move + 2)
        left = ledger_ptr + ((tick + 64 - 1 - tl.load(move + 3)) % 64) * 5
        h = tl.arange(0, BH)
        state = moved(states_ptr, box_ptr, move, (tick + 1) % 2, h, BOX, H)
        if kind == 0:
            tl.store(inputs_ptr + where * H + h, state, mask=h < H)
        else:
            at = tl.where(tl.load(left) > 0, tl.load(left + 2), -1)
            ring = rings_ptr + where * (RING + 1) * H + h
            tl.store(ring + tl.where(at >= 0, at % RING, RING) * H, state, mask=h < H)
            newest = ledger_ptr + ((tick + 64 - 1) % 64) * 5
            wanted = tl.where(tl.load(newest) > 0, tl.load(newest + 2), 0) - where
            older = (h < H) & (wanted >= 0) & (wanted != at)
            kept = tl.load(ring + (tl.maximum(wanted, 0) % RING) * H, mask=older, other=0.0)
            state = tl.where((wanted >= 0) & (wanted == at), state, kept)
            leave_tap(
                state, where, 0, norms_ptr, taps_ptr, own_ptr, beside_ptr, eps,
                1, LAGS, STRIDE, H, BH,
            )  # fmt: skip
        return
    # The tick is counted by the entry kernel, after all programs here have read it.
    tick += 1
    tl.store(board_ptr + 10, tick)
    if CLOCK:
        log = log_ptr + (tick % 64) * 12
        tl.store(log + 10, tl.extra.cuda.globaltimer().to(tl.int64))
    out = ledger_ptr + ((tick + 64 - LOCAL) % 64) * 5
    tl.store(left_place_ptr, tl.load(out + 2))
    tl.store(left_place_ptr + 1, tl.where(tl.load(out) > 0, tl.load(out + 2), trash))
    for s in tl.static_range(1, LOCAL):
        inside = ledger_ptr + ((tick + 64 - s) % 64) * 5
        there = tl.load(inside) > 0
        position = tl.where(there, tl.load(inside + 2), 0)
        tl.store(place_ptr + s * 2, position)
        tl.store(place_ptr + s * 2 + 1, tl.where(there, position, trash))
    if LAGS >= 0:
        newest = ledger_ptr + ((tick + 64 - 1) % 64) * 5
        there = tl.load(newest) > 0
        position = tl.where(there, tl.load(newest + 2), 0)
        tl.store(head_place_ptr, position)
        tl.store(head_place_ptr + 1, tl.where(there, position, trash))
        for lag in tl.static_range(0, LAGS + 1):
            row = head_place_ptr + (1 + lag) * 2
            behind = position - lag
            tl.store(row, tl.maximum(behind, 0))
            slot = tl.where(there & (behind >= 0), behind, trash)
            if lag < LAGS:
                slot = slot * 0 + lag
            tl.store(row + 1, slot)


@triton.jit
def entry_kernel(
    board_ptr,
    ledger_ptr,
    log_ptr,
    place_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    header_ptr,
    guess_ptr,
    guess_id_ptr,
    guess_tiles,
    id_ptr,
    forced_ptr,
    embedding_ptr,
    inputs_ptr,
    trash,
    STAGES: tl.constexpr,
    LOCAL: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BLOCK: tl.constexpr,
    GUESS_BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    MAPPED: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Take in the full model's token and apply the rule; choose what enters stage 0: the due token,
    the head's guess, or nothing; and embed it.

    The full model's token is elected by ``vote_ptr``; where the last stage is on another device
    (``LOCAL`` < ``STAGES``) it comes through the box. ``guess_ptr``: the draft head's votes.
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr) + 1
    epoch = tl.load(board_ptr + 1)
    node = ledger_ptr + ((tick + 64 - STAGES) % 64) * 5
    arrived = tl.load(node)
    live = (arrived > 0) & (tl.load(node + 1) == epoch)
    if LOCAL < STAGES:
        target = tl.load(header_ptr + ((tick + 1) % 2) * 3 + 2, volatile=True)
    else:
        target = elect(vote_ptr, vote_id_ptr, tiles, BLOCK).to(tl.int64)
    accepted = False
    if STAGES > 1:
        heir = ledger_ptr + ((tick + 64 - STAGES + 1) % 64) * 5
        fed = (tl.load(heir) > 0) & (tl.load(heir + 1) == epoch)
        accepted = live & fed & (tl.load(heir + 3) == target)
    flush = live & (accepted == 0)
    epoch += flush.to(tl.int64)
    due = flush | (tl.load(board_ptr + 2) > 0)
    newest = ledger_ptr + ((tick + 64 - 1) % 64) * 5
    position = tl.where(flush, tl.load(node + 2) + 1, tl.load(board_ptr + 3))
    token = tl.where(flush, target, tl.load(board_ptr + 4))
    due_position, due_token = position, token
    enters = due
    if HEAD:
        guess = elect_token(guess_ptr, guess_id_ptr, guess_tiles, id_ptr, GUESS_BLOCK, MAPPED)
        alive = (tl.load(newest) > 0) & (tl.load(newest + 1) == epoch)
        drafts = alive & (tl.load(board_ptr + 6) > 0) & (due == 0)
        guessed_at = tl.load(newest + 2) + 1
        index = guessed_at - tl.load(board_ptr + 9)
        if drafts & (index >= 0) & (index < tl.load(board_ptr + 8)):
            guess = tl.load(forced_ptr + index)
        position = tl.where(due, position, guessed_at)
        token = tl.where(due, token, guess)
        enters = due | drafts
    enters = enters & (position < tl.load(board_ptr + 7))
    drafted = enters & (due == 0)
    serial = tl.load(board_ptr + 5)
    left_serial = tl.load(node + 4)
    tl.debug_barrier()  # every warp has read the board before it changes
    position = tl.where(enters, position, 0)
    token = tl.where(enters, token, 0)
    mine = ledger_ptr + (tick % 64) * 5
    tl.store(mine, enters.to(tl.int64))
    tl.store(mine + 1, epoch)
    tl.store(mine + 2, position)
    tl.store(mine + 3, token)
    tl.store(mine + 4, serial)
    log = log_ptr + (tick % 64) * 12
    tl.store(log, tick)
    tl.store(log + 1, arrived)
    tl.store(log + 2, left_serial)
    tl.store(log + 3, target)
    tl.store(log + 4, live.to(tl.int64))
    tl.store(log + 5, enters.to(tl.int64))
    tl.store(log + 6, serial)
    tl.store(log + 7, position)
    tl.store(log + 8, token)
    tl.store(log + 9, drafted.to(tl.int64))
    tl.store(place_ptr, position)
    tl.store(place_ptr + 1, tl.where(enters, position, trash))
    tl.store(board_ptr, tick)
    tl.store(board_ptr + 1, epoch)
    tl.store(board_ptr + 2, tl.where(enters, 0, due.to(tl.int64)))
    tl.store(board_ptr + 3, due_position)
    tl.store(board_ptr + 4, due_token)
    tl.store(board_ptr + 5, serial + enters.to(tl.int64))
    h = tl.arange(0, BH)
    row = tl.maximum(token, 0)
    state = tl.load(embedding_ptr + row * H + h, mask=h < H)
    tl.store(inputs_ptr + h, state, mask=h < H)
    if CLOCK:
        tl.store(log + 11, tl.extra.cuda.globaltimer().to(tl.int64))


@triton.jit
def normed(state, norm_ptr, eps, H: tl.constexpr, BH: tl.constexpr):
    """A state [BH], zero behind H, under a root-mean-square norm of weight ``norm_ptr`` [H]."""
    h = tl.arange(0, BH)
    wide = state.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / H + eps)
    gain = tl.load(norm_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    return (wide * gain).to(state.dtype)


@triton.jit
def leave_tap(
    state,
    lag,
    row,
    norms_ptr,
    taps_ptr,
    own_ptr,
    beside_ptr,
    eps,
    W: tl.constexpr,
    LAGS: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
):
    """Put the state [BH] of tap ``lag`` where the head reads it for ``row``; see ``lanes.Reads``.

    ``norms_ptr`` [K, H]: weights of root-mean-square norms, where there is more than one tap.
    """
    h = tl.arange(0, BH)
    if LAGS > 0:
        level = normed(state, norms_ptr + lag * H, eps, H, BH)
        if lag > 0:
            tl.store(beside_ptr + row * STRIDE + (lag - 1) * H + h, level, mask=h < H)
            state = level
        else:
            tl.store(own_ptr + row * H + h, level, mask=h < H)
    tl.store(taps_ptr + (lag * W + row) * H + h, state, mask=h < H)
