"""The whole of ``ppsd train-head``: model, text, heads, training, files."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppsd_cli.assets import ModelFiles
from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.files import append_line, check_writable, make_folder
from ppsd_cli.model.head_files import HeadInfo, write_head
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone, Pieces
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.tasks.chat import ChatGlue, read_glue
from ppsd_cli.tasks.checkpoint import FILE, Progress
from ppsd_cli.tasks.data_file import read_data
from ppsd_cli.tasks.dataset import Batches, BatchSettings, Sample, held_out
from ppsd_cli.tasks.evaluate import HeadScore
from ppsd_cli.tasks.head_init import TrainableHead, make_heads
from ppsd_cli.tasks.head_plan import HeadWish, plan_heads
from ppsd_cli.tasks.loss import chunk_tokens
from ppsd_cli.tasks.optimize import World
from ppsd_cli.tasks.progress import Bars
from ppsd_cli.tasks.text import free_memory
from ppsd_cli.tasks.text_store import (
    TextSettings,
    TextWish,
    read_text,
    round_tokens,
    write_text,
)
from ppsd_cli.tasks.train import Job, Outcome, Report, Trainer, TrainSettings

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where training text comes from: ``data``, or the model itself (``wish``)."""

    data: Path | None
    skip_bad: bool
    wish: TextWish
    context: int
    held_out: int


@dataclass(frozen=True, slots=True)
class HeadRun:
    """Everything that ``ppsd train-head`` was asked for."""

    model: ModelFiles
    wishes: tuple[HeadWish, ...]
    output: Path
    text: TextSource
    train: TrainSettings
    batch_tokens: int
    seed: int
    dtype: torch.dtype
    save_dtype: torch.dtype
    device: torch.device
    resume: bool
    command: str


@dataclass(frozen=True, slots=True)
class HeadResult:
    """What was written. ``finished`` is False where the run was stopped by a signal."""

    finished: bool
    folders: tuple[Path, ...]
    scores: tuple[HeadScore, ...]


def train_heads(run: HeadRun, *, bars: Bars, stop: Callable[[], bool]) -> HeadResult:
    """Do the run; user errors come before the weights load."""
    spec = read_spec(run.model.folder)
    plans = plan_heads(run.wishes, spec)
    if run.text.context > spec.context:
        raise ConfigError(f"--context {run.text.context}: the model's own is {spec.context}")
    world = World.join(run.device)
    if world.rank == 0:
        _prepare(run)
    world.wait()
    tokenizer = load_tokenizer(run.model.folder)
    glue = read_glue(tokenizer, run.model.folder)
    samples = None if run.text.data is None else _given(run.text.data, run, tokenizer, bars)
    loader = Loader(Checkpoint(run.model.folder), spec, run.dtype, run.device)
    backbone = Backbone.load(loader)
    if samples is None:
        samples = _self_written(run, backbone, glue, world, bars, stop)
    if samples is None:
        world.leave()
        return HeadResult(False, (), ())
    rest, kept = held_out(samples, run.text.held_out)
    ends = glue.ends
    special = [i for i in tokenizer.all_special_ids if i is not None]
    heads = make_heads(plans, backbone, rest, {*ends, *special})
    # Compiled code wants chunks of one size; otherwise padding would only cost time.
    chunk = chunk_tokens(spec.vocabulary) if run.train.compile else 1
    batching = BatchSettings(run.batch_tokens, run.seed, chunk)
    fixed = BatchSettings(run.batch_tokens, run.seed, chunk, shuffle=False)
    curve = Curve(run, heads, world, bars)
    job = Job(
        backbone=backbone,
        heads=heads,
        train=Batches(rest, batching),
        held_out=Batches(kept, fixed),
        folder=run.output,
        identity=_identity(run, heads, samples),
        world=world,
        on_report=curve.report,
        on_save=curve.save,
        stop=stop,
    )
    outcome = Trainer(job, run.train).run(resume=run.resume)
    if world.rank == 0 and outcome.finished:
        curve.finish(outcome)
    world.leave()
    written = tuple(curve.folders()) if world.rank == 0 else ()
    return HeadResult(outcome.finished, written, outcome.scores)


def _prepare(run: HeadRun) -> None:
    """Make the output folder; refuse to overwrite another run's checkpoint."""
    check_writable(make_folder(run.output) / FILE)
    if (run.output / FILE).exists() and not run.resume:
        raise ConfigError(
            f"{run.output} holds the checkpoint of a run: continue it with --resume, "
            "or choose another --output"
        )


def _given(data: Path, run: HeadRun, tokenizer: Any, bars: Bars) -> list[Sample]:
    """Training texts of ``--data``."""
    text = run.text
    found = read_data(data, tokenizer, context=text.context, skip_bad=text.skip_bad)
    if found.skipped:
        bars.say(f"{data}: {found.skipped} bad lines skipped")
    return found.samples


def _self_written(
    run: HeadRun,
    backbone: Backbone,
    glue: ChatGlue,
    world: World,
    bars: Bars,
    stop: Callable[[], bool],
) -> list[Sample] | None:
    """Training texts by the model itself; None when stopped meanwhile."""
    source = run.text
    settings = TextSettings(
        model_hash=run.model.model_hash,
        context=source.context,
        seed=run.seed,
        round_tokens=round_tokens(backbone, source.wish.tokens),
        dtype=str(run.dtype).removeprefix("torch."),
        chat=glue.chat,
    )
    stopped = False
    if world.rank == 0:
        pieces = Pieces.compiled() if run.train.compile else Pieces()

        def progress(there: int, wanted: int) -> bool:
            bars.text(there, wanted)
            return not stop()

        wish = source.wish
        if run.resume and wish.seconds is not None:
            wish = replace(wish, seconds=0.0)  # the checkpoint is of the text that is there
        stopped = not write_text(backbone, glue, settings, wish, pieces=pieces, progress=progress)
        free_memory(run.device)
    if world.highest([float(stopped)], run.device)[0]:
        return None
    samples = read_text(settings, source.wish)
    if not samples:
        raise AssetError(f"{settings.folder()} has no text; processes must share the cache folder")
    bars.say(f"{len(samples)} texts, {sum(len(s.ids) for s in samples):,} tokens")
    return samples


def _identity(run: HeadRun, heads: list[TrainableHead], samples: list[Sample]) -> dict[str, Any]:
    """What a resumed run must share with the checkpoint."""
    return {
        "model": run.model.model_hash,
        "heads": [asdict(head.plan) for head in heads],
        "texts": len(samples),
        "tokens": sum(len(sample.ids) for sample in samples),
        "context": run.text.context,
        "batch_tokens": run.batch_tokens,
        "accumulate": run.train.accumulate,
        "seed": run.seed,
        "dtype": str(run.dtype).removeprefix("torch."),
        "weight_decay": run.train.weight_decay,
    }


class Curve:
    """Writes what training reports: the curve, the bar, and head files at every checkpoint."""

    def __init__(self, run: HeadRun, heads: list[TrainableHead], world: World, bars: Bars) -> None:
        self._run, self._heads, self._bars = run, heads, bars
        self._writes = world.rank == 0
        self._world = world
        self._last: dict[str, dict[str, Any]] = {}

    def folders(self) -> list[Path]:
        """Where each head's files go: the output folder, or one below it for each of several."""
        if len(self._heads) == 1:
            return [self._run.output]
        return [self._run.output / head.plan.name for head in self._heads]

    def report(self, report: Report) -> None:
        """One line of ``curve.jsonl``, and the bar."""
        if not self._writes:
            return
        names = [head.plan.name for head in self._heads]
        heads: dict[str, dict[str, Any]] = {}
        for index, name in enumerate(names):
            heads[name] = {
                "loss": round(report.losses[index], 5),
                "acceptance": round(report.acceptance[index], 5),
            }
            second = report.second[index] if report.second else None
            if second is not None:
                heads[name]["second_acceptance"] = round(second, 5)
            if report.scores is not None:
                heads[name]["held_out"] = report.scores[index].to_json()
                self._last[name] = report.scores[index].to_json()
        record = {
            "step": report.step,
            "elapsed": round(report.elapsed, 2),
            "tokens_per_second": round(report.tokens_per_second),
            "heads": heads,
        }
        append_line(self._run.output / "curve.jsonl", json.dumps(record))
        self._bars.training(report)

    def save(self, progress: Progress) -> None:
        """Write the head files as they are."""
        for head, folder in zip(self._heads, self.folders(), strict=True):
            figures = {"step": progress.step, "held_out": self._last.get(head.plan.name)}
            self._write(head, folder, progress, figures)

    def finish(self, outcome: Outcome) -> None:
        """Write the head files with their final figures."""
        pairs = zip(self._heads, self.folders(), outcome.scores, strict=True)
        for head, folder, score in pairs:
            figures = {
                "step": outcome.progress.step,
                "held_out": score.to_json(),
                "raw_exit": outcome.raw[head.plan.exit_layer].to_json(),
            }
            self._write(head, folder, outcome.progress, figures)

    def _write(
        self, head: TrainableHead, folder: Path, progress: Progress, figures: dict[str, Any]
    ) -> None:
        run, plan = self._run, head.plan
        training = {
            "command": run.command,
            "steps": progress.step,
            "seconds": round(progress.elapsed, 1),
            "split": list(plan.split),
            "lr": plan.lr,
            "batch_tokens": run.batch_tokens * run.train.accumulate * self._world.size,
            "context": run.text.context,
            "seed": run.seed,
            "figures": figures,
            "written": time.strftime("%Y-%m-%d", time.gmtime()),
            "torch": torch.__version__,
        }
        info = HeadInfo(
            kind=plan.kind,
            model_hash=run.model.model_hash,
            model_name=run.model.name,
            hidden=head.masters["norm"].shape[0],
            taps=plan.taps,
            blocks=plan.blocks,
            draft_vocabulary=plan.draft_vocab,
            stages=len(plan.split),
            training=training,
            depth=plan.depth,
        )
        with torch.no_grad():
            write_head(folder, info, head.weights(run.save_dtype))
