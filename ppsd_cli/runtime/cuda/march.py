"""The order of one tick's launches on one device: boundary, draft and entry, stages in step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.board import Board
from ppsd_cli.runtime.cuda.lanes import BlockCall, Chooser, HeadLane, StageLane, run_blocks
from ppsd_cli.runtime.cuda.launch import Launcher

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


class March:
    """Ticks of the stages of one device; what is decided between them is a subclass's matter.

    ``early``: layers that the other stages get ahead while the head drafts.
    """

    @property
    def late(self) -> bool:
        """Whether the LM head runs at the start of the next tick, beside the draft head, in place
        of the end of this one.
        """
        return False

    launcher: Launcher
    lanes: list[StageLane]
    head: HeadLane | None
    chooser: Chooser | None
    board: Board
    early: int

    def _boundary(self, sampling: Sampling, *, first: bool) -> None:
        """Take in what the stages finished in the last tick, and decide."""
        raise NotImplementedError

    def _draft(self, sampling: Sampling) -> None:
        """Run the draft head."""
        raise NotImplementedError

    def _entry(self, sampling: Sampling, *, drafts: bool, first: bool = False) -> None:
        """Choose what enters stage 0, and embed it. ``first``: see ``Launcher.flags``."""
        raise NotImplementedError

    def _push(self, sampling: Sampling, *, single: bool) -> bool:
        """Give other devices what this tick made. ``single``: behind one kernel; returned for what
        follows. There are none unless a subclass says so.
        """
        del sampling
        return single

    def _call(self, stage: int, index: int) -> BlockCall:
        """Layer ``index`` of a stage in this tick."""
        lane = self.lanes[stage]
        noted = lane.chooser is not None and not self.late  # by the LM head
        stamp = None if noted else self.board.stamp(stage)
        return lane.call(index, self.board.place[stage], stamp)

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
        active = [s for s in kind.active if s < len(self.lanes)]
        others = [s for s in active if s > 0]
        ahead = 0
        if kind.drafts and others:
            ahead = min(self.early, *(len(self.lanes[s]) - 1 for s in others))
        joined = self._front(kind, sampling, fork, dict.fromkeys(others, 0), ahead)
        starts = {s: 0 if s == 0 else ahead for s in active}
        alone = not joined and 0 in active
        single = not starts or self._together(starts, sampling, fork, alone=alone)
        return self._push(sampling, single=single)

    def _front(
        self, kind: TickKind, sampling: Sampling, fork: Fork, others: dict[int, int], ahead: int
    ) -> bool:
        """All up to the entry, and what runs beside it. Returns whether branches end behind it."""
        if self.late and 0 in kind.active:
            self._late_front(kind, sampling, fork, others, ahead)
            return False

        def front() -> None:
            if kind.drafts:
                self._draft(sampling)
            self._entry(sampling, drafts=kind.drafts)

        if ahead:
            fork([front, lambda: self._steps(others, ahead)])
        else:
            front()
        return ahead > 0

    def _late_front(
        self, kind: TickKind, sampling: Sampling, fork: Fork, others: dict[int, int], ahead: int
    ) -> None:
        """The same with the LM head for what left the last stage; the entry joins them."""
        if not kind.drafts:
            self._output(sampling, first=False)
            self._entry(sampling, drafts=False)
            return

        def beside() -> None:
            self._output(sampling, first=True)
            self._steps(others, ahead, first=False)

        fork([lambda: self._draft(sampling), beside])
        self._entry(sampling, drafts=True, first=True)

    def _together(
        self, starts: dict[int, int], sampling: Sampling, fork: Fork, *, alone: bool
    ) -> bool:
        """All active stages from layer ``starts`` on, and the LM head as soon as it can run.

        ``alone``: the first kernel follows the entry kernel directly. Returns whether the last
        kernel runs alone.
        """
        last = len(self.lanes) - 1
        longest = max(len(self.lanes[s]) - at for s, at in starts.items())
        if last not in starts or self.chooser is None or self.late:
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
        for step in range(count):
            calls = [
                self._call(s, at + step)
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
            )

    def _output(self, sampling: Sampling, *, first: bool) -> None:
        board, last = self.board, len(self.lanes) - 1
        assert self.chooser is not None
        self.chooser.run(
            self.lanes[-1].result,
            board.left_place if self.late else board.place[last],
            sampling,
            board.noise,
            stamp=None if self.late else board.stamp(last),
            first=first,
        )


class Follower(March):
    """Ticks of a device without stage 0: it works on what comes, and decides nothing."""

    first: int
    """Number of its first stage in the pipeline."""

    def _follow(self, *, first: bool) -> None:
        """Take in what came, and hand it on from stage to stage."""
        raise NotImplementedError

    def _tick(self, kind: TickKind, sampling: Sampling, fork: Fork, *, follows: bool) -> bool:
        """Launch one tick; see ``March``."""
        self._follow(first=not follows)
        mine = (s - self.first for s in kind.active)
        starts = {s: 0 for s in mine if 0 <= s < len(self.lanes)}
        single = not starts or self._together(starts, sampling, fork, alone=True)
        return self._push(sampling, single=single)


def votes_of(
    chooser: Chooser | None, sampling: Sampling, *, nothing: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, int]:
    """Scores and columns of a chooser's votes, and their number; ``nothing`` without a chooser."""
    if chooser is None:
        return *nothing, 1
    votes = chooser.votes(sampling)
    return votes.scores, votes.columns, votes.tiles


def inside(stage: Stage, depth: int) -> bool:
    """Whether the state after ``depth`` layers is made in this stage."""
    return stage.part.first < depth <= stage.part.last
