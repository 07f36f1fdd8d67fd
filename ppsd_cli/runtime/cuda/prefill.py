"""Prompts: chunks run through the same weights and caches as the ticks, then the first token.

Shapes: W tokens of a chunk, H hidden.
"""

import torch
from torch import Tensor

from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Node, Prompt, Request, Target
from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Output
from ppsd_cli.runtime.cuda.prompts import PromptLane


class Prefill:
    """Runs prompt chunks through all stages, as a graph, and through the head.

    ``first``: the token [1] after the prompt, still on the device, and its position; None before
    the last chunk.
    """

    def __init__(self, lane: PromptLane, output: Output, head: DraftHead | None) -> None:
        self._lane, self._output, self._head = lane, output, head
        self.first: tuple[Tensor, int] | None = None

    def run(self, plan: Prompt, request: Request, serial: int) -> tuple[Node, Target]:
        """One chunk: its node, and the last stage's answer."""
        count = len(plan.token_ids)
        node = Node(serial, plan.start, None, count, drafted=False, final=plan.last)
        hidden, taps = self._lane.run(plan.token_ids, plan.start)
        if self._head is not None:
            for depth, states in taps.items():
                self._head.observe(depth, plan.start, states)
            self._head.prefill(plan.start, count)
        return node, self._target(node, hidden[-1:], request)

    def _target(self, node: Node, hidden: Tensor, request: Request) -> Target:
        """The answer for a chunk whose last state is ``hidden`` [1, H]; the graph has no spans."""
        if not node.final:
            return Target(node.serial, None, ())
        position = node.position + node.tokens
        logits = self._output.logits(hidden)
        try:
            token = choose(logits, request.sampling, torch.tensor([position], device=logits.device))
        except ValueError as error:
            raise StageError(not_numbers(str(error), position)) from error
        self.first = (token, position)
        kept = logits[0].float().cpu() if request.keep_logits else None
        return Target(node.serial, int(token[0]), (), kept)


def not_numbers(what: str, position: int | None) -> str:
    """The message for logits that are no numbers."""
    where = "" if position is None else f" at position {position}"
    return f"{what}{where}; the weights or the number format (--dtype float32) are at fault"
