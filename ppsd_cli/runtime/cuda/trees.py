"""Ticks that carry a level of a tree, on one device; what ``ticks.py`` is for a chain.

Shapes: n stages, W rows of a level, H hidden, V' draft vocabulary, C chunks of it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.choose import restrict
from ppsd_cli.core.plan import Sampling
from ppsd_cli.runtime.cuda.lanes import BlockCall, Chooser, HeadLane, is_cut
from ppsd_cli.runtime.cuda.launch import Branch
from ppsd_cli.runtime.cuda.march import March, inside, votes_of
from ppsd_cli.runtime.cuda.ticks import Pod, block_of
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two
from ppsd_cli.runtime.cuda.tree_board import TreeBoard
from ppsd_cli.runtime.cuda.tree_choice import chunk_kernel, rank_kernel
from ppsd_cli.runtime.cuda.tree_control import (
    tree_boundary_kernel,
    tree_entry_kernel,
    tree_gather_kernel,
)

_CHUNK = 512
_GREEDY = Sampling()


class TreePod(March):
    """Buffers and launches for levels of ``width`` nodes; the weights are ``pod``'s."""

    board: TreeBoard
    head: HeadLane
    chooser: Chooser

    def __init__(self, pod: Pod, width: int) -> None:
        assert pod.head is not None, "drafting without a head"
        stages = [lane.stage for lane in pod.lanes]
        one = stages[0]
        self._pod, self.width = pod, width
        self.launcher, self.early = pod.launcher, pod.early
        self.head = pod.head.widened(width, guesses=width)
        self._taps = len(pod.tap_depths)
        self.board = TreeBoard(
            stages=len(stages),
            taps=self._taps,
            slots=one.slots - 1,
            device=one.device,
            width=width,
        )
        assert pod.head.ring >= one.slots, "the head's memory of states goes by slot in a tree"
        depths = sorted(pod.row, key=pod.row.__getitem__)
        kind: dict[str, Any] = {"dtype": one.dtype, "device": one.device}
        self._states = torch.zeros(len(depths), width, pod.hidden, **kind)
        self._inputs = torch.zeros(len(stages), width, pod.hidden, **kind)
        self.lanes = [
            lane.over(
                self._inputs[s],
                {d: self._states[pod.row[d]] for d in depths if inside(lane.stage, d)},
            )
            for s, lane in enumerate(pod.lanes)
        ]
        assert pod.chooser is not None
        self.chooser = pod.chooser.widened(width)
        self._move_table = torch.tensor(pod.moves, device=one.device)
        columns = self.head.chooser.logits.shape[1]
        self._chunks = -(-columns // _CHUNK)
        self._keys = torch.zeros(width, self._chunks, width, dtype=torch.int64, device=one.device)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": one.device}
        self._tops = torch.zeros(width, self._chunks, **wide)
        self._totals = torch.zeros(width, self._chunks, **wide)

    @property
    def target_logits(self) -> Tensor:
        """The full model's logits [W, V] of the last tick."""
        return self.chooser.logits

    @property
    def draft_logits(self) -> Tensor:
        """The head's logits [W, V'] of the last tick, behind each leaf."""
        return self.head.chooser.logits

    def _call(self, stage: int, index: int) -> BlockCall:
        board = self.board
        branch = Branch(board.owner, board.where, board.paths[stage], board.views[stage])
        return replace(super()._call(stage, index), branch=branch)

    def _boundary(self, sampling: Sampling, *, first: bool) -> None:
        pod, board, head = self._pod, self.board, self.head
        scores, columns, tiles = votes_of(
            self.chooser, sampling, nothing=(self._states, board.board)
        )
        moves = len(pod.moves)
        tree_boundary_kernel[(1 + (moves + 1) * self.width,)](
            board.board,
            board.tree,
            board.nodes,
            board.alive,
            board.lineage,
            board.kin,
            board.owner,
            board.pool,
            board.log,
            board.place,
            board.paths,
            board.views,
            board.head_place,
            board.head_path,
            board.head_kin,
            scores,
            columns,
            tiles,
            self._move_table,
            self._states,
            self._inputs,
            head.rings,
            board.trash,
            STAGES=board.stages,
            MOVES=moves,
            W=self.width,
            WP=power_of_two(self.width),
            LEVELS=power_of_two(board.stages),
            LAGS=self._taps - 1,
            HOLES=board.holes,
            POOL=len(board.pool),
            RING=head.ring,
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            BLOCK=block_of(tiles),
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 8), first=first),
        )

    def _draft(self, sampling: Sampling) -> None:
        """The head on all leaves, then the best guesses behind each."""
        pod, board, head = self._pod, self.board, self.head
        norms = head.norms
        tree_gather_kernel[(self._taps, self.width)](
            head.rings,
            norms if norms is not None else head.rings,
            board.head_kin,
            *head.reads.pointers(),
            head.eps,
            W=self.width,
            LAGS=self._taps - 1,
            STRIDE=head.reads.stride,
            RING=head.ring,
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            **self.launcher.flags(Tile(0, 0, 4), first=True),
        )
        view = board.views[board.stages]
        branch = Branch(board.owner, board.where, board.head_path, view, board.head_kin)
        head.guess(board.head_place, _GREEDY, board.noise, branch=branch)
        self._rank(sampling)

    def _rank(self, sampling: Sampling) -> None:
        board, head = self.board, self.head
        noise, ids, drawn = board.noise, head.chooser.token_ids, sampling.temperature > 0
        scores, cut = head.chooser.logits, is_cut(sampling)
        if cut:
            scores = restrict(scores / noise.temperature, sampling)
        known = ids if ids is not None else board.board
        width, count = self.width, self._chunks * self.width
        chunk_kernel[(self._chunks, width)](
            scores,
            known,
            board.head_place,
            noise.seed,
            noise.temperature,
            board.scale,
            self._keys,
            self._tops,
            self._totals,
            scores.shape[1],
            W=width,
            KEEP=width,
            BN=_CHUNK,
            DIVIDE=drawn and not cut,
            NOISE=drawn,
            MAPPED=ids is not None,
            **self.launcher.flags(Tile(0, 0, 1), first=cut),
        )
        rank_kernel[(width,)](
            self._keys,
            self._tops,
            self._totals,
            board.scale,
            known,
            board.board,
            board.head_place,
            board.forced,
            board.ranks,
            board.rank_shares,
            board.tokens,
            board.shares,
            self._chunks,
            KEEP=width,
            KP=power_of_two(width),
            BLOCK=power_of_two(count),
            MAPPED=ids is not None,
            **self.launcher.flags(Tile(0, 0, 1 if count <= 512 else 4), first=False),
        )

    def _entry(self, sampling: Sampling, *, drafts: bool, first: bool = False) -> None:
        del sampling
        assert not first, "the draft head's ranking comes directly before"
        assert drafts, "a tree is drafted in every tick"
        pod, board = self._pod, self.board
        tree_entry_kernel[(self.width,)](
            board.board,
            board.tree,
            board.nodes,
            board.alive,
            board.scores,
            board.lineage,
            board.kin,
            board.owner,
            board.where,
            board.pool,
            board.log,
            board.place,
            board.paths,
            board.views,
            board.tokens,
            board.shares,
            pod.embedding,
            self._inputs,
            board.trash,
            STAGES=board.stages,
            W=self.width,
            WP=power_of_two(self.width),
            LAGS=self._taps - 1,
            POOL=len(board.pool),
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 1 if pod.hidden <= 1024 else 4), first=False),
        )
