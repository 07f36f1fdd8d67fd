"""Ticks that carry a level of a tree, on the device with stage 0; what ``ticks.py`` is for a chain.

Shapes: n stages, W rows of a level, H hidden, S slots, V' draft vocabulary, R rows of the second
depth.
"""

from torch import Tensor

from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.cuda.lanes import HeadLane
from ppsd_cli.runtime.cuda.launch import Branch
from ppsd_cli.runtime.cuda.march import votes_of
from ppsd_cli.runtime.cuda.ranking import Ranking
from ppsd_cli.runtime.cuda.second_lane import SecondLane
from ppsd_cli.runtime.cuda.ticks import Pod, block_of
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two
from ppsd_cli.runtime.cuda.tree_board import TreeBoard
from ppsd_cli.runtime.cuda.tree_control import tree_boundary_kernel
from ppsd_cli.runtime.cuda.tree_drafts import tree_first_kernel, tree_gather_kernel
from ppsd_cli.runtime.cuda.tree_entry import tree_entry_kernel
from ppsd_cli.runtime.cuda.tree_follower import TreeStages

_GREEDY = Sampling()


class TreePod(TreeStages):
    """Levels of ``width`` nodes on the device with stage 0; the weights are ``pod``'s.

    ``depth`` 2: a level may hold guesses behind guesses of its own (``second_lane.py``).
    """

    board: TreeBoard
    head: HeadLane

    def __init__(self, pod: Pod, width: int, depth: int) -> None:
        super().__init__(pod, width, depth)
        assert pod.head is not None, "drafting without a head"
        self._pod = pod
        self.head = pod.head.widened(width, guesses=width)
        self._taps = len(pod.tap_depths)
        self.board = TreeBoard(
            level=self.level,
            local=len(self.lanes),
            taps=self._taps,
            slots=self.slots,
            device=self.device,
        )
        assert pod.head.ring >= self.slots, "the head's memory of states goes by slot in a tree"
        self.box = self.make_box(0, returns=True)
        place = self.board.head_place[0]
        self._ranking = self._last = Ranking(self.launcher, self.head.chooser, self.board, place)
        self._second: SecondLane | None = None
        if depth > 1:
            assert self.total > 1, "a token is due while its own level is newest"
            level = self.level
            self._second = SecondLane(
                self.launcher, pod.head, rows=level.continued, path=level.path
            )
            self._last = Ranking(
                self.launcher, self._second.chooser, self.board, self._second.place
            )
        self._join_logits()

    def _join_logits(self) -> None:
        """One buffer for the logits of both depths, which may be fetched while graphs run."""
        first, second = self.head.chooser, self._second
        self._logits = first.logits
        if second is not None:
            rows = [self.width, self.level.continued]
            self._logits = first.logits.new_zeros(sum(rows), first.logits.shape[1])
            first.logits, second.chooser.logits = self._logits.split(rows)

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
            DEPTH=self.level.depth,
            LOCAL=len(self.lanes),
            MOVES=moves,
            BOX=self.box.rows,
            W=self.width,
            WP=self.level.padded,
            LEVELS=power_of_two(self.total),
            PATHS=power_of_two(self.level.path),
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
        """The head on the leaves' level, the best guesses behind each row, and a second depth."""
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
        self._ranking.run(sampling)
        if self._second is not None:
            self._go_on(self._second, view, sampling)

    def _go_on(self, second: SecondLane, view: Tensor, sampling: Sampling) -> None:
        """The second depth behind the best guesses of the first, or behind a token that is due."""
        pod, board, level = self._pod, self.board, self.level
        tree_first_kernel[(level.continued + self.width,)](
            board.board,
            board.tree,
            board.nodes,
            board.alive,
            board.scores,
            board.lineage,
            board.kin,
            board.head_place,
            self._ranking.tokens,
            self._ranking.shares,
            self.head.states,
            self.head.draft_head.own,
            pod.embedding,
            *second.norms,
            self.head.eps,
            board.first,
            board.first_scores,
            second.before,
            second.pair,
            second.place,
            second.path,
            W=self.width,
            WP=level.padded,
            R=level.continued,
            PATH=level.path,
            PATHS=power_of_two(level.path),
            LAGS=self._taps - 1,
            H=pod.hidden,
            BH=power_of_two(pod.hidden),
            **self.launcher.flags(Tile(0, 0, 4), first=False),
        )
        second.run(board.owner, board.where, view, board.noise)
        self._last.run(sampling)

    def _entry(self, sampling: Sampling, *, drafts: bool, first: bool = False) -> None:
        del sampling
        assert not first, "the draft head's ranking comes directly before"
        assert drafts, "a tree is drafted in every tick"
        pod, board, level, second = self._pod, self.board, self.level, self._second
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
            self._last.tokens,
            self._last.shares,
            board.first,
            board.first_scores,
            board.head_place[0] if second is None else second.place,
            pod.embedding,
            self.inputs,
            board.trash,
            STAGES=self.total,
            DEPTH=level.depth,
            W=self.width,
            WP=level.padded,
            R=level.continued,
            ALL=power_of_two(level.padded * (1 + level.continued)),
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
        """The head's logits [W + R, V'] of the last tick: behind each leaf, then behind guesses."""
        return self._logits
