"""The work of one stage on one frame, the same in every runner."""

from dataclasses import replace
from time import perf_counter

import torch

from ppsd_cli.core.choose import choose
from ppsd_cli.core.events import Span
from ppsd_cli.core.plan import Request
from ppsd_cli.errors import StageError
from ppsd_cli.model.branches import Branches
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.frames import Frame, Return


class StageWorker:
    """Runs frames through a stage and, on the last one, chooses the targets."""

    def __init__(self, index: int, stage: Stage, branches: Branches | None = None) -> None:
        """``branches``: who sees whom, where levels of a tree may come."""
        self.index, self.stage, self.branches = index, stage, branches
        self._request: Request | None = None

    @torch.inference_mode()
    def process(self, frame: Frame) -> tuple[Frame, Return]:
        """The frame for the next stage, and what stage 0 gets from this one."""
        begin = perf_counter()
        if frame.request is not None:
            self._request = frame.request
        stage = self.stage
        rows = self._rows(frame)
        hidden, taps = stage.forward(frame.hidden.to(stage.device, stage.dtype), rows)
        token_ids: tuple[int, ...] = ()
        logits = None
        if stage.part.predicts and frame.wanted:
            token_ids, logits = self._targets(
                hidden[-frame.wanted :], rows.positions[-frame.wanted :] + 1
            )
        spans = (*frame.spans, Span(self.index, begin, perf_counter()))
        ahead = replace(frame, hidden=hidden, spans=spans)
        back = Return(self.index, frame.serial, frame.position, taps, token_ids, spans, logits)
        return ahead, back

    def _rows(self, frame: Frame) -> Rows:
        """Where the rows of a frame belong, and what each may see."""
        if frame.tree:
            assert self.branches is not None, "a tree on stages that were made for chains"
            slots, parents = zip(*frame.tree, strict=True)
            return self.branches.enter(slots, parents)
        count = frame.hidden.shape[0]
        if self.branches is not None:
            self.branches.chain(frame.position, count)
        return Rows.chain(frame.position, count, self.stage.device)

    def _targets(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[tuple[int, ...], torch.Tensor | None]:
        """The full model's tokens for ``positions`` [W], after rows with states [W, H]."""
        assert self.stage.output is not None
        assert self._request is not None
        logits = self.stage.output.logits(hidden)
        try:
            tokens = choose(logits, self._request.sampling, positions).tolist()
        except ValueError as error:
            raise StageError(
                f"stage {self.index}: {error} at position {int(positions[0])}; "
                "the weights or the number format (--dtype float32) are at fault"
            ) from error
        return tuple(tokens), logits.float().cpu() if self._request.keep_logits else None
