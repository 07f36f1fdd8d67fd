"""Prompts: chunks run eagerly through the same weights and caches as the graphs.

Shapes: W tokens of a chunk, H hidden.
"""

from time import perf_counter

import torch
from torch import Tensor

from ppsd_cli.core.choose import choose
from ppsd_cli.core.events import Span
from ppsd_cli.core.plan import Node, Prompt, Request, Target
from ppsd_cli.errors import StageError
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage


class Prefill:
    """Runs prompt chunks through all stages and the head.

    ``first``: the token [1] after the prompt, still on the device, and its position; None before
    the last chunk.
    """

    def __init__(self, stages: list[Stage], head: DraftHead | None) -> None:
        self._stages, self._head = stages, head
        self.first: tuple[Tensor, int] | None = None

    def run(self, plan: Prompt, request: Request, serial: int) -> tuple[Node, Target]:
        """One chunk: its node, and the last stage's answer."""
        count = len(plan.token_ids)
        node = Node(serial, plan.start, None, count, drafted=False, final=plan.last)
        first = self._stages[0]
        hidden = first.embed(torch.tensor(plan.token_ids, device=first.device))
        spans: list[Span] = []
        for index, stage in enumerate(self._stages):
            since = perf_counter()
            hidden, taps = stage.forward(hidden, Rows.chain(plan.start, count, stage.device))
            for depth, states in taps.items():
                if self._head is not None:
                    self._head.observe(depth, plan.start, states)
            spans.append(Span(index, since, perf_counter()))
        if self._head is not None:
            self._head.prefill(plan.start, count)
        return node, self._target(node, hidden[-1:], tuple(spans), request)

    def _target(
        self, node: Node, hidden: Tensor, spans: tuple[Span, ...], request: Request
    ) -> Target:
        """The answer for a chunk whose last state is ``hidden`` [1, H]."""
        if not node.final:
            return Target(node.serial, None, spans)
        output = self._stages[-1].output
        assert output is not None
        position = node.position + node.tokens
        logits = output.logits(hidden)
        try:
            token = choose(logits, request.sampling, torch.tensor([position], device=logits.device))
        except ValueError as error:
            raise StageError(not_numbers(str(error), position)) from error
        self.first = (token, position)
        kept = logits[0].float().cpu() if request.keep_logits else None
        return Target(node.serial, int(token[0]), spans, kept)


def not_numbers(what: str, position: int | None) -> str:
    """The message for logits that are no numbers."""
    where = "" if position is None else f" at position {position}"
    return f"{what}{where}; the weights or the number format (--dtype float32) are at fault"
