"""Times of a stage's work in this process: draft head, layers, LM matrix with the choice.

The work runs as a stage runs it, for the token at a given place of the cache, again and again.
A part's time is that of the work with it less that of the work without it, so that what it drives
out of the processor's caches counts as its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

import torch

from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.head_files import HeadInfo, read_info
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.random_weights import RANDOM_HEADS
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.pipeline import RAW_EXIT, PipelineConfig, load_head, load_worker

_GREEDY = Sampling()
_LEAST = 3
"""Turns that a window takes at least, however long they last."""


@dataclass(frozen=True, slots=True)
class Work:
    """One turn: a draft of ``head`` if there is one, the first ``layers`` of the stage, and with
    ``lm`` the target's choice.

    ``length``: slots of the cache that the token sees; ``width``: rows of the layers' call;
    ``threads``: torch's, 0 leaves them alone.
    """

    layers: int
    length: int = 1
    lm: bool = False
    head: str | None = None
    width: int = 1
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """When to work, in seconds of the host's monotonic clock; turns before ``begin`` warm up."""

    start: float
    begin: float
    end: float

    @classmethod
    def soon(cls, *, warm: float, seconds: float, after: float = 0.02) -> "Window":
        """A window that opens in a moment, so that several processes can be told of it."""
        start = monotonic() + after
        return cls(start, start + warm, start + warm + seconds)


class Parts:
    """One loaded stage and draft heads whose parts can be timed."""

    def __init__(self, config: PipelineConfig, stage: int, heads: tuple[str, ...]) -> None:
        """``heads``: those that are timed here, beside the first stage's embeddings."""
        worker = load_worker(replace(config, head=None), stage)
        self._stage: Stage = worker.stage
        self._heads: dict[str, DraftHead] = {}
        for head in heads:
            fitting = replace(config, head=head, split=head_split(head, config.split))
            loaded = load_head(fitting, self._stage)
            assert loaded is not None
            self._heads[head] = loaded
        device, hidden = self._stage.device, self._stage.spec.hidden
        torch.manual_seed(0)
        self._hidden = torch.randn(64, hidden).to(device, self._stage.dtype)

    @torch.inference_mode()
    def run(self, work: Work | None, window: Window) -> list[float]:
        """Seconds of each turn that began in the window; None is idle."""
        if work is None:
            return []
        if work.threads:
            torch.set_num_threads(work.threads)
        sleep(max(0.0, window.start - monotonic()))
        steps = self._steps(work)
        times: list[float] = []
        while True:
            began = monotonic()
            if began >= window.end and len(times) >= _LEAST:
                return times
            for step in steps:
                step()
            self._wait()
            if began >= window.begin or began >= window.end:
                times.append(monotonic() - began)

    def _steps(self, work: Work) -> list[Callable[[], object]]:
        steps: list[Callable[[], object]] = []
        if work.head is not None:
            steps.append(self._draft(self._heads[work.head], work.length))
        steps.append(self._layers(work))
        return [*steps, self._target] if work.lm else steps

    def _layers(self, work: Work) -> Callable[[], object]:
        stage = self._stage
        part = stage if work.layers >= len(stage.layers) else stage.first_layers(work.layers)
        start, hidden = max(0, work.length - work.width), self._hidden[: work.width]
        return lambda: part.forward(hidden, Rows.chain(start, work.width, stage.device))

    def _target(self) -> object:
        output = self._stage.output
        assert output is not None, "this stage has no LM matrix"
        where = torch.zeros(1, dtype=torch.int64, device=self._stage.device)
        return choose(output.logits(self._hidden[:1]), _GREEDY, where).tolist()

    def _draft(self, head: DraftHead, length: int) -> Callable[[], object]:
        position = max(0, length - 1)
        where = torch.tensor([position + 1], device=self._stage.device)

        def turn() -> object:
            logits = head.draft_logits(position)
            return int(choose(logits, _GREEDY, where, token_ids=head.token_ids)[0])

        return turn

    def _wait(self) -> None:
        if self._stage.device.type != "cpu":
            torch.get_device_module(self._stage.device).synchronize(self._stage.device)


def head_split(head: str, split: tuple[int, ...]) -> tuple[int, ...]:
    """A split of as many layers as ``split`` that a head fits: cut where it reads."""
    layers = sum(split)
    if head == RAW_EXIT or head in RANDOM_HEADS:
        return split if len(split) > 1 else (layers - 1, 1)
    return tap_split(read_info(Path(head)), layers)


def tap_split(info: HeadInfo, layers: int) -> tuple[int, ...]:
    """The split of ``layers`` whose stages end where the head reads."""
    ends = sorted({tap.depth for tap in info.taps} | {layers})
    return tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False))
