"""A worker of ``many_gpus.py``: plain decoding, chains and trees over the devices of one part.

The real head runs and only its output is replaced (fixed acceptance). The text is made to be one
that rounding cannot change, so that what is forced is right in trees, too: see ``speak``.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from cpu_pipeline import run
from many_gpus_jobs import Job, say, worker
from many_gpus_links import HeldImmediate, HeldRecorder, held
from many_gpus_plan import Link, among_of, spec_for

from ppsd_cli.bench_records import Key
from ppsd_cli.errors import ConfigError
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
from ppsd_cli.runtime.cuda.build import graph_runner
from ppsd_cli.runtime.cuda.crew import devices_reach
from ppsd_cli.runtime.cuda.prompts import bucket_of
from ppsd_cli.runtime.engine import Drafting, Engine, check_engine
from ppsd_cli.runtime.memory_plan import check_memory, plan_memory
from ppsd_cli.runtime.pipeline import PipelineConfig, tap_depths
from ppsd_cli.runtime.placement import Costs, choose_split, costs_of, layer_parameters
from ppsd_cli.tasks.bench.environment import environment
from ppsd_cli.tasks.bench.forced import forced_drafts, forced_tree

_SLACK = 64
_WARM = 2
"""Tokens of an answer that only makes graphs."""


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
    deep = (n - 1) * spec.hidden * (spec.hidden + 2 * spec.kv_heads * spec.head_dim)
    vocabulary = min(DRAFT_VOCABULARY, spec.vocabulary)
    costs = costs_of(spec, blocks=BLOCKS, draft_vocab=vocabulary, drafting=drafting)
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
    why = _no_trees(base, setup.width)
    config = base if why else replace(base, width=setup.width)
    return Layout(spec, config, why, deep if drafting else 0)


def _device(kind: str, index: int) -> str:
    return kind if kind == "cpu" else f"{kind}:{index}"


def _no_trees(config: PipelineConfig, width: int) -> str | None:
    """Why this pipeline has no trees, also where one device only plays several."""
    apart = tuple(f"cuda:{s}" for s in range(config.stages))
    if config.stages == 1:
        return "one stage does not draft"
    try:
        check_engine(replace(config, devices=apart, width=width))
    except ConfigError as error:
        return f"not available: {error}"
    return None


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
    speak(stages)
    if config.head is None:
        return stages, None
    loader = _loader(plan, config.devices[0])
    weights = random_head(
        loader,
        loader.lm_matrix(),
        taps=random_taps(RANDOM_DEEP, config.split),
        draft_vocab=config.draft_vocab or spec.vocabulary,
    )
    ring = plan.slots if config.width > 1 else (config.stages + 1) * config.chunk + _SLACK
    return stages, DraftHead(spec, weights, slots=plan.slots, ring=ring)


def _loader(plan: Layout, name: str) -> Loader:
    device = torch.device(name)
    checkpoint = RandomCheckpoint(plan.spec, 0, device)
    return Loader(checkpoint, plan.spec, getattr(torch, plan.config.dtype), device)


def speak(stages: Sequence[Stage]) -> None:
    """Make the text one that rounding does not change: behind token t comes t + 1.

    With random weights the best two tokens are often nearly level, so wider matrices soon lead to
    another text, in which all that is forced is wrong. Here embeddings outweigh what the layers
    add, and column t + 1 of the LM matrix is the embedding of t. No size changes, so no time does.
    """
    first, last = stages[0], stages[-1]
    assert first.embedding is not None
    assert last.output is not None
    assert not first.spec.tied
    lm, rows = last.output.lm_matrix, first.embedding
    count, step = rows.shape[1], 4096
    for begin in range(0, count, step):  # some at a time, so that no whole matrix is made again
        some = torch.arange(begin, min(begin + step, count))
        behind = (some + 1) % count
        lm[:, behind.to(lm.device)] = rows[:, some.to(rows.device)].to(lm.device)
    rows.mul_(first.spec.hidden**0.5)


class Bench:
    """One link's runner over loaded stages."""

    def __init__(self, job: Job, plan: Layout, loaded: tuple[list[Stage], DraftHead | None]):
        self._setup, self._part, self._plan = job.setup, job.part, plan
        self._stages, self._head = loaded
        self._recorders: list[HeldRecorder | HeldImmediate] = []

    def measure(self, link: Link, *, reach: bool) -> dict[str, Any]:
        """Figures of one link; of all but the part's first fewer."""
        first, setup = link.name == self._part.links[0], self._setup
        shares = setup.acceptance if first else setup.slow_acceptance
        prompts = [self._prompt(i) for i in range(setup.answers if first else 1)]
        self._recorders.clear()

        def recorder(device: torch.device) -> HeldRecorder | HeldImmediate:
            self._recorders.append(held(device, delay=link.delay))
            return self._recorders[-1]

        config = self._plan.config
        runner = graph_runner(
            self._stages,
            self._head,
            chunk=config.chunk,
            groups=(1,) * config.stages,
            through_host=link.through_host or not reach,
            recorder=recorder,
        )
        engine = Engine(config, runner)
        try:
            return self._figures(engine, prompts, shares)
        finally:
            engine.close()

    def _figures(self, engine: Engine, prompts: list, shares: Sequence[float]) -> dict[str, Any]:
        self._run(engine, prompts[0], Drafting(False), tokens=_WARM)
        plain = [self._run(engine, prompt, Drafting(False)) for prompt in prompts]
        found: dict[str, Any] = {"naive": _pooled(plain), "chain": [], "tree": self._plan.tree}
        if self._head is None:
            return found | {"fixed_ms": None}
        self._run(engine, prompts[0], Drafting(True), tokens=_WARM)
        found["chain"] = [self._chain(engine, prompts, plain, share) for share in shares]
        if self._plan.tree is None:
            found["tree"] = [self._tree(engine, prompts, plain, share) for share in shares]
        return found | self._own(engine, prompts[0], plain[0]["ids"])

    def _chain(self, engine: Engine, prompts: list, plain: list[dict], share: float) -> dict:
        rows = []
        for index, prompt in enumerate(prompts):
            drafts = self._drafts(plain[index]["ids"], share, index)
            rows.append(self._run(engine, prompt, Drafting(True, drafts)))
        return self._checked(rows, plain, share)

    def _tree(self, engine: Engine, prompts: list, plain: list[dict], share: float) -> dict:
        rows, width = [], self._setup.width
        for index, prompt in enumerate(prompts):
            tree = forced_tree(
                plain[index]["ids"], (share, among_of(share)), width, seed=0, key=_key(index)
            )
            drafting = Drafting(
                True,
                tree.tokens,
                width=width,
                forced_ranks=tree.ranks,
                rank_scores=tree.scores,
            )
            if not index:
                self._run(engine, prompt, drafting, tokens=_WARM)
            rows.append(self._run(engine, prompt, drafting))
        return self._checked(rows, plain, share)

    def _checked(self, rows: list[dict], plain: list[dict], share: float) -> dict:
        equal = sum(a["ids"] == b["ids"] for a, b in zip(rows, plain, strict=True))
        return {"acceptance": share} | _pooled(rows) | {"equal_answers": [equal, len(rows)]}

    def _own(self, engine: Engine, prompt: tuple[int, ...], ids: list[int]) -> dict[str, Any]:
        """The tick beside what each device works in it, all guesses right, in one more answer."""
        for each in self._recorders:
            each.times.clear(on=True)
        row = self._run(engine, prompt, Drafting(True, tuple(ids)))
        own = [each.times.median_ms() for each in self._recorders]
        for each in self._recorders:
            each.times.clear(on=False)
        return {
            "timed_tick_ms": row["tick_ms"],
            "own_ms": own,
            "fixed_ms": row["tick_ms"] - max(own),
        }

    def _drafts(self, ids: list[int], share: float, index: int) -> tuple[int, ...]:
        vocabulary = self._plan.spec.vocabulary
        return forced_drafts(ids, acceptance=share, vocabulary=vocabulary, seed=0, key=_key(index))

    def _prompt(self, seed: int) -> tuple[int, ...]:
        draws = torch.Generator().manual_seed(seed)
        size = (self._setup.prompt,)
        ids = torch.randint(self._plan.spec.vocabulary, size, generator=draws)
        return tuple(ids.tolist())

    def _run(
        self, engine: Engine, prompt: tuple[int, ...], drafting: Drafting, tokens: int | None = None
    ) -> dict:
        return run(engine, prompt, tokens or self._setup.tokens, drafting)


def _key(index: int) -> Key:
    return Key("many-gpus", str(index), "", 0, 0)


def _pooled(rows: list[dict]) -> dict[str, Any]:
    """Answers of equal length as one: times per token and tick in milliseconds."""
    token = statistics.fmean(row["token_ms"] for row in rows)
    verified = sum(row["verified"] for row in rows)
    return {
        "realised": sum(row["accepted"] for row in rows) / verified if verified else None,
        "token_ms": token,
        "token_ms_of_each": [row["token_ms"] for row in rows],
        "tick_ms": statistics.median(row["tick_ms"] for row in rows),
        "tokens_per_tick": statistics.fmean(row["tokens_per_tick"] for row in rows),
        "stage_ms": [
            statistics.median(c) for c in zip(*(r["stage_ms"] for r in rows), strict=True)
        ],
        "draft_ms": statistics.median(row["draft_ms"] or 0.0 for row in rows),
        "tokens_per_second": 1e3 / token,
    }


def _peaks(config: PipelineConfig) -> dict[str, int]:
    """Most bytes that each GPU had allocated."""
    names = sorted({name for name in config.devices if name != "cpu"})
    return {name: torch.cuda.max_memory_allocated(name) for name in names}


@torch.inference_mode()
def work(job: Job) -> None:
    """Measure every link of the part."""
    plan = layout(job)
    config = plan.config
    job.tell(
        facts={
            "split": list(config.split),
            "devices": list(config.devices),
            "environment": dict(environment(config.devices)),
            "memory": check(plan),
        }
    )
    reach = devices_reach([torch.device(name) for name in sorted(set(config.devices))])
    job.tell(facts={"peer_copies": reach})
    bench = Bench(job, plan, load(plan))
    say(f"{job.part.name}: loaded, {json.dumps(_peaks(config))}")
    for link in job.links:
        job.link(link, bench.measure(link, reach=reach))
        job.tell(facts={"peak_memory": _peaks(config)})


if __name__ == "__main__":
    worker(work)
