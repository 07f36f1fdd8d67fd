"""One tick of a pipeline on one device, as a list of launches: boundary, entry, and the stages.

Shapes: n stages, H hidden, K taps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.board import Board
from ppsd_cli.runtime.cuda.control import boundary_kernel, entry_kernel
from ppsd_cli.runtime.cuda.lanes import HeadLane, StageLane, run_blocks
from ppsd_cli.runtime.cuda.launch import Launcher, rows_of
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two

Fork = Callable[[Sequence[Callable[[], None]]], None]
"""Runs branches at the same time, or one after the other, and waits for all."""


@dataclass(frozen=True, slots=True)
class TickKind:
    """What one tick is made of.

    ``active``: stages that work; all of them when drafting, one at a time in the naive split.
    ``drafts``: the draft head runs before the entry.
    """

    active: tuple[int, ...]
    drafts: bool


class Pod:
    """All stages on one device, their head, and the control tensors between them."""

    def __init__(self, launcher: Launcher, stages: list[Stage], head: DraftHead | None) -> None:
        first = stages[0]
        spec, n = first.spec, len(stages)
        assert first.embedding is not None
        self.launcher, self.hidden = launcher, spec.hidden
        self.embedding = rows_of(first.embedding)
        slots = first.slots - 1
        self.head = None if head is None else HeadLane(launcher, head, Shape.of(spec))
        lags = 0 if self.head is None else self.head.lags
        self.board = Board(stages=n, lags=lags, slots=slots, device=first.device)
        taps = () if head is None else head.taps
        self.tap_depths = tuple(tap.depth for tap in taps)
        depths = sorted({stage.part.last for stage in stages} | set(self.tap_depths))
        states = torch.zeros(len(depths), 1, spec.hidden, dtype=first.dtype, device=first.device)
        self._states = states
        self.inputs = torch.zeros(n, 1, spec.hidden, dtype=first.dtype, device=first.device)
        row = {depth: index for index, depth in enumerate(depths)}
        self.lanes = [
            StageLane(
                launcher,
                stage,
                source=self.inputs[s],
                states={d: states[row[d]] for d in depths if inside(stage, d)},
            )
            for s, stage in enumerate(stages)
        ]
        moves = [(row[stage.part.last], 0, s + 1, s) for s, stage in enumerate(stages[:-1])]
        for index, tap in enumerate(taps):
            owner = next(s for s, stage in enumerate(stages) if inside(stage, tap.depth))
            moves.append((row[tap.depth], 1, index, owner))
        self._moves = torch.tensor(moves or [(0, 0, 0, 0)], device=first.device)
        self._move_count = len(moves)
        self.chooser = self.lanes[-1].chooser
        self._early = 0 if head is None else len(head.weights.blocks) + 1

    def stretch(self, kinds: Sequence[TickKind], sampling: Sampling, fork: Fork) -> None:
        """Launch ticks one after the other."""
        follows = False
        for kind in kinds:
            follows = self._tick(kind, sampling, fork, follows=follows)

    def _tick(self, kind: TickKind, sampling: Sampling, fork: Fork, *, follows: bool) -> bool:
        """Launch one tick. ``follows``: directly behind a single kernel. Returns whether it ends
        with one.

        While the head drafts, the other stages get ahead by some layers; then all stages go in
        step, the same layer number in one launch, so that the GPU sees one row of kernels.
        """
        self._boundary(sampling, first=not follows)
        others = [s for s in kind.active if s > 0]
        ahead = 0
        if kind.drafts and others:
            ahead = min(self._early, *(len(self.lanes[s]) - 1 for s in others))

        def front() -> None:
            if kind.drafts:
                assert self.head is not None
                self.head.run(self.board.head_place, sampling, self.board.noise)
            self._entry(sampling, drafts=kind.drafts)

        if ahead:
            fork([front, lambda: self._steps(dict.fromkeys(others, 0), ahead)])
        else:
            front()
        starts = {s: 0 if s == 0 else ahead for s in kind.active}
        return self._together(starts, sampling, fork, alone=not ahead and 0 in kind.active)

    def _together(
        self, starts: dict[int, int], sampling: Sampling, fork: Fork, *, alone: bool
    ) -> bool:
        """All active stages from layer ``starts`` on, and the LM head as soon as it can run.

        ``alone``: the first kernel follows the entry kernel directly. Returns whether the last
        kernel runs alone.
        """
        last = len(self.lanes) - 1
        longest = max(len(self.lanes[s]) - at for s, at in starts.items())
        if last not in starts:
            self._steps(starts, longest, first=not alone)
            return True
        before = len(self.lanes[last]) - starts[last]
        self._steps(starts, before, first=not alone)
        rest = {s: at + before for s, at in starts.items() if at + before < len(self.lanes[s])}
        if not rest:
            self._output(sampling, first=False)
            return True
        fork(
            [
                lambda: self._steps(rest, longest - before),
                lambda: self._output(sampling, first=True),
            ]
        )
        return False

    def _steps(self, starts: dict[int, int], count: int, *, first: bool = True) -> None:
        """``count`` layers of each of these stages, as far as they have so many."""
        board = self.board
        for step in range(count):
            calls = [
                self.lanes[s].call(at + step, board.place[s], board.stamp(s))
                for s, at in starts.items()
                if at + step < len(self.lanes[s])
            ]
            lane = self.lanes[next(iter(starts))]
            run_blocks(
                self.launcher,
                calls,
                lane.shape,
                lane.stage.tables,
                first=first and step == 0,
                placed=step > 0,
            )

    def _output(self, sampling: Sampling, *, first: bool) -> None:
        board, last = self.board, len(self.lanes) - 1
        assert self.chooser is not None
        self.chooser.run(
            self.lanes[-1].result,
            board.place[last],
            sampling,
            board.noise,
            stamp=board.stamp(last),
            first=first,
        )

    def _boundary(self, sampling: Sampling, *, first: bool) -> None:
        board, head = self.board, self.head
        assert self.chooser is not None
        votes = self.chooser.votes(sampling)
        boundary_kernel[(1 + self._move_count,)](
            board.board,
            board.ledger,
            board.log,
            board.place,
            board.head_place,
            votes.scores,
            votes.columns,
            votes.tiles,
            self._moves,
            self._states,
            self.inputs,
            self._states if head is None else head.rings,
            board.trash,
            STAGES=board.stages,
            LAGS=-1 if head is None else head.lags,
            RING=1 if head is None else head.ring,
            H=self.hidden,
            BH=power_of_two(self.hidden),
            BLOCK=block_of(votes.tiles),
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 8), first=first),
        )

    def _entry(self, sampling: Sampling, *, drafts: bool) -> None:
        board = self.board
        chooser = self.head.chooser if drafts and self.head is not None else self.chooser
        assert chooser is not None
        votes, ids = chooser.votes(sampling), chooser.token_ids
        entry_kernel[(1,)](
            board.board,
            board.ledger,
            board.log,
            board.place,
            votes.scores,
            votes.columns,
            votes.tiles,
            ids if ids is not None else board.board,
            board.forced,
            self.embedding,
            self.inputs,
            board.trash,
            H=self.hidden,
            BH=power_of_two(self.hidden),
            BLOCK=block_of(votes.tiles),
            HEAD=drafts,
            MAPPED=drafts and ids is not None,
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 8), first=False),
        )

    def head_logits(self) -> Tensor:
        """The draft logits [V'] of the last tick that drafted."""
        assert self.head is not None
        return self.head.chooser.logits[0]


def inside(stage: Stage, depth: int) -> bool:
    return stage.part.first < depth <= stage.part.last


def block_of(tiles: int) -> int:
    return min(8192, power_of_two(tiles))
