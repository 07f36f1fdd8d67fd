"""Stage 0: takes the boundary's results, decides, drafts, feeds, and runs its own layers."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import torch

from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import Bubble, Burst, Node, Plan, Prompt, Request, Target, TickResult
from ppsd_cli.core.tree import Child, Tree
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.runtime.drafting import Drafter
from ppsd_cli.runtime.frames import Frame, Return
from ppsd_cli.runtime.worker import StageWorker


class Link(Protocol):
    """The way from stage 0 to the other stages and back."""

    def send(self, frame: Frame) -> None:
        """Hand a frame to stage 1."""

    def receive(self, stage: int) -> Return:
        """The next return of ``stage``, waiting for it. Called once for each frame sent."""

    def advance(self) -> None:
        """A boundary: stages that do not run by themselves do their tick's work now."""


class Front:
    """Runs ticks of stage 0 from plans. The accept rule itself is ``core.tree``."""

    def __init__(
        self, worker: StageWorker, head: DraftHead | None, link: Link, *, returning: tuple[int, ...]
    ) -> None:
        """``returning``: the stages after 0 that send returns, in order; the last stage is one."""
        self._worker, self._link = worker, link
        self._drafter = Drafter(head, worker.branches, worker.stage.embed)
        self._returning = returning
        self._stages = returning[-1] + 1 if returning else 1
        self._tree = Tree()
        self._request: Request | None = None
        self._tick = 0
        self._serial = 0
        self._sent: deque[tuple[int, tuple[Node, ...]]] = deque()
        self._draft_seconds = 0.0
        self._own: Return | None = None
        taps = () if head is None else head.taps
        self._late_depths = {tap.depth for tap in taps} - worker.stage.tap_depths

    @torch.inference_mode()
    def tick(self, plan: Plan) -> TickResult:
        """One tick: boundary, decision, draft, layers; in a burst the last two in turns."""
        begin = perf_counter()
        self._link.advance()
        targets = self._boundary()
        received = perf_counter()
        self._drafter.logits, self._draft_seconds = [], 0.0
        entered = self._enter(plan)
        clock = Ticked(self._tick, begin, received, received + self._draft_seconds, perf_counter())
        self._tick += 1
        return TickResult(clock, targets, entered, tuple(self._drafter.logits))

    def _boundary(self) -> tuple[Target, ...]:
        """Take in what the stages finished in the last tick; the targets that are due.

        The nodes that were fed in tick t - 1 - s have just left stage s.
        """
        targets: tuple[Target, ...] = ()
        for stage in self._returning or (0,):
            nodes = self._fed_at(self._tick - 1 - stage)
            if nodes:
                back = self._link.receive(stage) if stage else self._own
                assert back is not None
                assert back.serial == nodes[0].serial, "a return is out of order"
                self._observe(nodes, back)
                if stage == self._stages - 1:
                    targets = self._settle(nodes, back)
        while self._sent and self._sent[0][0] <= self._tick - self._stages:
            self._sent.popleft()
        return targets

    def _fed_at(self, tick: int) -> tuple[Node, ...]:
        return next((nodes for at, nodes in self._sent if at == tick), ())

    def _observe(self, nodes: Sequence[Node], back: Return) -> None:
        slots = [node.slot for node in nodes if node.slot is not None]
        for depth, states in back.taps.items():
            self._drafter.observe(depth, slots if len(slots) > 1 else slots[0], states)

    def _settle(self, nodes: tuple[Node, ...], back: Return) -> tuple[Target, ...]:
        """Targets of nodes that the last stage has finished, judged in their order."""
        first = nodes[0]
        if first.token_id is None:
            self._drafter.prefill(first.position, first.tokens)
        if not back.token_ids:
            return (Target(first.serial, None, back.spans),)
        assert len(back.token_ids) == len(nodes), "a node has no target"
        logits = [None] * len(nodes) if back.logits is None else back.logits.unbind()
        targets = []
        for node, token_id, row in zip(nodes, back.token_ids, logits, strict=True):
            self._tree.verify(node.serial, token_id)
            targets.append(Target(node.serial, token_id, back.spans, row))
        return tuple(targets)

    def _enter(self, plan: Plan) -> tuple[Node, ...]:
        """Feed what the plan says; the nodes that entered."""
        if isinstance(plan, Bubble):
            return ()
        if isinstance(plan, Prompt):
            rows = [self._feed((self._prompt_node(plan),), plan.token_ids, plan.request)]
        elif isinstance(plan, Burst):
            rows = self._burst(plan.draft_length)
        else:
            level = self._level()
            rows = [self._feed(level, [node.token_id for node in level])] if level else []
        if not rows:
            return ()
        frame, self._own = join_rows(rows)
        if self._stages > 1:
            self._link.send(frame)  # first: stage 1 may be waiting for it
        self._take_in(rows[-1])
        nodes = tuple(node for row in rows for node in row.nodes)
        self._sent.append((self._tick, nodes))
        return nodes

    def _burst(self, draft_length: int) -> "list[FedRow]":
        """The due token and its guesses, each through stage 0's layers; all but the last taken in.

        A tapped layer that lies in a later stage has no state yet for tokens of this burst. There
        the head reads their exit state instead: the newest state that exists. The real states
        replace it when they return, and the head's rows that used it are run again.
        """
        rows: list[FedRow] = []
        assert self._request is not None
        room = self._request.feed_limit - self._tree.next_position()
        for _ in range(min(1 + draft_length, room)):
            if rows:
                self._take_in(rows[-1])
                self._stand_in(rows[-1])
            level = self._level()
            assert level[0].drafted == bool(rows), "a burst begins with the token that is due"
            rows.append(self._feed(level, (level[0].token_id,)))
        if rows and self._late_depths:
            self._drafter.run_again_from(rows[0].nodes[0].position + 1)
        return rows

    def _stand_in(self, row: "FedRow") -> None:
        """The exit state for the tapped depths that this row has not reached."""
        head = self._drafter.head
        assert head is not None
        for depth in self._late_depths:
            state = row.back.taps[head.taps[0].depth]
            self._drafter.observe(depth, row.nodes[0].position, state)

    def _level(self) -> tuple[Node, ...]:
        """The node of the token that is due, or else those of guesses; none at the feed limit."""
        assert self._request is not None
        position, due = self._tree.next_position(), self._tree.due
        if position >= self._request.feed_limit:
            return ()
        begin = perf_counter()
        if due is None and self._request.width == 1:
            token_id = self._drafter.guess(position)
            level = self._number([Node(0, position, token_id, 1, drafted=True, final=True)])
        else:
            level = self._number_tree(self._tree_level(due))
        self._draft_seconds += perf_counter() - begin
        return level

    def _tree_level(self, due: tuple[int, int] | None) -> list[Child]:
        """The token that is due, with guesses behind it where a tick has two depths; or guesses."""
        if due is None:
            return self._drafter.children(self._tree.level, self._tree.leaves)
        tip = self._tree.tip
        assert tip is not None, "a token is due behind nothing"
        root, request = Child(tip, due[1], 0.0), self._request
        if request is None or not request.drafting or request.depth == 1:
            return [root]
        return [root, *self._drafter.behind_due(root)]

    def _number_tree(self, children: Sequence[Child]) -> tuple[Node, ...]:
        """Nodes of these guesses, and of a token that is due: it stands on the verified node."""
        serials = {id(child): self._serial + index for index, child in enumerate(children)}
        return self._number(
            [
                Node(
                    0,
                    child.position,
                    child.token_id,
                    1,
                    drafted=child.parent is not self._tree.tip,
                    final=True,
                    parent=_serial_above(child, serials, self._tree.tip),
                    score=child.score,
                )
                for child in children
            ]
        )

    def _prompt_node(self, plan: Prompt) -> Node:
        if plan.request is not None:
            self._request = plan.request
            self._tree.clear()
            self._drafter.begin(plan.request)
        count = len(plan.token_ids)
        node = Node(0, plan.start, None, count, drafted=False, final=plan.last)
        return self._number([node])[0]

    def _number(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """The nodes with the next serial numbers and the lowest free slots."""
        first, self._serial = self._serial, self._serial + len(nodes)
        slots = self._tree.slots.lowest(len(nodes))
        return tuple(
            replace(node, serial=first + index, slot=slots[index])
            for index, node in enumerate(nodes)
        )

    def _feed(
        self,
        nodes: tuple[Node, ...],
        token_ids: Sequence[int | None],
        request: Request | None = None,
    ) -> "FedRow":
        """Embed the tokens of a chunk or level and run stage 0's layers on them."""
        stage, first = self._worker.stage, nodes[0]
        hidden = stage.embed(torch.tensor(token_ids, device=stage.device))
        wanted = len(nodes) if first.final else 0
        tree = self._places(nodes)
        frame = Frame(first.serial, first.position, wanted, hidden, (), request, tree)
        return FedRow(nodes, *self._worker.process(frame))

    def _places(self, nodes: Sequence[Node]) -> tuple[tuple[int, int], ...]:
        """Slot and parent's slot of each node of a tree; nothing for a prompt or a chain."""
        assert self._request is not None
        if self._request.width == 1 or nodes[0].token_id is None:
            return ()
        above = {node.serial: node for node in (*self._tree.live, self._tree.tip, *nodes) if node}
        places = []
        for node in nodes:
            parent = self._tree.tip if node.parent is None else above[node.parent]
            assert parent is not None
            assert node.slot is not None
            places.append((node.slot, parent.last_slot))
        return tuple(places)

    def _take_in(self, row: "FedRow") -> None:
        """Nodes went through stage 0: their states are known, and they are the newest."""
        self._observe(row.nodes, row.back)
        self._tree.enter_level(row.nodes)


def _serial_above(child: Child, serials: Mapping[int, int], tip: Node | None) -> int | None:
    """The serial that a node names as its parent; None where it stands on the verified one."""
    above = child.parent
    if isinstance(above, Child):
        return serials[id(above)]
    return None if above is tip else above.serial


@dataclass(frozen=True, slots=True)
class FedRow:
    """Nodes that went through stage 0 at once, what leaves for stage 1, and what stage 0 keeps."""

    nodes: tuple[Node, ...]
    ahead: Frame
    back: Return


def join_rows(rows: Sequence[FedRow]) -> tuple[Frame, Return]:
    """One frame and one return for a tick; several rows have consecutive positions (a burst)."""
    frame, back = rows[0].ahead, rows[0].back
    if len(rows) == 1:
        return frame, back
    spans = (Span(0, frame.spans[0].begin, rows[-1].ahead.spans[0].end),)
    hidden = torch.cat([row.ahead.hidden for row in rows])
    wanted = sum(row.ahead.wanted for row in rows)
    kept = [row.back.logits for row in rows if row.back.logits is not None]
    joined = Return(
        back.stage,
        back.serial,
        back.position,
        token_ids=tuple(token for row in rows for token in row.back.token_ids),
        spans=spans,
        logits=torch.cat(kept) if kept else None,
    )
    return Frame(frame.serial, frame.position, wanted, hidden, spans), joined
