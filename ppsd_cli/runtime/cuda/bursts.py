"""A burst (EESD) on one device, as a list of launches: draft row by row, then verify all at once.

Row i enters, runs through stage 0's layers at width 1, and the head guesses row i + 1. Then all
rows run through the other layers and the LM head together. Between two bursts nothing is in
flight, so a stage's caches need not know where a burst went wrong: the next rows overwrite.

The head's own rows of the last burst are not as they should stay: those of a deep head were made
with exit states in place of deeper ones, and the last was never made. So the first guess of a burst
is a call over as many positions as that may concern; it reads the head's weights once.

Shapes: R rows of a burst, H hidden, K taps, L = K - 1, V columns, V' draft vocabulary.
"""

import torch
from torch import Tensor

from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda.burst_control import (
    ROW_FIELDS,
    burst_answer_kernel,
    burst_entry_kernel,
    burst_gather_kernel,
)
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.lanes import HeadLane, StageLane, run_blocks
from ppsd_cli.runtime.cuda.march import inside
from ppsd_cli.runtime.cuda.ticks import Pod, block_of
from ppsd_cli.runtime.cuda.tiles import MOST_GUESSES, Tile, power_of_two


class BurstPod:
    """Buffers and launches for bursts of ``draft_length`` guesses; the weights are ``pod``'s."""

    def __init__(self, pod: Pod, draft_length: int) -> None:
        assert pod.head is not None, "drafting without a head"
        assert 0 < draft_length <= MOST_GUESSES
        self._pod, self._head = pod, pod.head
        self.rows = 1 + draft_length
        stages = [lane.stage for lane in pod.lanes]
        exit_layer, device = stages[0].part.last, stages[0].device
        depths = sorted({stage.part.last for stage in stages} | set(pod.tap_depths))
        at = {depth: index for index, depth in enumerate(depths)}
        states = torch.zeros(
            len(depths), self.rows, pod.hidden, dtype=stages[0].dtype, device=device
        )
        self._states = states
        early = [depth for depth in depths if inside(stages[0], depth)]
        self._fronts = [
            pod.lanes[0].over(pod.inputs[0], {d: states[at[d], i : i + 1] for d in early})
            for i in range(self.rows)
        ]
        self._lanes: list[StageLane] = []
        for lane in pod.lanes[1:]:
            source = states[at[lane.stage.part.first]]
            mine = {d: states[at[d]] for d in depths if inside(lane.stage, d)}
            self._lanes.append(lane.over(source, mine))
        self._final = states[at[stages[-1].part.last]]
        assert pod.chooser is not None
        self._chooser = pod.chooser.widened(self.rows)

        def whole(*sizes: int) -> Tensor:
            return torch.zeros(*sizes, dtype=torch.int64, device=device)

        self._depths = torch.tensor([at[depth] for depth in pod.tap_depths], device=device)
        stand_ins = [
            at[depth if depth <= exit_layer else pod.tap_depths[0]] for depth in pod.tap_depths
        ]
        self._sources = torch.tensor(stand_ins, device=device)
        self._place = whole(self.rows, 2)
        self._place[:, 1] = pod.board.trash
        self.log = whole(TICKS, self.rows, len(ROW_FIELDS))
        self.draft_logits = torch.zeros(
            draft_length, self._head.chooser.logits.shape[1], dtype=torch.float32, device=device
        )
        self._first = self._head
        if self._head.has_cache:
            late = max(pod.tap_depths) > exit_layer
            self._first = self._head.widened(self.rows if late else 2)
        self._head_places = {
            lane.width: whole(1 + len(pod.tap_depths), lane.width, 2)
            for lane in (self._head, self._first)
        }

    @property
    def target_logits(self) -> Tensor:
        """The full model's logits [R, V] of the last burst."""
        return self._chooser.logits

    def run(self, sampling: Sampling) -> None:
        """Launch one burst."""
        for row, lane in enumerate(self._fronts):
            if row:
                self._guess(row - 1, sampling)
            self._enter(row, sampling)
            self._layers(lane, self._place[row : row + 1], 0)
        for stage, lane in enumerate(self._lanes, 1):
            self._layers(lane, self._place, stage)
        board = self._pod.board
        stamp = board.stamp(len(self._lanes))
        self._chooser.run(self._final, self._place, sampling, board.noise, stamp=stamp)
        self._answer(sampling)

    def _layers(self, lane: StageLane, place: Tensor, stage: int) -> None:
        stamp = None if lane.chooser is not None else self._pod.board.stamp(stage)
        for index in range(len(lane)):
            call = lane.call(index, place, stamp)
            run_blocks(self._pod.launcher, [call], lane.shape, lane.stage.tables)

    def _guess(self, row: int, sampling: Sampling) -> None:
        """The head's guess behind a row; behind the first, rows of the last burst are made anew."""
        lane = self._head if row else self._first
        place = self._head_places[lane.width]
        self._gather(row, lane, place)
        noise = self._pod.board.noise
        lane.guess(place, sampling, noise, logits=self.draft_logits[row : row + 1])

    def _enter(self, row: int, sampling: Sampling) -> None:
        pod, board, chooser = self._pod, self._pod.board, self._head.chooser
        votes, ids = chooser.votes(sampling), chooser.token_ids
        burst_entry_kernel[(1,)](
            board.board,
            self.log,
            self._place,
            votes.scores,
            votes.columns,
            votes.tiles,
            ids if ids is not None else board.board,
            board.forced,
            pod.embedding,
            pod.inputs,
            board.trash,
            row,
            ROWS=self.rows,
            R=power_of_two(self.rows),
            FIRST=row == 0,
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            BLOCK=block_of(votes.tiles),
            MAPPED=ids is not None,
            CLOCK=pod.launcher.clock,
            **pod.launcher.flags(Tile(0, 0, 8), first=row == 0),
        )

    def _gather(self, row: int, lane: HeadLane, place: Tensor) -> None:
        pod, norms = self._pod, lane.norms
        burst_gather_kernel[(lane.lags + 1, lane.width)](
            pod.board.board,
            self.log,
            lane.rings,
            self._states,
            self._sources,
            norms if norms is not None else lane.rings,
            place,
            *lane.reads.pointers(),
            lane.eps,
            pod.board.trash,
            row,
            ROWS=self.rows,
            W=lane.width,
            LAGS=lane.lags,
            STRIDE=lane.reads.stride,
            RING=lane.ring,
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            CLOCK=pod.launcher.clock,
            **pod.launcher.flags(Tile(0, 0, 4), first=False),
        )

    def _answer(self, sampling: Sampling) -> None:
        pod, votes = self._pod, self._chooser.votes(sampling)
        burst_answer_kernel[(1 + len(pod.tap_depths), self.rows)](
            pod.board.board,
            self.log,
            votes.scores,
            votes.columns,
            votes.tiles,
            self._head.rings,
            self._states,
            self._depths,
            ROWS=self.rows,
            RING=self._head.ring,
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            BLOCK=block_of(votes.tiles),
            **pod.launcher.flags(Tile(0, 0, 8), first=False),
        )
