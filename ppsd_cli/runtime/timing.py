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

from ppsd_cli.core.choose import best_tokens, choose, perturbed
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.tree import CONTINUED
from ppsd_cli.model.branches import Branches
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

    ``length``: slots of the cache that the token sees; ``width``: nodes of the level that goes
    through the stage, above 1 a tree's, and as many leaves behind which the head drafts; ``depth``
    2: it goes on behind the best of its guesses; ``threads``: torch's, 0 leaves them alone.
    """

    layers: int
    length: int = 1
    lm: bool = False
    head: str | None = None
    width: int = 1
    threads: int = 0
    depth: int = 1


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
        for each in self._heads.values():  # of zeros all guesses would be level
            each.rings.normal_()

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
        level = _Level(work, self._stage) if work.width > 1 else None
        steps: list[Callable[[], object]] = []
        if work.head is not None:
            head = self._heads[work.head]
            steps.append(_draft(head, work.length) if level is None else level.draft(head))
            if work.depth > 1:
                assert level is not None, "two depths need a tree"
                steps.append(level.go_on(head))
        steps.append(self._layers(work, level))
        return [*steps, self._target(work.width)] if work.lm else steps

    def _layers(self, work: Work, level: "_Level | None") -> Callable[[], object]:
        stage = self._stage
        part = stage if work.layers >= len(stage.layers) else stage.first_layers(work.layers)
        hidden = self._hidden[: work.width]
        if level is not None:
            return lambda: part.forward(hidden, level.enter())
        start = max(0, work.length - 1)
        return lambda: part.forward(hidden, Rows.chain(start, 1, stage.device))

    def _target(self, width: int) -> Callable[[], object]:
        output = self._stage.output
        assert output is not None, "this stage has no LM matrix"
        where = torch.zeros(width, dtype=torch.int64, device=self._stage.device)
        return lambda: choose(output.logits(self._hidden[:width]), _GREEDY, where).tolist()

    def _wait(self) -> None:
        if self._stage.device.type != "cpu":
            torch.get_device_module(self._stage.device).synchronize(self._stage.device)


class _Level:
    """One level of a tree, all behind the same token, that enters again and again."""

    def __init__(self, work: Work, stage: Stage) -> None:
        self._stage = stage
        self._width, self._start = work.width, max(1, work.length - work.width)
        self._slots = list(range(self._start, self._start + work.width))
        self._where = torch.full((work.width,), self._start + 1, device=stage.device)
        self._branches = Branches(self._slots[-1] + 1, keep=2, device=stage.device)
        self._branches.chain(0, self._start)
        self.enter()

    def enter(self) -> Rows:
        """The nodes as rows, behind a chain."""
        parent = self._start - 1
        self._branches.chain(parent, 1)
        return self._branches.enter(self._slots, [parent] * self._width)

    def draft(self, head: DraftHead) -> Callable[[], object]:
        """Guesses behind all of them, as ``runtime.drafting`` makes them."""
        lags = max(len(head.taps), 1)

        def turn() -> object:
            lineage = self._branches.ancestors(self._slots, lags)
            rows = replace(self._branches.rows(self._slots), ancestors=lineage)
            scores = perturbed(head.branch_logits(rows), _GREEDY, self._where, head.token_ids)
            return best_tokens(scores, self._width, scale=1.0, token_ids=head.token_ids)

        return turn

    def go_on(self, head: DraftHead) -> Callable[[], object]:
        """Guesses behind the best of those, which here stand on different nodes."""
        slots = self._slots[:CONTINUED]
        where = self._where[:CONTINUED] + 1
        token_ids = torch.arange(len(slots), device=self._stage.device)

        def turn() -> object:
            rows = self._branches.rows(slots)
            logits = head.second_logits(rows, self._stage.embed(token_ids))
            scores = perturbed(logits, _GREEDY, where, head.token_ids)
            return best_tokens(scores, self._width, scale=1.0, token_ids=head.token_ids)

        return turn


def _draft(head: DraftHead, length: int) -> Callable[[], object]:
    """The chain's guess."""
    position = max(0, length - 1)
    where = torch.tensor([position + 1], device=head.weights.output.norm.device)

    def turn() -> object:
        logits = head.draft_logits(position)
        return int(choose(logits, _GREEDY, where, token_ids=head.token_ids)[0])

    return turn


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
