"""One tick of a pipeline's part on one device, as a list of launches: what is between the stages.

Shapes: n stages, H hidden, K taps.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.board import Board
from ppsd_cli.runtime.cuda.control import boundary_kernel, entry_kernel
from ppsd_cli.runtime.cuda.lanes import HeadLane, StageLane
from ppsd_cli.runtime.cuda.launch import Launcher, rows_of
from ppsd_cli.runtime.cuda.march import Follower, March, inside, votes_of
from ppsd_cli.runtime.cuda.relay import Box, Push, follow_kernel, push_kernel
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two


class Pod(March):
    """Stages of one device and the control tensors between them.

    The pod with stage 0 decides, and has the draft head; see ``FollowerPod`` for others.
    """

    def __init__(
        self,
        launcher: Launcher,
        stages: list[Stage],
        head: DraftHead | None,
        *,
        first: int = 0,
        total: int | None = None,
    ) -> None:
        """``first``: number of this pod's first stage among the ``total`` of the pipeline."""
        one = stages[0]
        spec, n = one.spec, len(stages)
        self.launcher, self.hidden, self.first = launcher, spec.hidden, first
        self.total = n if total is None else total
        self.device = one.device
        if one.embedding is not None:
            self.embedding = rows_of(one.embedding)
        slots = one.slots - 1
        self.head = None if head is None else HeadLane(launcher, head, Shape.of(spec))
        lags = 0 if self.head is None else self.head.lags
        self.board = Board(stages=n, lags=lags, slots=slots, device=one.device)
        taps = () if head is None else head.taps
        self.tap_depths = tuple(tap.depth for tap in taps)
        kept = set(self.tap_depths).union(*(stage.tap_depths for stage in stages))
        here = [d for d in kept if any(inside(stage, d) for stage in stages)]
        depths = sorted({stage.part.last for stage in stages} | set(here))
        states = torch.zeros(len(depths), 1, spec.hidden, dtype=one.dtype, device=one.device)
        self.states = states
        self.inputs = torch.zeros(n, 1, spec.hidden, dtype=one.dtype, device=one.device)
        self.row = {depth: index for index, depth in enumerate(depths)}
        self.lanes = [
            StageLane(
                launcher,
                stage,
                source=self.inputs[s],
                states={d: states[self.row[d]] for d in depths if inside(stage, d)},
            )
            for s, stage in enumerate(stages)
        ]
        self.moves = [
            (self.row[stage.part.last], 0, s + 1, s, 0) for s, stage in enumerate(stages[:-1])
        ]
        for index, tap in enumerate(taps):
            owner = next((s for s, stage in enumerate(stages) if inside(stage, tap.depth)), None)
            if owner is not None:
                self.moves.append((self.row[tap.depth], 1, index, owner, 0))
        self.box = self.make_box(0)
        self.pushes: list[Push] = []
        self.chooser = self.lanes[-1].chooser
        self.early = 0 if head is None else 1  # more of them slow the head down more than they gain

    def make_box(self, rows: int, *, through_host: bool = False, returns: bool = False) -> Box:
        """A box for this device with room for so many states. ``returns``: of what followers
        return, at home.
        """
        del returns
        empty = (0, self.board.trash, 0)
        return Box.of(rows, like=self.states, empty=empty, through_host=through_host)

    def connect(self, box: Box, come: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Take rows of ``box`` at each boundary, as these further moves say."""
        self.box = box
        self.moves.extend(come)

    @cached_property
    def _move_table(self) -> Tensor:
        return torch.tensor(self.moves or [(0, 0, 0, 0, 0)], device=self.device)

    def _draft(self, sampling: Sampling) -> None:
        assert self.head is not None
        self.head.guess(self.board.head_place.view(-1, 1, 2), sampling, self.board.noise)

    @property
    def late(self) -> bool:
        """On one device."""
        return self.first == 0 and len(self.lanes) == self.total

    def _boundary(self, sampling: Sampling, *, first: bool) -> None:
        del sampling
        board, head = self.board, self.head
        norms = None if head is None else head.norms
        boundary_kernel[(1 + len(self.moves),)](
            board.board,
            board.ledger,
            board.log,
            board.place,
            board.head_place,
            board.left_place,
            self._move_table,
            self.states,
            self.box.states,
            self.inputs,
            self.states if head is None else head.rings,
            self.states if norms is None else norms,
            *((self.states,) * 3 if head is None else head.reads.pointers()),
            0.0 if head is None else head.eps,
            board.trash,
            LOCAL=board.stages,
            BOX=self.box.rows,
            LAGS=-1 if head is None else head.lags,
            STRIDE=0 if head is None else head.reads.stride,
            RING=1 if head is None else head.ring,
            H=self.hidden,
            BH=power_of_two(self.hidden),
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 8), first=first),
        )

    def _entry(self, sampling: Sampling, *, drafts: bool, first: bool = False) -> None:
        board = self.board
        chooser = self.head.chooser if drafts and self.head is not None else None
        scores, columns, tiles = self._votes(sampling)
        guesses = votes_of(chooser, sampling, nothing=self._nothing)
        ids = None if chooser is None else chooser.token_ids
        entry_kernel[(1,)](
            board.board,
            board.ledger,
            board.log,
            board.place,
            scores,
            columns,
            tiles,
            self.box.header,
            *guesses,
            ids if ids is not None else board.board,
            board.forced,
            self.embedding,
            self.inputs,
            board.trash,
            STAGES=self.total,
            LOCAL=board.stages,
            H=self.hidden,
            BH=power_of_two(self.hidden),
            BLOCK=block_of(tiles),
            GUESS_BLOCK=block_of(guesses[2]),
            HEAD=drafts,
            MAPPED=drafts and ids is not None,
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 8), first=first),
        )

    @property
    def _nothing(self) -> tuple[Tensor, Tensor]:
        """Stands for votes that nobody reads."""
        return self.states, self.board.board

    def _votes(self, sampling: Sampling) -> tuple[Tensor, Tensor, int]:
        return votes_of(self.chooser, sampling, nothing=self._nothing)

    def _push(self, sampling: Sampling, *, single: bool) -> bool:
        """Fill other devices' boxes. ``single``: behind one kernel; returned for what follows."""
        board = self.board
        for push in self.pushes:
            scores, columns, tiles = self._votes(sampling)
            push_kernel[(1 + len(push.rows),)](
                board.board,
                board.place[-1],
                push.rows,
                self.states,
                push.box.states,
                push.box.header,
                scores,
                columns,
                tiles,
                BOX=push.box.rows,
                H=self.hidden,
                BH=power_of_two(self.hidden),
                BLOCK=block_of(tiles),
                PLACE=push.place,
                TARGET=push.target,
                COUNT=self.first > 0,
                **self.launcher.flags(Tile(0, 0, 8), first=not single),
            )
            single = True
        return single

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """See ``Board.begin``."""
        self.board.begin(request, position=position, token=token, serial=serial)
        self.box.clear()

    def idle(self) -> None:
        """See ``Board.idle``."""
        self.board.idle()
        self.box.clear()

    def head_logits(self) -> Tensor:
        """The draft logits [V'] of the last tick that drafted."""
        assert self.head is not None
        return self.head.chooser.logits[0]


class FollowerPod(Follower, Pod):
    """Stages of a device without stage 0: it works on what comes, and decides nothing."""

    def _follow(self, *, first: bool) -> None:
        board = self.board
        follow_kernel[(1 + len(self.moves),)](
            board.board,
            board.place,
            self.box.header,
            self._move_table,
            self.states,
            self.box.states,
            self.inputs,
            STAGES=board.stages,
            PLACES=power_of_two(2 * board.stages),
            BOX=self.box.rows,
            H=self.hidden,
            BH=power_of_two(self.hidden),
            **self.launcher.flags(Tile(0, 0, 8), first=first),
        )

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """Nothing of an earlier answer is in flight; noise is the request's."""
        del position, token, serial
        self.idle()
        self.board.choose_noise(request.sampling)

    def idle(self) -> None:
        """Bubbles everywhere."""
        super().idle()
        self.board.place.zero_()
        self.board.place[:, :, 1].fill_(self.board.trash)


def block_of(tiles: int) -> int:
    """Votes that one step of an election reads."""
    return min(8192, power_of_two(tiles))
