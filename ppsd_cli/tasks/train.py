"""Train draft heads: the frozen model runs once per batch for all of them.

Shapes: B texts, T positions, n answer tokens (padded), H hidden.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import HeadWeights, Tap
from ppsd_cli.model.layers import Shape, rms_norm
from ppsd_cli.model.one_pass import (
    Backbone,
    Pieces,
    backbone_states,
    compiled,
    head_states,
    second_one_pass,
)
from ppsd_cli.tasks.checkpoint import Progress, load_checkpoint, save_checkpoint
from ppsd_cli.tasks.dataset import Batch, Batches
from ppsd_cli.tasks.evaluate import HeadScore, measure
from ppsd_cli.tasks.head_init import TrainableHead
from ppsd_cli.tasks.loss import LossPieces, losses_and_gradients
from ppsd_cli.tasks.optimize import Optimizer, Schedule, World


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Numbers of one training run. Times in seconds, intervals in steps."""

    steps: int
    accumulate: int = 1
    warmup: int = 100
    weight_decay: float = 0.01
    time_limit: float | None = None
    log_every: int = 50
    eval_every: int = 500
    checkpoint_every: int = 500
    compile: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Averages since the last report, by head. ``scores``: held-out, when this step was an
    evaluation. ``second``: acceptance of each head's second level, None where it has none."""

    step: int
    elapsed: float
    progress: float
    losses: tuple[float, ...]
    acceptance: tuple[float, ...]
    tokens_per_second: float
    scores: tuple[HeadScore, ...] | None = None
    second: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What a run works on. ``identity`` are the settings that a checkpoint must share.

    ``on_report`` gets a Report at every log interval and measurement; ``on_save`` is called after
    each checkpoint; ``stop`` says whether to save and stop now.
    """

    backbone: Backbone
    heads: Sequence[TrainableHead]
    train: Batches
    held_out: Batches
    folder: Path
    identity: dict[str, Any]
    world: World
    on_report: Callable[[Report], None]
    on_save: Callable[[Progress], None]
    stop: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: ``finished`` is False where it was stopped. ``raw``: the bare exits."""

    progress: Progress
    finished: bool
    scores: tuple[HeadScore, ...]
    raw: dict[int, HeadScore]


class Trainer:
    """One training run."""

    def __init__(self, job: Job, settings: TrainSettings) -> None:
        self.job, self.settings = job, settings
        self.pieces = Pieces.compiled() if settings.compile else Pieces()
        self._loss = LossPieces.compiled(compiled) if settings.compile else LossPieces()
        self.optimizer = Optimizer(job.heads, settings.weight_decay)
        self.schedule = Schedule(settings.steps, settings.warmup, settings.time_limit)
        self._shape = Shape.of(job.backbone.spec)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self._doubled = [i for i, head in enumerate(job.heads) if head.plan.depth > 1]
        guessers = len(job.heads) + len(self._doubled)
        self._monitor = Monitor(guessers, job.backbone.device, job.world)
        self._began = 0.0

    def run(self, *, resume: bool) -> Outcome:
        """Train to the end of the schedule, or until ``stop``; StageError on NaN."""
        start = Progress(0, 0.0)
        if resume:
            start = load_checkpoint(
                self.job.folder, self.job.heads, self.optimizer, self.job.identity
            )
        raw = self._raw_scores()
        self._began = time.monotonic() - start.elapsed
        step, finished = start.step, True
        last_report = time.monotonic()
        while True:
            elapsed, stop = self._agree()
            if self.schedule.progress(step, elapsed) >= 1:
                break
            if stop:
                finished = False
                break
            self._step(step, self.schedule.factor(step, elapsed))
            step += 1
            evaluate = step % self.settings.eval_every == 0
            if evaluate or step % self.settings.log_every == 0:
                scores = self._scores() if evaluate else None
                last_report = self._report(step, last_report, scores)
            if step % self.settings.checkpoint_every == 0:
                self._save(step)
        self._save(step)
        final = self._scores() if finished else []
        return Outcome(Progress(step, self._elapsed()), finished, tuple(final), raw)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _agree(self) -> tuple[float, bool]:
        """Elapsed seconds and whether to stop, the same in all processes."""
        values = [self._elapsed(), float(self.job.stop())]
        elapsed, stop = self.job.world.highest(values, self.job.backbone.device)
        return elapsed, stop > 0

    def _step(self, step: int, factor: float) -> None:
        """One optimizer step over ``accumulate`` batches."""
        world, count = self.job.world, self.settings.accumulate
        for part in range(count):
            index = (step * count + part) * world.size + world.rank
            batch = self.job.train[index].to(self.job.backbone.device)
            losses, hits = self._backward(batch, 1.0 / count)
            self._monitor.add(losses, hits, batch)
        norms = self.optimizer.step(factor)
        self._monitor.check(step, norms)

    def _backward(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """Add the gradients of one batch; losses and hits [heads, then second levels]."""
        backbone, heads = self.job.backbone, self.job.heads
        tables = self._table(batch.token_ids.shape[1])
        depths = {tap.depth for head in heads for tap in head.plan.taps}
        states = backbone_states(backbone, batch.token_ids, depths, tables, self.pieces)
        final = select_normed(states[len(backbone.layers)], batch.where, backbone.output.norm, self)
        tokens = backbone.embed(batch.token_ids)
        drafts, seconds = [], []
        for head in heads:
            weights = head.weights(backbone.dtype)
            taps = [states[tap.depth] for tap in weights.taps]
            own = head_states(weights, taps, self._shape, tables, self.pieces)
            drafts.append(select_normed(own.state, batch.where, weights.output.norm, self))
            if weights.second is not None:
                hidden = second_one_pass(
                    weights.second, own.detached(), tokens, self._shape, tables, self.pieces
                )
                seconds.append(select_normed(hidden, batch.where, weights.second.norm, self))
        outputs = [head.output for head in (*heads, *(heads[i] for i in self._doubled))]
        drafts += seconds
        pairs = [(d.detach(), output) for d, output in zip(drafts, outputs, strict=True)]
        losses, hits, gradients = losses_and_gradients(
            final, pairs, batch.weight * scale, backbone.output, self._loss
        )
        torch.autograd.backward(drafts, gradients)
        return losses / scale, hits

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.job.backbone.spec.rms_eps

    def _table(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self._tables:
            self._tables[length] = self.job.backbone.tables(length)
        return self._tables[length]

    def _report(self, step: int, since: float, scores: list[HeadScore] | None) -> float:
        """Read the averages (the one wait for the device), check for NaN, and tell."""
        losses, acceptance, tokens = self._monitor.take(self.job.folder)
        now = time.monotonic()
        elapsed = self._elapsed()
        count = len(self.job.heads)
        second = dict(zip(self._doubled, acceptance[count:], strict=True))
        report = Report(
            step,
            elapsed,
            min(1.0, self.schedule.progress(step, elapsed)),
            losses[:count],
            acceptance[:count],
            tokens * self.job.world.size / max(now - since, 1e-9),
            None if scores is None else tuple(scores),
            tuple(second.get(index) for index in range(count)),
        )
        self.job.on_report(report)
        return now

    def _save(self, step: int) -> None:
        """Checkpoint, unless something is not a number: then the last good one stays."""
        self._monitor.refuse_nan(self.job.folder)
        if self.job.world.rank == 0:
            progress = Progress(step, self._elapsed())
            save_checkpoint(
                self.job.folder, self.job.heads, self.optimizer, progress, self.job.identity
            )
            self.job.on_save(progress)
        self.job.world.wait()

    def _scores(self) -> list[HeadScore]:
        heads = [head.weights(self.job.backbone.dtype) for head in self.job.heads]
        return self._measure(heads)

    def _raw_scores(self) -> dict[int, HeadScore]:
        """The bare exits, for comparison."""
        exits = sorted({head.plan.exit_layer for head in self.job.heads})
        output = self.job.backbone.output
        scores = self._measure([HeadWeights((Tap(e, 0),), output) for e in exits])
        return dict(zip(exits, scores, strict=True))

    def _measure(self, heads: Sequence[HeadWeights]) -> list[HeadScore]:
        held_out = self.job.held_out
        batches = (held_out[i] for i in range(held_out.per_epoch))
        return measure(self.job.backbone, heads, batches, self.pieces)


def select_normed(states: Tensor, where: Tensor, norm: Tensor, trainer: Trainer) -> Tensor:
    """Normed rows [n, H] of states [B, T, H] at flat positions [n]."""
    rows = states.flatten(0, 1).index_select(0, where)
    return rms_norm(rows, norm, trainer.eps)


class Monitor:
    """Sums on the device, read only when someone asks."""

    def __init__(self, heads: int, device: torch.device, world: World) -> None:
        self._heads, self._device, self._world = heads, device, world
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(2, self._heads, device=self._device)
        self._finite = torch.ones((), dtype=torch.bool, device=self._device)
        self._batches = self._answers = self._tokens = 0

    def add(self, losses: Tensor, hits: Tensor, batch: Batch) -> None:
        """Count one batch: mean losses [heads] and numbers of hits [heads]."""
        self._sums[0] += losses
        self._sums[1] += hits
        self._finite &= losses.isfinite().all()
        self._batches += 1
        self._answers += batch.count
        self._tokens += batch.token_ids.numel()

    def check(self, step: int, norms: Tensor) -> None:
        """Remember the first step whose losses or gradient norms are not finite."""
        fine = self._finite & norms.isfinite().all()
        self._bad = torch.where((self._bad < 0) & ~fine, step + 1, self._bad)

    def refuse_nan(self, folder: Path) -> None:
        """StageError naming the first bad step, if there was one."""
        bad = int(self._world.highest([float(self._bad)], self._device)[0])
        if bad >= 0:
            kept = (
                " (the last good checkpoint is kept)" if any(folder.glob("*.safetensors")) else ""
            )
            raise StageError(
                f"step {bad}: the loss or a gradient is not a number{kept}; "
                "lower --lr or check the model and the data"
            )

    def take(self, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], int]:
        """Mean loss and acceptance of each head, and tokens passed, since the last call."""
        self.refuse_nan(folder)
        losses = (self._sums[0] / max(1, self._batches)).tolist()
        acceptance = (self._sums[1] / max(1, self._answers)).tolist()
        tokens = self._tokens
        self._clear()
        return tuple(losses), tuple(acceptance), tokens
