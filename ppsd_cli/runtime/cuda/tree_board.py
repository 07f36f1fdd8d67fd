"""What the device remembers of a tree, and the host's view of a tick of it.

Shapes: n stages, W rows of a level, K taps, S slots, V columns, V' draft vocabulary, R rows of the
second depth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.plan import Node, Request, Target
from ppsd_cli.errors import StageError
from ppsd_cli.runtime.cuda.board import Board
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.level_shape import LevelShape
from ppsd_cli.runtime.cuda.recorder import send
from ppsd_cli.runtime.cuda.tiles import power_of_two
from ppsd_cli.runtime.cuda.tree_control import (
    FREE,
    HEAD_FIELDS,
    NO_SLOT,
    NODE_FIELDS,
    PROMPT,
    ROW_FIELDS,
    TREE_FIELDS,
)


class TreeBoard(Board):
    """Control tensors of a pipeline that carries trees; see ``tree_control.py`` for the fields."""

    def __init__(
        self,
        *,
        level: LevelShape,
        local: int,
        taps: int,
        slots: int,
        device: torch.device,
    ) -> None:
        """``local``: stages of this device. ``slots``: S less the spare one."""
        width, path = level.width, level.path
        super().__init__(stages=local, lags=taps - 1, slots=slots, device=device, width=width)
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        half: dict[str, Any] = {"dtype": torch.int32, "device": device}
        wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.width, self.holes = width, level.stages * width
        room = max(16, self.holes + level.freed)  # sorted 16 at a time
        self.tree = torch.zeros(len(TREE_FIELDS), **whole)
        self.nodes = torch.zeros(TICKS, width, len(NODE_FIELDS), **whole)
        self.alive = torch.zeros(TICKS, **whole)
        self.scores = torch.zeros(TICKS, width, **wide)
        self.lineage = torch.zeros(TICKS, width, path, **half)
        self.kin = torch.full((TICKS, width, taps), -1, **whole)
        self.owner = torch.full((slots + 1,), FREE, **half)
        self.where = torch.zeros(slots + 1, **half)
        self._count = torch.arange(slots + 1, **half)
        self.freed = torch.full((TICKS, level.freed), NO_SLOT, **whole)
        self.ends = torch.zeros(TICKS, **whole)
        self.pool = torch.full((power_of_two(room),), NO_SLOT, **whole)
        self.log = torch.zeros(TICKS, len(HEAD_FIELDS) + len(ROW_FIELDS) * width, **whole)
        self.paths = torch.zeros(local, width, path, **half)
        self.views = torch.zeros(local + 1, 2, **whole)
        self.head_place = torch.zeros(1 + taps, width, 2, **whole)
        self.head_place[:, :, 1] = slots
        self.head_path = torch.zeros(width, path, **half)
        self.head_kin = torch.full((width, taps), -1, **whole)
        self.first = torch.full((width, 2), -2, **whole)
        self.first_scores = torch.zeros(width, **wide)
        self.scale = torch.ones(1, **wide)
        self.ranks = torch.zeros(slots, **whole)
        self.rank_shares = torch.full((width,), torch.nan, **wide)

    def idle(self) -> None:
        """Nothing is due and nothing in flight."""
        super().idle()
        self._no_nodes()

    def _no_nodes(self) -> None:
        self.nodes.zero_()
        self.nodes[:, :, NODE_FIELDS.index("slot")].fill_(self.trash)
        self.alive.zero_()
        self.lineage.zero_()
        self.freed.fill_(NO_SLOT)

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """See ``Board.begin``. The prompt lies in the slots up to ``position``."""
        super().begin(request, position=position, token=token, serial=serial)
        self._no_nodes()
        self.ends.fill_(position)
        send(self.tree, [position, 0, 0, 0, 0])
        self.pool.fill_(NO_SLOT)
        self.owner.fill_(FREE)
        self.owner[:position].fill_(PROMPT)
        self.where[:position].copy_(self._count[:position])
        taps = self.kin.shape[2]
        send(self.kin[0, 0], [max(position - 1 - lag, -1) for lag in range(taps)])
        self.scale.fill_(request.tree_scale)
        forced, shares = request.forced_drafts or (), request.rank_scores
        if forced:
            send(self.ranks[: len(forced)], request.forced_ranks or (0,) * len(forced))
        known = len(shares) >= self.width
        send(self.rank_shares, shares[: self.width] if known else [math.nan] * self.width)


@dataclass(frozen=True, slots=True)
class Level:
    """One tick of a tree from the device's log; times in device nanoseconds.

    ``targets`` [W]: what the full model says of the rows that left the last stage. ``logits``: for
    each guess among ``nodes`` the row of the draft logits that it comes from.
    """

    tick: int
    boundary_time: int
    entry_time: int
    stage_times: tuple[int, ...]
    nodes: tuple[Node, ...]
    logits: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, log: Sequence[int], stamps: Sequence[int]) -> "Level":
        """From rows of the log and of the stamps. StageError where the head made no numbers."""
        tick, boundary_time, entry_time = log[: len(HEAD_FIELDS)]
        step = len(ROW_FIELDS)
        nodes, rows, targets = [], [], []
        for at in range(len(HEAD_FIELDS), len(log), step):
            entered, serial, position, token, slot, row, parent, target = log[at : at + step]
            targets.append(target)
            if not entered:
                continue
            if token < 0:
                raise StageError(f"stage 0: draft logits are not numbers at {position}")
            above = None if parent < 0 else parent
            nodes.append(
                Node(
                    serial,
                    position,
                    token,
                    1,
                    drafted=row >= 0,
                    final=True,
                    parent=above,
                    slot=slot,
                )
            )
            rows.append(row)
        times, kept = tuple(stamps), tuple(row for row in rows if row >= 0)
        return cls(tick, boundary_time, entry_time, times, tuple(nodes), kept, tuple(targets))

    def draft_logits(self, logits: Tensor | None) -> tuple[Tensor, ...]:
        """Of each guess that entered, from ``logits`` [W + R, V'] behind all leaves and then behind
        guesses, where kept.
        """
        return () if logits is None else tuple(logits[row] for row in self.logits)

    def answers(self, fed: Sequence[Node], spans: Any, logits: Tensor | None) -> tuple[Target, ...]:
        """Targets of the nodes ``fed`` that left the last stage; ``logits`` [W, V] where kept.

        StageError where the full model made no numbers.
        """
        if any(token < 0 for token in self.targets[: len(fed)]):
            raise StageError("logits are not numbers (NaN)")
        return tuple(
            Target(node.serial, token, spans, None if logits is None else logits[row])
            for row, (node, token) in enumerate(zip(fed, self.targets, strict=False))
        )
