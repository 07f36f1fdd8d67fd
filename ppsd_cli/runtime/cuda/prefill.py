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
from ppsd_cli.runtime.cuda.prompts import PromptLine
from ppsd_cli.runtime.cuda.recorder import Immediate, Recorder


class Prefill:
    """Runs prompt chunks through all stages, as a graph, and through the head.

    ``first``: the token after the prompt and its position; None before the last chunk.
    """

    def __init__(
        self, line: PromptLine, output: Output, head: DraftHead | None, tail: Recorder | Immediate
    ) -> None:
        """``tail``: of the device with the LM head."""
        self._line, self._output, self._head, self._tail = line, output, head, tail
        self.first: tuple[int, int] | None = None

    def run(self, plan: Prompt, request: Request, serial: int) -> tuple[Node, Target]:
        """One chunk: its node, and the last stage's answer."""
        count = len(plan.token_ids)
        node = Node(serial, plan.start, None, count, drafted=False, final=plan.last)
        hidden, taps = self._line.run(plan.token_ids, plan.start)
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
        with self._tail.stream():
            logits = self._output.logits(hidden)
            where = torch.tensor([position], device=logits.device)
            try:
                token_id = int(choose(logits, request.sampling, where)[0])
            except ValueError as error:
                raise StageError(not_numbers(str(error), position)) from error
            kept = logits[0].float().cpu() if request.keep_logits else None
        self.first = (token_id, position)
        return Target(node.serial, token_id, (), kept)


def not_numbers(what: str, position: int | None) -> str:
    """The message for logits that are no numbers."""
    where = "" if position is None else f" at position {position}"
    return f"{what}{where}; the weights or the number format (--dtype float32) are at fault"
