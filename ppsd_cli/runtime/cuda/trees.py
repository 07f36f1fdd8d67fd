"""Ticks that carry a level of a tree, on the device with stage 0; what ``ticks.py`` is for a chain.

Shapes: n stages, W rows of a level, H hidden, V' draft vocabulary, C chunks of it.
"""

from typing import Any

import torch
from torch import Tensor

from ppsd_cli.core.choose import restrict
from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.cuda.lanes import HeadLane, is_cut
from ppsd_cli.runtime.cuda.launch import Branch
from ppsd_cli.runtime.cuda.march import votes_of
from ppsd_cli.runtime.cuda.ticks import Pod, block_of
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two
from ppsd_cli.runtime.cuda.tree_board import TreeBoard
from ppsd_cli.runtime.cuda.tree_choice import chunk_kernel, rank_kernel
from ppsd_cli.runtime.cuda.tree_control import (
    tree_boundary_kernel,
    tree_entry_kernel,
    tree_gather_kernel,
)
from ppsd_cli.runtime.cuda.tree_follower import TreeStages

_CHUNK = 512
_GREEDY = Sampling()


class TreePod(TreeStages):
    """Levels of ``width`` nodes on the device with stage 0; the weights are ``pod``'s."""

    board: TreeBoard
    head: HeadLane

    def __init__(self, pod: Pod, width: int) -> None:
        super().__init__(pod, width)
        assert pod.head is not None, "drafting without a head"
        self._pod = pod
        self.head = pod.head.widened(width, guesses=width)
        self._taps = len(pod.tap_depths)
        self.board = TreeBoard(
            stages=self.total,
            local=len(self.lanes),
            taps=self._taps,
            slots=self.slots,
            device=self.device,
            width=width,
        )
        assert pod.head.ring >= self.slots, "the head's memory of states goes by slot in a tree"
        self.box = self.make_box(0, returns=True)
        columns = self.head.chooser.logits.shape[1]
        self._chunks = -(-columns // _CHUNK)
        room = (width, self._chunks, width)
        self._keys = torch.zeros(*room, dtype=torch.int64, device=self.device)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self._tops = torch.zeros(width, self._chunks, **wide)
        self._totals = torch.zeros(width, self._chunks, **wide)

    def _branch(self, stage: int) -> Branch:
        board = self.board
        return Branch(board.owner, board.where, board.paths[stage], board.views[stage])

    def _boundary(self, sampling: Sampling, *, first: bool) -> None:
        pod, board, head = self._pod, self.board, self.head
        scores, columns, tiles = votes_of(
            self.chooser, sampling, nothing=(self.states, board.board)
        )
        moves = len(self.moves)
        tree_boundary_kernel[(1 + (moves + 1) * self.width,)](
            board.board,
            board.tree,
            board.nodes,
            board.alive,
            board.lineage,
            board.kin,
            board.owner,
            board.pool,
            board.freed,
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
            self.move_table,
            self.states,
            self.box.states,
            self.box.header,
            self.inputs,
            head.rings,
            board.trash,
            STAGES=self.total,
            LOCAL=len(self.lanes),
            MOVES=moves,
            BOX=self.box.rows,
            W=self.width,
            WP=power_of_two(self.width),
            LEVELS=power_of_two(self.total),
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
        view = board.views[len(self.lanes)]
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
            board.ends,
            board.log,
            board.place,
            board.paths,
            board.views,
            board.tokens,
            board.shares,
            pod.embedding,
            self.inputs,
            board.trash,
            STAGES=self.total,
            W=self.width,
            WP=power_of_two(self.width),
            LAGS=self._taps - 1,
            POOL=len(board.pool),
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            CLOCK=self.launcher.clock,
            **self.launcher.flags(Tile(0, 0, 1 if pod.hidden <= 1024 else 4), first=False),
        )

    def _push(self, sampling: Sampling, *, single: bool) -> bool:
        board = self.board
        records = (board.nodes, board.lineage, board.freed, board.ends, board.freed)
        return self._push_levels(sampling, records, single=single)

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """See ``TreeBoard.begin``."""
        self.board.begin(request, position=position, token=token, serial=serial)
        self.box.clear()

    def idle(self) -> None:
        """See ``TreeBoard.idle``."""
        self.board.idle()
        self.box.clear()

    def head_logits(self) -> Tensor:
        """The head's logits [W, V'] of the last tick, behind each leaf."""
        return self.head.chooser.logits
