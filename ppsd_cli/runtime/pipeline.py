"""From settings to loaded stages: what each process loads, and the in-process runner."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ppsd_cli.core.plan import MAX_DRAFT_LENGTH
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.branches import Branches
from ppsd_cli.model.head_files import HeadInfo, check_fit, raw_exit, read_head, read_info
from ppsd_cli.model.heads import DraftHead, HeadWeights, Tap
from ppsd_cli.model.load import Loader
from ppsd_cli.model.places import open_checkpoint, spec_of
from ppsd_cli.model.random_weights import (
    DRAFT_VOCABULARY,
    RANDOM_HEADS,
    random_head,
    random_taps,
)
from ppsd_cli.model.stage import Stage, StageRange
from ppsd_cli.runtime.front import Front
from ppsd_cli.runtime.local import LocalLink, LocalRunner
from ppsd_cli.runtime.worker import StageWorker

RAW_EXIT = "raw"


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """Everything that a stage needs to load itself; travels to stage processes as JSON.

    ``split``: layers of each stage. ``devices``: one for each stage. ``slots``: context in
    tokens. ``chunk``: prompt tokens per prefill tick. ``folder``: a place as ``model.places``
    reads it. ``head``: a folder, ``raw``, one of ``RANDOM_HEADS``, or None. ``threads``: torch
    threads of each stage. ``width``: guesses per tick at most (a tree where it is above 1).
    ``depth``: depths of these guesses at most.
    """

    folder: str
    model_hash: str
    split: tuple[int, ...]
    devices: tuple[str, ...]
    dtype: str
    slots: int
    chunk: int = 128
    head: str | None = None
    draft_vocab: int | None = None
    threads: int = 1
    width: int = 1
    depth: int = 1

    @property
    def cache_slots(self) -> int:
        """Slots of the caches: the context, and in trees the nodes in flight beside it."""
        return self.slots + (self.stages * self.width if self.width > 1 else 0)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.split)

    def part(self, stage: int) -> StageRange:
        """The layers of one stage."""
        first = sum(self.split[:stage])
        return StageRange(first, first + self.split[stage], sum(self.split))

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "PipelineConfig":
        """The inverse of ``to_json``."""
        data = json.loads(text)
        config = cls(**data)
        return replace(config, split=tuple(config.split), devices=tuple(config.devices))


def head_taps(config: PipelineConfig) -> tuple[Tap, ...]:
    """What the draft head reads; nothing without a head."""
    if config.head is None:
        return ()
    if config.head == RAW_EXIT:
        return (Tap(config.split[0], 0),)
    if config.head in RANDOM_HEADS:
        return random_taps(config.head, config.split, depth=config.depth)
    return read_info(Path(config.head)).taps


def tap_depths(config: PipelineConfig, stage: int) -> frozenset[int]:
    """Depths whose states this stage keeps for the head."""
    return _depths_within(head_taps(config), config.part(stage))


def returning_stages(config: PipelineConfig) -> tuple[int, ...]:
    """Stages after 0 that send something to stage 0: those with taps, and the last."""
    last, taps = config.stages - 1, head_taps(config)
    return tuple(
        s for s in range(1, config.stages) if s == last or _depths_within(taps, config.part(s))
    )


def _depths_within(taps: tuple[Tap, ...], part: StageRange) -> frozenset[int]:
    return frozenset(tap.depth for tap in taps if part.first < tap.depth <= part.last)


def load_worker(config: PipelineConfig, stage: int) -> StageWorker:
    """One stage with its weights and caches."""
    loader = _loader(config, stage)
    loaded = Stage.load(loader, config.part(stage), slots=config.cache_slots)
    loaded.tap_depths = tap_depths(config, stage)
    branches = None
    if config.width > 1:
        keep = config.stages + 1
        branches = Branches(config.cache_slots, keep=keep, device=loaded.device)
    return StageWorker(stage, loaded, branches)


def load_head(config: PipelineConfig, first: Stage) -> DraftHead | None:
    """The draft head, beside the first stage, whose embeddings it shares where they are tied."""
    if config.head is None:
        return None
    loader = _loader(config, 0)
    matrix = first.output.lm_matrix if first.output is not None else None
    if matrix is None:
        matrix = first.embedding if loader.spec.tied else loader.lm_matrix()
    assert matrix is not None
    weights = _head_weights(config, loader, matrix)
    ring = (config.stages + 1) * config.chunk + 2 * (config.stages + MAX_DRAFT_LENGTH)
    if config.width > 1:
        ring = config.cache_slots
    return DraftHead(loader.spec, weights, slots=config.cache_slots, ring=ring)


def local_runner(config: PipelineConfig) -> LocalRunner:
    """All stages in this process."""
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {config.dtype}: choose float32, bfloat16 or float16")
    return assembled(config)


def assembled(config: PipelineConfig) -> LocalRunner:
    """All stages in this process, in any number format of torch."""
    workers = [load_worker(config, s) for s in range(config.stages)]
    head = load_head(config, workers[0].stage)
    front = Front(workers[0], head, LocalLink(workers[1:]), returning=returning_stages(config))
    return LocalRunner(front, stages=config.stages)


def _head_weights(config: PipelineConfig, loader: Loader, matrix: torch.Tensor) -> HeadWeights:
    spec = loader.spec
    if config.head == RAW_EXIT:
        return raw_exit(loader, config.split[0], matrix, columns=config.draft_vocab)
    if config.head in RANDOM_HEADS:
        columns = config.draft_vocab or DRAFT_VOCABULARY
        taps, depth = head_taps(config), config.depth
        return random_head(loader, matrix, taps=taps, draft_vocab=columns, depth=depth)
    assert config.head is not None
    folder = Path(config.head)
    info: HeadInfo = read_info(folder)
    check_fit(
        info,
        model_hash=config.model_hash,
        hidden=spec.hidden,
        split=config.split,
        depth=config.depth,
    )
    return read_head(folder, info, loader, matrix)


def _loader(config: PipelineConfig, stage: int) -> Loader:
    device = torch.device(config.devices[stage])
    checkpoint = open_checkpoint(config.folder, device)
    return Loader(checkpoint, spec_of(config.folder), getattr(torch, config.dtype), device)
