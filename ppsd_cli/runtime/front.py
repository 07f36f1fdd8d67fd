"""Stage 0: takes the boundary's results, decides, drafts, feeds, and runs its own layers."""

from collections import deque
from time import perf_counter
from typing import Any, Protocol

import torch

from ppsd_cli.core.chain import Chain
from ppsd_cli.core.choose import choose
from ppsd_cli.core.events import Ticked
from ppsd_cli.core.plan import Bubble, Node, Plan, Prompt, Request, Target, TickResult
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
        self._sent: deque[tuple[int, Node]] = deque()
        self._draft_logits: Any = None
        self._own: Return | None = None

    @torch.inference_mode()
    def tick(self, plan: Plan) -> TickResult:
        """One tick: boundary, decision, draft, layers."""
        begin = perf_counter()
        self._link.advance()
        target = self._boundary()
        received = perf_counter()
        self._draft_logits = None
        fed = self._next(plan)
        drafted = perf_counter()
        entered = None if fed is None else self._feed(*fed, plan)
        clock = Ticked(self._tick, begin, received, drafted, perf_counter())
        self._tick += 1
        return TickResult(clock, target, entered, self._draft_logits)

    def _boundary(self) -> Target | None:
        """Take in what the stages finished in the last tick; the target that is due, if any.

        The node that was fed in tick t - 1 - s has just left stage s.
        """
        target = None
        for stage in self._returning or (0,):
            node = self._fed_at(self._tick - 1 - stage)
            if node is not None:
                back = self._link.receive(stage) if stage else self._own
                assert back is not None
                assert back.serial == node.serial, "a return is out of order"
                self._observe(back)
                if stage == self._stages - 1:
                    target = self._settle(node, back)
        while self._sent and self._sent[0][0] <= self._tick - self._stages:
            self._sent.popleft()
        return target

    def _fed_at(self, tick: int) -> Node | None:
        return next((node for at, node in self._sent if at == tick), None)

    def _observe(self, back: Return) -> None:
        if self._head is not None:
            for depth, states in back.taps.items():
                self._head.observe(depth, back.position, states)

    def _settle(self, node: Node, back: Return) -> Target:
        if self._head is not None and node.token_id is None:
            self._head.prefill(node.position, node.tokens)
        if back.token_id is not None:
            self._chain.verify(back.serial, back.token_id)
        return Target(back.serial, back.token_id, back.spans, back.logits)

    def _next(self, plan: Plan) -> tuple[Node, list[int]] | None:
        """The node that enters in this tick and its token ids; None for a bubble."""
        if isinstance(plan, Bubble):
            return None
        if isinstance(plan, Prompt):
            return self._prompt_node(plan)
        assert self._request is not None
        position = self._chain.next_position()
        if position >= self._request.feed_limit:
            return None
        due = self._chain.due
        token_id = self._draft(position) if due is None else due[1]
        node = Node(self._serial, position, token_id, 1, drafted=due is None, final=True)
        return node, [token_id]

    def _prompt_node(self, plan: Prompt) -> tuple[Node, list[int]]:
        if plan.request is not None:
            self._request = plan.request
            self._chain.clear()
        count = len(plan.token_ids)
        node = Node(self._serial, plan.start, None, count, drafted=False, final=plan.last)
        return node, list(plan.token_ids)

    def _draft(self, position: int) -> int:
        """Stage 0's guess for ``position``."""
        request = self._request
        assert request is not None
        assert self._head is not None, "drafting without a head"
        logits = self._head.draft_logits(position - 1)
        where = torch.tensor([position], device=logits.device)
        try:
            chosen = choose(logits, request.sampling, where, token_ids=self._head.token_ids)
        except ValueError as error:
            raise StageError(f"stage 0: draft {error} at position {position}") from error
        if request.keep_logits:
            self._draft_logits = logits[0].float().cpu()
        if request.forced_drafts is not None:
            index = position - request.prompt_tokens
            if index < len(request.forced_drafts):
                return request.forced_drafts[index]
        return int(chosen[0])

    def _feed(self, node: Node, token_ids: list[int], plan: Plan) -> Node:
        stage = self._worker.stage
        hidden = stage.embed(torch.tensor(token_ids, device=stage.device))
        request = plan.request if isinstance(plan, Prompt) else None
        frame = Frame(node.serial, node.position, node.final, hidden, (), request)
        ahead, back = self._worker.process(frame)
        if self._stages > 1:
            self._link.send(ahead)  # first: stage 1 may be waiting for it
        self._observe(back)
        self._chain.enter(node)
        self._sent.append((self._tick, node))
        self._serial += 1
        self._own = back
        return node
