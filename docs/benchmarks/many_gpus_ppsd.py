"""A worker of ``many_gpus.py``: plain decoding, chains and trees over the devices of one part.

The real head runs and only its output is replaced (fixed acceptance). Random weights give a text
that rounding does not change (``model.random_weights``), so what is forced is right in trees, too.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from cpu_pipeline import run
from many_gpus_jobs import Job, say, worker
from many_gpus_layout import Layout, check, layout, load
from many_gpus_links import HeldImmediate, HeldRecorder, held
from many_gpus_plan import Link, among_of

from ppsd_cli.bench_records import Key
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.build import graph_runner
from ppsd_cli.runtime.cuda.crew import devices_reach
from ppsd_cli.runtime.engine import Drafting, Engine
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.tasks.bench.environment import environment
from ppsd_cli.tasks.bench.forced import forced_drafts, forced_tree

_WARM = 2
"""Tokens of an answer that only makes graphs."""


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
            if self._setup.depth > 1:
                rows = [self._tree(engine, prompts, plain, share, depth=2) for share in shares]
                found["two_depths"] = rows
        return found | self._own(engine, prompts[0], plain[0]["ids"])

    def _chain(self, engine: Engine, prompts: list, plain: list[dict], share: float) -> dict:
        rows = []
        for index, prompt in enumerate(prompts):
            drafts = self._drafts(plain[index]["ids"], share, index)
            rows.append(self._run(engine, prompt, Drafting(True, drafts)))
        return self._checked(rows, plain, share)

    def _tree(
        self, engine: Engine, prompts: list, plain: list[dict], share: float, *, depth: int = 1
    ) -> dict:
        """Guesses of the second depth are as good as those of the first."""
        rows, width = [], self._setup.width
        for index, prompt in enumerate(prompts):
            both = share, among_of(share, self._setup.missed)
            tree = forced_tree(plain[index]["ids"], both, width, seed=0, key=_key(index))
            drafting = Drafting(
                True,
                tree.tokens,
                width=width,
                forced_ranks=tree.ranks,
                rank_scores=tree.scores,
                depth=depth,
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
