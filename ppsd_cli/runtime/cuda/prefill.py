"""Prompts: chunks run through the same weights and caches as the ticks, then the first token.

Shapes: W tokens of a chunk, H hidden.
"""

from torch import Tensor

from ppsd_cli.core.plan import Node, Prompt, Request, Target
from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.layers import Shape
from ppsd_cli.runtime.cuda.crew import Crew
from ppsd_cli.runtime.cuda.first_token import FirstToken
from ppsd_cli.runtime.cuda.prompt_head import PromptHead
from ppsd_cli.runtime.cuda.prompts import PromptLane, bucket_of


class PromptLine:
    """The lanes of all devices, one after the other, and the head's part on the first."""

    def __init__(self, crew: Crew, head: DraftHead | None, *, chunk: int) -> None:
        """``chunk``: prompt tokens of a plan, at most."""
        self._crew = crew
        self.lanes = [
            PromptLane([lane.stage for lane in m.pod.lanes], m.recorder, chunk=chunk)
            for m in crew.members
        ]
        first, self._head = self.lanes[0], None
        if head is not None and head.weights.blocks:
            shape = Shape.of(crew.home.pod.lanes[0].stage.spec)
            self._head = PromptHead(head, shape, first.rows, first.recorder, taps=first.taps)

    def run(self, token_ids: tuple[int, ...], start: int, *, drafting: bool) -> Tensor:
        """States [W, H] of a chunk of W tokens after the last layer, on the last device.

        They lie in a buffer that the next chunk overwrites. ``drafting``: what the head is to
        read of these tokens is made, too.
        """
        count, crew = len(token_ids), self._crew
        head = self._head if drafting else None
        self._prepare(bucket_of(start + count), head)
        hidden: Tensor | None = None
        for number, lane in enumerate(self.lanes):
            if hidden is not None:
                hidden = crew.hand_over(hidden, number - 1, number)
            with lane.recorder.stream():
                hidden = lane.run(token_ids, start, hidden)
            if head is not None and number:
                for depth, states in lane.taps.items():
                    states = crew.hand_over(states[:count], number, 0)
                    with crew.stream():
                        head.take(depth, states)
        if head is not None:
            with crew.stream():
                head.run(start + count)
        crew.meet()
        assert hidden is not None
        return hidden

    def _prepare(self, bucket: int, head: PromptHead | None) -> None:
        """Have the graphs before anything is told: recording them needs empty chunks."""
        for lane in self.lanes:
            with lane.recorder.stream():
                lane.prepare(bucket)
        if head is not None:
            with self._crew.stream():
                head.prepare(bucket)


class Prefill:
    """Runs prompt chunks through all stages, and through the head.

    ``first``: the token after the prompt and its position; None before the last chunk.
    """

    def __init__(self, crew: Crew, head: DraftHead | None, *, chunk: int) -> None:
        """``chunk``: prompt tokens of a plan, at most."""
        self._line = PromptLine(crew, head, chunk=chunk)
        tail = crew.tail
        assert tail.pod.chooser is not None
        self._choice = FirstToken(tail.pod.chooser, tail.recorder, tail.pod.states[0])
        self.first: tuple[int, int] | None = None

    def run(self, plan: Prompt, request: Request, serial: int) -> tuple[Node, Target]:
        """One chunk: its node, and the last stage's answer."""
        node = Node(serial, plan.start, None, len(plan.token_ids), drafted=False, final=plan.last)
        hidden = self._line.run(plan.token_ids, plan.start, drafting=request.drafting)
        return node, self._target(node, hidden, request)

    def _target(self, node: Node, hidden: Tensor, request: Request) -> Target:
        """The answer for a chunk with states ``hidden`` [W, H]; the graph has no spans."""
        if not node.final:
            return Target(node.serial, None, ())
        position = node.position + node.tokens
        token_id = self._choice.choose(hidden, position, request.sampling)
        if token_id < 0:
            raise StageError(not_numbers("logits are not numbers (NaN)", position))
        self.first = (token_id, position)
        kept = self._choice.logits() if request.keep_logits else None
        return Target(node.serial, token_id, (), kept)


def not_numbers(what: str, position: int | None) -> str:
    """The message for logits that are no numbers."""
    where = "" if position is None else f" at position {position}"
    return f"{what}{where}; the weights or the number format (--dtype float32) are at fault"
