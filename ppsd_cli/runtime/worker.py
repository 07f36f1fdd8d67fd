"""The work of one stage on one frame, the same in every runner."""

from time import perf_counter

import torch

from ppsd_cli.core.choose import choose
from ppsd_cli.core.events import Span
from ppsd_cli.core.plan import Request
from ppsd_cli.errors import StageError
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.frames import Frame, Return


class StageWorker:
    """Runs frames through a stage and, on the last one, chooses the target."""

    def __init__(self, index: int, stage: Stage) -> None:
        self.index, self.stage = index, stage
        self._request: Request | None = None

    @torch.inference_mode()
    def process(self, frame: Frame) -> tuple[Frame, Return]:
        """The frame for the next stage, and what stage 0 gets from this one."""
        begin = perf_counter()
        if frame.request is not None:
            self._request = frame.request
        stage = self.stage
        count = frame.hidden.shape[0]
        rows = Rows.chain(frame.position, count, stage.device)
        hidden, taps = stage.forward(frame.hidden.to(stage.device, stage.dtype), rows)
        token_ids: tuple[int, ...] = ()
        logits = None
        if stage.part.predicts and frame.wanted:
            end = frame.position + count
            token_ids, logits = self._targets(hidden[-frame.wanted :], end - frame.wanted + 1)
        spans = (*frame.spans, Span(self.index, begin, perf_counter()))
        ahead = Frame(frame.serial, frame.position, frame.wanted, hidden, spans, frame.request)
        back = Return(self.index, frame.serial, frame.position, taps, token_ids, spans, logits)
        return ahead, back

    def _targets(
        self, hidden: torch.Tensor, position: int
    ) -> tuple[tuple[int, ...], torch.Tensor | None]:
        """The full model's tokens from ``position`` on, after rows with states [W, H]."""
        assert self.stage.output is not None
        assert self._request is not None
        logits = self.stage.output.logits(hidden)
        where = torch.arange(position, position + hidden.shape[0], device=logits.device)
        try:
            tokens = choose(logits, self._request.sampling, where).tolist()
        except ValueError as error:
            raise StageError(
                f"stage {self.index}: {error} at position {position}; "
                "the weights or the number format (--dtype float32) are at fault"
            ) from error
        return tuple(tokens), logits.float().cpu() if self._request.keep_logits else None
