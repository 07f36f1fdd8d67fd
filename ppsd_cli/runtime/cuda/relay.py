"""What goes from device to device at a boundary: states, places, and the full model's token.

Each device has a letter box in its own memory (or in pinned host memory, where devices cannot
write to each other). At the end of its tick t a device pushes into the boxes of others, at the
half t % 2; at the start of tick t + 1 the owner reads that half. A device starts a tick only when
those that push to it or read from it have ended the tick before (``crew.py``), so one half is never
read and written at a time.

Followers are devices without stage 0: they decide nothing, but keep the places of their stages'
nodes, which travel with the states. A bubble carries position 0 and the trash slot.

Shapes: n local stages, B rows of a box, H hidden, E numbers of a header. ``header`` int64 [2, E]:
position, slot, target. (Trees have others: ``tree_relay.py``.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppsd_cli.runtime.cuda.choice import elect
from ppsd_cli.runtime.cuda.linear import wait_for_predecessor


@dataclass(frozen=True, slots=True)
class Box:
    """A letter box: states [2, B, H] and header [2, E], both halves of it.

    ``empty`` [E]: the header of a bubble.
    """

    states: Tensor
    header: Tensor
    empty: Tensor

    @classmethod
    def of(
        cls, rows: int, *, like: Tensor, empty: Sequence[int], through_host: bool = False
    ) -> "Box":
        """Room for ``rows`` states in the format and on the device of ``like`` [..., H]."""
        device = torch.device("cpu") if through_host else like.device
        states = torch.zeros(2, max(rows, 1), like.shape[-1], dtype=like.dtype, device=device)
        header = torch.zeros(2, len(empty), dtype=torch.int64, device=device)
        if through_host and torch.cuda.is_available():
            states, header = states.pin_memory(), header.pin_memory()
        box = cls(states, header, torch.tensor(empty, dtype=torch.int64, device=device))
        box.clear()
        return box

    @property
    def rows(self) -> int:
        """B."""
        return self.states.shape[1]

    def clear(self) -> None:
        """Nothing has come: the owner's next node is a bubble.

        In host memory this happens at once, so nothing may be in flight.
        """
        self.header.copy_(self.empty.expand_as(self.header))


@dataclass(frozen=True, slots=True)
class Push:
    """What a device puts into the box of another one after each tick.

    ``rows`` [P, 2]: of the states, and of the box. ``place``: the place of the node that leaves
    goes along. ``target``: the full model's token.
    """

    box: Box
    rows: Tensor
    place: bool
    target: bool


@triton.jit
def follow_kernel(
    board_ptr,
    place_ptr,
    header_ptr,
    move_ptr,
    states_ptr,
    box_ptr,
    inputs_ptr,
    STAGES: tl.constexpr,
    PLACES: tl.constexpr,
    BOX: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The boundary of a follower.

    Program 0 hands the places on by one stage; the first stage's comes from the box. Program i
    carries out move i - 1 of ``control.boundary_kernel``'s kind 0: into the input of a stage.
    ``PLACES``: numbers of ``place_ptr`` [n, 2], padded.
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr) + 1
    half = (tick + 1) % 2
    if tl.program_id(0) > 0:
        move = move_ptr + (tl.program_id(0) - 1) * 5
        h = tl.arange(0, BH)
        state = moved(states_ptr, box_ptr, move, half, h, BOX, H)
        tl.store(inputs_ptr + tl.load(move + 2) * H + h, state, mask=h < H)
        return
    tl.store(board_ptr + 10, tick)
    index = tl.arange(0, PLACES)
    inside = index < 2 * STAGES
    before = tl.load(place_ptr + index - 2, mask=inside & (index >= 2), other=0)
    come = tl.load(header_ptr + half * 3 + index, mask=index < 2, other=0, volatile=True)
    tl.debug_barrier()  # every warp has read the places before they change
    tl.store(place_ptr + index, tl.where(index < 2, come, before), mask=inside)


@triton.jit
def moved(states_ptr, box_ptr, move, half, h, BOX: tl.constexpr, H: tl.constexpr):
    """The state [BH] that a move takes: (row, kind, where, stage, whether it lies in the box)."""
    source = tl.load(move)
    boxed = tl.load(move + 4) > 0
    own = tl.load(states_ptr + source * H + h, mask=(h < H) & (boxed == 0), other=0.0)
    post = tl.load(
        box_ptr + (half * BOX + source) * H + h, mask=(h < H) & boxed, other=0.0, volatile=True
    )
    return tl.where(boxed, post, own)


@triton.jit
def moved_row(
    states_ptr,
    box_ptr,
    move,
    half,
    row,
    h,
    W: tl.constexpr,
    BOX: tl.constexpr,
    H: tl.constexpr,
):
    """The state [BH] of a row that a move takes: as ``moved``, with W rows of each state."""
    source = tl.load(move) * W + row
    boxed = tl.load(move + 4) > 0
    own = tl.load(states_ptr + source * H + h, mask=(h < H) & (boxed == 0), other=0.0)
    at = box_ptr + (half * BOX + source) * H + h
    post = tl.load(at, mask=(h < H) & boxed, other=0.0, volatile=True)
    return tl.where(boxed, post, own)


@triton.jit
def push_kernel(
    board_ptr,
    place_ptr,
    row_ptr,
    states_ptr,
    box_ptr,
    header_ptr,
    vote_ptr,
    vote_id_ptr,
    tiles,
    BOX: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACE: tl.constexpr,
    TARGET: tl.constexpr,
    COUNT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Put what this tick made into another device's box.

    Program 0 writes the header: the ``PLACE`` of the node that leaves, or the ``TARGET`` that the
    votes elect; with ``COUNT`` it also counts the tick of a follower. Program i copies row
    ``row_ptr`` [rows, 2] = (of states, of the box).
    """
    wait_for_predecessor(PDL)
    tick = tl.load(board_ptr + 10)
    half = tick % 2
    if tl.program_id(0) > 0:
        row = row_ptr + (tl.program_id(0) - 1) * 2
        h = tl.arange(0, BH)
        state = tl.load(states_ptr + tl.load(row) * H + h, mask=h < H)
        tl.store(box_ptr + (half * BOX + tl.load(row + 1)) * H + h, state, mask=h < H)
        return
    header = header_ptr + half * 3
    if PLACE:
        tl.store(header, tl.load(place_ptr))
        tl.store(header + 1, tl.load(place_ptr + 1))
    if TARGET:
        tl.store(header + 2, elect(vote_ptr, vote_id_ptr, tiles, BLOCK).to(tl.int64))
    if COUNT:
        tl.store(board_ptr, tick)


@triton.jit
def _poke_kernel(out_ptr, value):
    tl.store(out_ptr, value)


def poke(tensor: Tensor, value: int) -> None:
    """Write from a kernel on the current device, whose memory ``tensor`` need not be in."""
    _poke_kernel[(1,)](tensor, value)
