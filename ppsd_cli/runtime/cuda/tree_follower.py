"""A device without stage 0 when ticks carry levels of trees: it decides nothing.

Shapes: n stages, W rows of a level, H hidden, S slots, E numbers of a letter.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.cuda.board import Board
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.lanes import BlockCall, StageLane
from ppsd_cli.runtime.cuda.launch import Branch
from ppsd_cli.runtime.cuda.level_shape import LevelShape
from ppsd_cli.runtime.cuda.march import Follower, March, inside, votes_of
from ppsd_cli.runtime.cuda.relay import Box, Push
from ppsd_cli.runtime.cuda.ticks import Pod, block_of
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two
from ppsd_cli.runtime.cuda.tree_control import FREE, PROMPT
from ppsd_cli.runtime.cuda.tree_relay import tree_follow_kernel, tree_push_kernel


class TreeStages(March):
    """Stages of one device over W rows; the weights are ``pod``'s, the buffers their own."""

    first: int
    total: int

    def __init__(self, pod: Pod, width: int, depth: int) -> None:
        """``depth``: depths of guesses that enter in one tick."""
        self.width, self.first, self.total = width, pod.first, pod.total
        self.level = LevelShape(pod.total, width, depth)
        self.launcher, self.early, self.hidden = pod.launcher, pod.early, pod.hidden
        self.device, self.tap_depths, self.row = pod.device, pod.tap_depths, pod.row
        depths = sorted(pod.row, key=pod.row.__getitem__)
        stages = [lane.stage for lane in pod.lanes]
        kind: dict[str, Any] = {"dtype": pod.states.dtype, "device": pod.device}
        self.states = torch.zeros(len(depths), width, pod.hidden, **kind)
        self.inputs = torch.zeros(len(stages), width, pod.hidden, **kind)
        self.lanes: list[StageLane] = [
            lane.over(
                self.inputs[s],
                {d: self.states[pod.row[d]] for d in depths if inside(lane.stage, d)},
            )
            for s, lane in enumerate(pod.lanes)
        ]
        self.chooser = None if pod.chooser is None else pod.chooser.widened(width)
        self.moves = [move for move in pod.moves if not move[4]]
        self.pushes: list[Push] = []
        self.slots = stages[0].slots - 1
        self._rows: Tensor | None = None

    @property
    def move_table(self) -> Tensor:
        """Moves on the device."""
        if self._rows is None:
            self._rows = torch.tensor(self.moves or [(0, 0, 0, 0, 0)], device=self.device)
        return self._rows

    def make_box(self, rows: int, *, through_host: bool = False, returns: bool = False) -> Box:
        """See ``Pod.make_box``; every state has W rows."""
        empty = [0] * self.width
        if not returns:
            empty = self.level.empty_letter(self.slots)
        like = self.states
        return Box.of(rows * self.width, like=like, empty=empty, through_host=through_host)

    def connect(self, box: Box, come: Sequence[tuple[int, int, int, int, int]]) -> None:
        """See ``Pod.connect``."""
        self.box = box
        self.moves.extend(come)

    def _branch(self, stage: int) -> Branch:
        raise NotImplementedError

    def _call(self, stage: int, index: int) -> BlockCall:
        return replace(super()._call(stage, index), branch=self._branch(stage))

    def _letter_sizes(self) -> dict[str, int]:
        """Of kernels that read or write letters."""
        level = self.level
        return {
            "W": level.width,
            "WP": level.padded,
            "PATH": level.path,
            "PATHS": power_of_two(level.path),
            "SIZE": level.letter,
            "PADDED": power_of_two(level.letter),
            "FREED": level.freed,
            "FREEDP": power_of_two(level.freed),
        }

    def _push_levels(
        self, sampling: Sampling, records: tuple[Tensor, ...], *, single: bool
    ) -> bool:
        """``_push`` from ``records``: nodes, lineage, freed slots and ends at home; letters."""
        nothing = (self.states, self.board.board)
        scores, columns, tiles = votes_of(self.chooser, sampling, nothing=nothing)
        for push in self.pushes:
            rows = len(push.rows)
            targets = self.width if push.target else 0
            tree_push_kernel[(1 + rows * self.width + targets,)](
                self.board.board,
                *records,
                push.rows,
                self.states,
                push.box.states,
                push.box.header,
                scores,
                columns,
                tiles,
                rows,
                STAGES=self.total,
                LOCAL=len(self.lanes),
                HEADER=push.box.header.shape[1],
                **self._letter_sizes(),
                BOX=push.box.rows,
                H=self.hidden,
                BH=power_of_two(self.hidden),
                BLOCK=block_of(tiles),
                PLACE=push.place,
                TARGET=push.target,
                HOME=self.first == 0,
                **self.launcher.flags(Tile(0, 0, 4), first=not single),
            )
            single = True
        return single


class TreeFollower(Follower, TreeStages):
    """Ticks of such a device, with its account of who lies where."""

    def __init__(self, pod: Pod, width: int, depth: int) -> None:
        super().__init__(pod, width, depth)
        local, path = len(self.lanes), self.level.path
        self.board = Board(stages=local, lags=0, slots=self.slots, device=self.device, width=width)
        self.board.noise = pod.board.noise
        half: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        whole: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        self._empty = torch.tensor(self.level.empty_letter(self.slots), **whole)
        self._letters = self._empty.repeat(TICKS, 1)
        self._paths = torch.zeros(local, width, path, **half)
        self._views = torch.zeros(local, 2, **whole)
        self._owner = torch.full((self.slots + 1,), FREE, **half)
        self._where = torch.zeros(self.slots + 1, **half)
        self._count = torch.arange(self.slots + 1, **half)
        self.box = self.make_box(0)

    def _branch(self, stage: int) -> Branch:
        return Branch(self._owner, self._where, self._paths[stage], self._views[stage])

    def _follow(self, *, first: bool) -> None:
        board = self.board
        tree_follow_kernel[(1 + len(self.moves) * self.width,)](
            board.board,
            self._letters,
            board.place,
            self._paths,
            self._views,
            self._owner,
            self._where,
            self.box.header,
            self.move_table,
            self.states,
            self.box.states,
            self.inputs,
            LOCAL=len(self.lanes),
            **self._letter_sizes(),
            BOX=self.box.rows,
            H=self.hidden,
            BH=power_of_two(self.hidden),
            **self.launcher.flags(Tile(0, 0, 4), first=first),
        )

    def _push(self, sampling: Sampling, *, single: bool) -> bool:
        nothing = self._letters
        return self._push_levels(sampling, (nothing,) * 4 + (self._letters,), single=single)

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """Nothing of an earlier answer is in flight; the prompt lies in the slots up to
        ``position``.
        """
        del token, serial
        self.idle()
        self.board.choose_noise(request.sampling)
        self._owner.fill_(FREE)
        self._owner[:position].fill_(PROMPT)
        self._where[:position].copy_(self._count[:position])

    def idle(self) -> None:
        """Bubbles everywhere."""
        self.board.idle()
        self.box.clear()
        self._letters.copy_(self._empty.expand_as(self._letters))
        self.board.place.zero_()
        self.board.place[:, :, 1].fill_(self.board.trash)
        self._paths.zero_()
        self._views.zero_()
