"""What enters the pipeline, what is final and what is void: pure Python, one answer at a time."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ppsd_cli.core.events import (
    Committed,
    Entered,
    Event,
    Finished,
    FinishReason,
    Flushed,
    Outcome,
    Pruned,
    Verified,
)
from ppsd_cli.core.plan import (
    Bubble,
    Burst,
    Node,
    Plan,
    Prompt,
    Request,
    Step,
    Target,
    TickResult,
    chunks,
)
from ppsd_cli.core.tree import Tree, Verdict


@dataclass(frozen=True, slots=True)
class Limits:
    """When an answer ends: lengths in tokens; ``context`` counts prompt and answer."""

    max_new_tokens: int
    context: int
    eos_ids: frozenset[int] = frozenset()

    def feed_limit(self, prompt_tokens: int) -> int:
        """The first position that need not be fed: nothing after it is wanted."""
        return min(prompt_tokens + self.max_new_tokens, self.context) - 1


class Schedule:
    """Plans for a runner, and events from its results, for one answer.

    Plans are made without knowing the results, so they may run ahead: prompt chunks, bubbles
    until the first token is known, then one step a tick (chain and tree), one step in ``stages``
    ticks (not drafting: each token waits for the full model), or one burst in ``stages`` ticks
    (EESD: each burst waits for the full model, and what it commits is decided row by row as in a
    chain).
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        *,
        stages: int,
        chunk: int,
        request: Request,
        limits: Limits,
    ) -> None:
        self._prompt_end = len(prompt)
        self._feed: Plan = Burst(request.draft_length) if request.draft_length else Step()
        every_tick = request.drafting and not request.draft_length
        self._waiting = 0 if every_tick else stages - 1
        self._limits = limits
        self._tree = Tree()
        self._planned: deque[Plan] = deque(_prompt_plans(prompt, chunk, request))
        self._planned.extend([Bubble()] * (stages - 1))
        self.done = False

    def next_plan(self) -> Plan:
        """What to ask of the runner in the next tick."""
        if not self._planned:
            self._planned.extend([self._feed, *[Bubble()] * self._waiting])
        return self._planned.popleft()

    def apply(self, result: TickResult) -> Iterator[Event]:
        """The facts that follow from one finished tick, in their order."""
        tick = result.clock.tick
        for target in result.targets:
            if not self.done:
                yield from self._settle(tick, target)
        for node in result.entered:
            if not self.done:
                yield self._follow(tick, node)
        yield result.clock

    def _settle(self, tick: int, target: Target) -> Iterator[Event]:
        if target.token_id is None:
            return
        verdict = self._tree.verify(target.serial, target.token_id)
        live = verdict is not None
        yield Verified(tick, target.serial, target.token_id, live, target.spans)
        if verdict is None:
            return
        yield Committed(tick, verdict.position, verdict.token_id, verdict.outcome, verdict.draft_id)
        if verdict.void:
            kind = Flushed if verdict.outcome is Outcome.CORRECTED else Pruned
            yield kind(tick, verdict.position, tuple(n.serial for n in verdict.void))
        reason = self._ending(verdict)
        if reason is not None:
            self.done = True
            yield Finished(tick, reason)

    def _ending(self, verdict: Verdict) -> FinishReason | None:
        if verdict.token_id in self._limits.eos_ids:
            return FinishReason.STOP
        answer = verdict.position + 1 - self._prompt_end
        if answer >= self._limits.max_new_tokens:
            return FinishReason.LENGTH
        if verdict.position + 1 >= self._limits.context:
            return FinishReason.CONTEXT
        return None

    def _follow(self, tick: int, node: Node) -> Entered:
        if node.token_id is not None:
            due = self._tree.due
            assert node.position == self._tree.end_of_parent(node), "runner and schedule disagree"
            assert due is None or node.token_id == due[1], "a correction was not fed"
            assert node.drafted == (due is None), "a draft was fed in place of a due token"
        self._tree.enter(node)
        return Entered(
            tick,
            node.serial,
            node.position,
            node.token_id,
            node.tokens,
            node.drafted,
            node.parent,
        )


def _prompt_plans(prompt: tuple[int, ...], chunk: int, request: Request) -> list[Plan]:
    parts = chunks(prompt, chunk)
    return [
        Prompt(
            token_ids=part,
            start=index * chunk,
            last=index == len(parts) - 1,
            request=request if index == 0 else None,
        )
        for index, part in enumerate(parts)
    ]
