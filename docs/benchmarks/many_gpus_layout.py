"""The pipeline of one part of ``many_gpus.py``: split, devices, memory, weights and head."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from many_gpus_jobs import Job
from many_gpus_plan import spec_for

from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.load import Loader
from ppsd_cli.model.random_weights import (
    BLOCKS,
    DRAFT_VOCABULARY,
    RANDOM_DEEP,
    RandomCheckpoint,
    random_head,
    random_taps,
)
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.prompts import bucket_of
from ppsd_cli.runtime.memory_plan import check_memory, plan_memory
from ppsd_cli.runtime.pipeline import PipelineConfig, tap_depths
from ppsd_cli.runtime.placement import Costs, choose_split, costs_of, layer_parameters

_SLACK = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """A part's pipeline. ``tree``: why there are no trees, or None. ``deep``: weights of the head
    that join deeper states.
    """

    spec: ModelSpec
    config: PipelineConfig
    tree: str | None
    deep: int

    @property
    def slots(self) -> int:
        """Of the caches: a whole bucket and a spare one, and a tree's nodes in flight."""
        return replace(self.config, slots=bucket_of(self.config.slots) + 1).cache_slots


def layout(job: Job) -> Layout:
    """Split, devices and widths of the part."""
    setup, part = job.setup, job.part
    spec, n = spec_for(part.shape, setup.layers), part.count
    drafting = n > 1
    lags = setup.depth * (n - 1)
    deep = lags * spec.hidden * (spec.hidden + 2 * spec.kv_heads * spec.head_dim)
    vocabulary = min(DRAFT_VOCABULARY, spec.vocabulary)
    costs = costs_of(
        spec, blocks=BLOCKS, draft_vocab=vocabulary, drafting=drafting, depth=setup.depth
    )
    costs = Costs(costs.lm, costs.head + drafting * deep / layer_parameters(spec))
    device = "cuda" if setup.devices else "cpu"
    alone = part.played or not setup.devices
    base = PipelineConfig(
        folder=f"random:{part.shape}:0",
        model_hash="",
        split=choose_split(spec.layers, stages=n, exit_layer=None, costs=costs),
        devices=tuple(_device(device, 0 if alone else s) for s in range(n)),
        dtype="bfloat16" if setup.devices else "float32",
        slots=setup.prompt + setup.tokens + _SLACK,
        head=RANDOM_DEEP if drafting else None,
        draft_vocab=vocabulary,
    )
    why = None if drafting else "one stage does not draft"
    config = base if why else replace(base, width=setup.width, depth=setup.depth)
    return Layout(spec, config, why, deep if drafting else 0)


def _device(kind: str, index: int) -> str:
    return kind if kind == "cpu" else f"{kind}:{index}"


def check(plan: Layout) -> list[dict[str, Any]]:
    """What each device needs; ResourceError, in one line, where it does not have it."""
    draft = plan.config.draft_vocab
    needed = plan_memory(plan.spec, plan.config, blocks=BLOCKS, draft_vocab=draft)
    size = getattr(torch, plan.config.dtype).itemsize
    # While the head is made, the whole LM matrix is there once more, as is the largest layer's.
    extra = (plan.deep + plan.spec.vocabulary * plan.spec.hidden) * size
    first = plan.config.devices[0]
    full = tuple(replace(m, needed=m.needed + (m.device == first) * extra) for m in needed)
    check_memory(full, f"{plan.spec.layers} layers over {plan.config.stages} stages")
    return [asdict(each) for each in full]


def load(plan: Layout) -> tuple[list[Stage], DraftHead | None]:
    """All stages, each made on its own device tensor by tensor, and the head."""
    config, spec, stages = plan.config, plan.spec, []
    for number, name in enumerate(config.devices):
        stage = Stage.load(_loader(plan, name), config.part(number), slots=plan.slots)
        stage.tap_depths = tap_depths(config, number)
        stages.append(stage)
    if config.head is None:
        return stages, None
    loader = _loader(plan, config.devices[0])
    weights = random_head(
        loader,
        loader.lm_matrix(),
        taps=random_taps(RANDOM_DEEP, config.split, depth=config.depth),
        draft_vocab=config.draft_vocab or spec.vocabulary,
        depth=config.depth,
    )
    ring = plan.slots if config.width > 1 else (config.stages + 1) * config.chunk + _SLACK
    return stages, DraftHead(spec, weights, slots=plan.slots, ring=ring)


def _loader(plan: Layout, name: str) -> Loader:
    device = torch.device(name)
    checkpoint = RandomCheckpoint(plan.spec, 0, device)
    return Loader(checkpoint, plan.spec, getattr(torch, plan.config.dtype), device)
