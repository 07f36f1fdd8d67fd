"""Stage 0: takes the boundary's results, decides, drafts, feeds, and runs its own layers."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch

from ppsd_cli.core.chain import Chain
from ppsd_cli.core.choose import choose
from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import Bubble, Burst, Node, Plan, Prompt, Request, Target, TickResult
from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import DraftHead
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
    """Runs ticks of stage 0 from plans. The accept rule itself is ``core.chain``."""

    def __init__(
        self, worker: StageWorker, head: DraftHead | None, link: Link, *, returning: tuple[int, ...]
    ) -> None:
        """``returning``: the stages after 0 that send returns, in order; the last stage is one."""
        self._worker, self._head, self._link = worker, head, link
        self._returning = returning
        self._stages = returning[-1] + 1 if returning else 1
        self._chain = Chain()
        self._request: Request | None = None
        self._tick = 0
        self._serial = 0
        self._sent: deque[tuple[int, tuple[Node, ...]]] = deque()
        self._draft_logits: list[Any] = []
        self._draft_seconds = 0.0
        self._own: Return | None = None
        self._head_next = 0  # first position whose row in the head is not as it should stay
        taps = () if head is None else head.taps
        self._late_depths = {tap.depth for tap in taps} - worker.stage.tap_depths

    @torch.inference_mode()
    def tick(self, plan: Plan) -> TickResult:
        """One tick: boundary, decision, draft, layers; in a burst the last two in turns."""
        begin = perf_counter()
        self._link.advance()
        targets = self._boundary()
        received = perf_counter()
        self._draft_logits, self._draft_seconds = [], 0.0
        entered = self._enter(plan)
        clock = Ticked(self._tick, begin, received, received + self._draft_seconds, perf_counter())
        self._tick += 1
        return TickResult(clock, targets, entered, tuple(self._draft_logits))

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
                self._observe(back)
                if stage == self._stages - 1:
                    targets = self._settle(nodes, back)
        while self._sent and self._sent[0][0] <= self._tick - self._stages:
            self._sent.popleft()
        return targets

    def _fed_at(self, tick: int) -> tuple[Node, ...]:
        return next((nodes for at, nodes in self._sent if at == tick), ())

    def _observe(self, back: Return) -> None:
        if self._head is not None:
            for depth, states in back.taps.items():
                self._head.observe(depth, back.position, states)

    def _settle(self, nodes: tuple[Node, ...], back: Return) -> tuple[Target, ...]:
        """Targets of nodes that the last stage has finished, judged in their order."""
        first = nodes[0]
        if self._head is not None and first.token_id is None:
            self._head.prefill(first.position, first.tokens)
            self._head_next = first.position + first.tokens
        if not back.token_ids:
            return (Target(first.serial, None, back.spans),)
        assert len(back.token_ids) == len(nodes), "a node has no target"
        logits = [None] * len(nodes) if back.logits is None else back.logits.unbind()
        targets = []
        for node, token_id, row in zip(nodes, back.token_ids, logits, strict=True):
            self._chain.verify(node.serial, token_id)
            targets.append(Target(node.serial, token_id, back.spans, row))
        return tuple(targets)

    def _enter(self, plan: Plan) -> tuple[Node, ...]:
        """Feed what the plan says; the nodes that entered."""
        if isinstance(plan, Bubble):
            return ()
        if isinstance(plan, Prompt):
            rows = [self._feed(self._prompt_node(plan), plan.token_ids, plan.request)]
        elif isinstance(plan, Burst):
            rows = self._burst(plan.draft_length)
        else:
            node = self._token_node()
            rows = [] if node is None else [self._feed(node, (node.token_id,))]
        if not rows:
            return ()
        frame, self._own = join_rows(rows)
        if self._stages > 1:
            self._link.send(frame)  # first: stage 1 may be waiting for it
        self._take_in(rows[-1])
        nodes = tuple(row.node for row in rows)
        self._sent.append((self._tick, nodes))
        return nodes

    def _burst(self, draft_length: int) -> "list[FedRow]":
        """The due token and its guesses, each through stage 0's layers; all but the last taken in.

        A tapped layer that lies in a later stage has no state yet for tokens of this burst. There
        the head reads their exit state instead: the newest state that exists. The real states
        replace it when they return, and the head's rows that used it are run again.
        """
        rows: list[FedRow] = []
        for _ in range(1 + draft_length):
            if rows:
                self._take_in(rows[-1])
                self._stand_in(rows[-1])
            node = self._token_node()
            if node is None:
                break
            assert node.drafted == bool(rows), "a burst begins with the token that is due"
            rows.append(self._feed(node, (node.token_id,)))
        if rows and self._late_depths:
            self._head_next = min(self._head_next, rows[0].node.position + 1)
        return rows

    def _stand_in(self, row: "FedRow") -> None:
        """The exit state for the tapped depths that this row has not reached."""
        assert self._head is not None
        for depth in self._late_depths:
            state = row.back.taps[self._head.taps[0].depth]
            self._head.observe(depth, row.node.position, state)

    def _token_node(self) -> Node | None:
        """The node of the token that is due, or else of a guess; None at the feed limit."""
        assert self._request is not None
        position, due = self._chain.next_position(), self._chain.due
        if position >= self._request.feed_limit:
            return None
        begin = perf_counter()
        token_id = self._draft(position) if due is None else due[1]
        self._draft_seconds += perf_counter() - begin
        return self._number(Node(0, position, token_id, 1, drafted=due is None, final=True))

    def _prompt_node(self, plan: Prompt) -> Node:
        if plan.request is not None:
            self._request = plan.request
            self._chain.clear()
        count = len(plan.token_ids)
        return self._number(Node(0, plan.start, None, count, drafted=False, final=plan.last))

    def _number(self, node: Node) -> Node:
        """The node with the next serial number."""
        self._serial += 1
        return replace(node, serial=self._serial - 1)

    def _draft(self, position: int) -> int:
        """Stage 0's guess for ``position``."""
        request = self._request
        assert request is not None
        assert self._head is not None, "drafting without a head"
        first = min(self._head_next, position - 1)
        logits = self._head.draft_logits(position - 1, rows=position - first)
        self._head_next = position
        where = torch.tensor([position], device=logits.device)
        try:
            chosen = choose(logits, request.sampling, where, token_ids=self._head.token_ids)
        except ValueError as error:
            raise StageError(f"stage 0: draft {error} at position {position}") from error
        if request.keep_logits:
            self._draft_logits.append(logits[0].float().cpu())
        if request.forced_drafts is not None:
            index = position - request.prompt_tokens
            if index < len(request.forced_drafts):
                return request.forced_drafts[index]
        return int(chosen[0])

    def _feed(
        self, node: Node, token_ids: Sequence[int | None], request: Request | None = None
    ) -> "FedRow":
        """Embed a node's tokens and run stage 0's layers on them."""
        stage = self._worker.stage
        hidden = stage.embed(torch.tensor(token_ids, device=stage.device))
        frame = Frame(node.serial, node.position, int(node.final), hidden, (), request)
        return FedRow(node, *self._worker.process(frame))

    def _take_in(self, row: "FedRow") -> None:
        """A node went through stage 0: its states are known, and it is the newest."""
        self._observe(row.back)
        self._chain.enter(row.node)


@dataclass(frozen=True, slots=True)
class FedRow:
    """A node that went through stage 0, what leaves for stage 1, and what stage 0 keeps."""

    node: Node
    ahead: Frame
    back: Return


def join_rows(rows: Sequence[FedRow]) -> tuple[Frame, Return]:
    """One frame and one return for the nodes of a tick, which have consecutive positions."""
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
