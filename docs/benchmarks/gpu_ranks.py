"""The CUDA engine over the ranks of torchrun: exact as one device, and how long its ticks are.

    torchrun --standalone --nproc-per-node 2 docs/benchmarks/gpu_ranks.py \\
        --model smollm2-135m > FILE.json
    torchrun --standalone --nproc-per-node 2 docs/benchmarks/gpu_ranks.py \\
        --random-weights llama-8b --acceptance 0.8 > FILE.json

With a GPU for each rank the ranks exchange over NCCL; with ``--devices cuda:0`` they share one, and
exchange over gloo by way of the host (``PPSD_LINK=gloo`` has them do so anyway). Rank 0 asks the
ranks for PPSD and for the naive split. When they have ended it asks the engine of one process, for
plain decoding on its own GPU and for the same split over as many GPUs, where there are so many. It
ends with 6 where tokens or logits differ.

``--kill N``: the last rank kills itself at the N-th tick it is told. Rank 0 must say so, in a line,
within five seconds: the JSON has the line and the seconds.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from dataclasses import replace
from time import perf_counter

import torch
from cpu_pipeline import note, run
from gpu_engine import forced, prompts_of

from ppsd_cli.commands.report import hardware, versions
from ppsd_cli.commands.session import ModelChoice, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.core.decode import decode
from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.errors import PpsdError
from ppsd_cli.runtime.cuda.build import load_graph_runner
from ppsd_cli.runtime.cuda.rank_runner import Follower
from ppsd_cli.runtime.engine import Drafting, Engine, open_engine, serve_rank
from ppsd_cli.runtime.pipeline import PipelineConfig

DRAWN = Sampling(temperature=0.8, top_p=0.95, seed=7)
EXACT = 32


def logits_of(engine: Engine, prompt: tuple[int, ...], *, drafting: bool, sampling: Sampling):
    """Token ids of a short answer and the logits [T, V] they were chosen from."""
    runner, limits = engine.runner, Limits(EXACT, engine.config.slots)
    request = Request(
        sampling, drafting, limits.feed_limit(len(prompt)), None, len(prompt), keep_logits=True
    )
    schedule = Schedule(
        prompt, stages=runner.stages, chunk=engine.config.chunk, request=request, limits=limits
    )
    told: dict[int, torch.Tensor] = {}
    events = list(decode(_Kept(runner, told), schedule))
    ids = [event.token_id for event in events if type(event).__name__ == "Committed"]
    live = [e.serial for e in events if type(e).__name__ == "Verified" and e.live]
    return ids, torch.stack([told[serial] for serial in live if serial in told])[: len(ids)]


class _Kept:
    """A runner that keeps the logits of every target, by serial."""

    def __init__(self, runner, told: dict[int, torch.Tensor]) -> None:
        self._runner, self._told = runner, told

    def __getattr__(self, name: str):
        return getattr(self._runner, name)

    def collect(self):
        result = self._runner.collect()
        for target in result.targets:
            if target.logits is not None:
                self._told[target.serial] = target.logits.clone()
        return result


def exact(engine: Engine, prompts, *, drafting: bool) -> list:
    """Greedy and sampled answers with their logits."""
    return [
        logits_of(engine, prompt, drafting=drafting, sampling=sampling)
        for prompt in prompts[:2]
        for sampling in (Sampling(), DRAWN)
    ]


def equal(ours: list, theirs: list) -> dict:
    """In how many answers tokens, and logits bit by bit, are the same."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "answers": len(pairs),
        "tokens": sum(mine[0] == other[0] for mine, other in pairs),
        "logits": sum(torch.equal(mine[1], other[1]) for mine, other in pairs),
    }


def timed(engine: Engine, prompts, options, drafts: list | None) -> dict:
    """Medians over the prompts: PPSD and the naive split, the second time they are asked."""
    figures = {}
    for name, drafting in (("ppsd", True), ("naive", False)):
        rows = []
        for index, prompt in enumerate(prompts):
            guesses = drafts[index] if drafts is not None and drafting else None
            run(engine, prompt, 8, drafting)
            rows.append(run(engine, prompt, options.tokens, Drafting(drafting, guesses)))
        keys = ("token_ms", "tick_ms", "tokens_per_tick", "draft_ms")
        figures[name] = {
            key: statistics.median(row[key] for row in rows if row[key] is not None)
            for key in keys
            if any(row[key] is not None for row in rows)
        }
        stages = zip(*(row["stage_ms"] for row in rows), strict=True)
        figures[name]["stage_ms"] = [statistics.median(each) for each in stages]
        figures[name]["ids"] = [row["ids"] for row in rows]
    return figures


def in_one_process(config: PipelineConfig, devices: tuple[str, ...]) -> Engine:
    """The same split without ranks."""
    config = replace(config, devices=devices)
    return Engine(config, load_graph_runner(config))


def kill_at(count: int) -> None:
    """Have this rank kill itself at its order of that number."""
    follow, told = Follower.follow, []

    def dies(self, plan) -> None:
        told.append(plan)
        if len(told) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        follow(self, plan)

    Follower.follow = dies


def wait_for_loss(config: PipelineConfig, prompts) -> dict:
    """Answer until a rank is lost: what is said, and how long after the last token."""
    engine, last = open_engine(config, processes=False), perf_counter()
    limits = Limits(config.slots, config.slots)
    try:
        for _ in range(1000):
            for _event in engine.answer(
                prompts[0], sampling=Sampling(), limits=limits, drafting=Drafting(True)
            ):
                last = perf_counter()
    except PpsdError as error:
        return {"said": str(error), "seconds": perf_counter() - last}
    return {"said": None}


def figures_of(plan, options) -> dict:
    """Rank 0: all of it."""
    config, prompts = plan.config, prompts_of(plan, options.prompts)
    with open_engine(config, processes=False) as engine:
        ours = exact(engine, prompts, drafting=True)
        naive = exact(engine, prompts, drafting=False)
        drafts, plain = None, [run(engine, p, options.tokens, False)["ids"] for p in prompts]
        if options.acceptance is not None:
            drafts = [
                forced(ids, options.acceptance, plan.spec.vocabulary, seed)
                for seed, ids in enumerate(plain)
            ]
        report = {"ranks": timed(engine, prompts, options, drafts)}
    torch.cuda.empty_cache()
    one = replace(config, split=(sum(config.split),), head=None)
    with in_one_process(one, config.devices[:1]) as engine:
        theirs = exact(engine, prompts, drafting=False)
        plain_runs = [run(engine, p, options.tokens, False) for p in prompts]
        report["plain"] = {"token_ms": statistics.median(r["token_ms"] for r in plain_runs)}
        report["equal_to_plain"] = {"ppsd": equal(ours, theirs), "naive": equal(naive, theirs)}
        same = [row["ids"] for row in plain_runs]
    report["long_answers_equal"] = {
        name: figures.pop("ids") == same for name, figures in report["ranks"].items()
    }
    torch.cuda.empty_cache()
    if len(set(config.devices)) == config.stages <= torch.cuda.device_count():
        with in_one_process(config, config.devices) as engine:
            report["one_process"] = timed(engine, prompts, options, drafts)
        for figures in report["one_process"].values():
            figures.pop("ids")
    return report


def main() -> int:
    """Run as one rank; rank 0 prints JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--random-weights")
    parser.add_argument("--devices", default="cuda")
    parser.add_argument("--dtype")
    parser.add_argument("--split")
    parser.add_argument("--acceptance", type=float)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kill", type=int)
    options = parser.parse_args()
    choice = ModelChoice(options.model, None, None, False, options.random_weights)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    split = tuple(map(int, options.split.split(","))) if options.split else None
    settings = Settings(
        decoder="ppsd",
        devices=tuple(options.devices.split(",")),
        stages=None if split else ranks,
        split=split,
        context=options.context,
        dtype=options.dtype,
    )
    plan = make_plan(choice, settings, note)
    if rank:
        if options.kill is not None and rank == ranks - 1:
            kill_at(options.kill)
        serve_rank(plan.config)
        return 0
    if options.kill is not None:
        report = wait_for_loss(plan.config, prompts_of(plan, 1))
        good = report["said"] is not None and report["seconds"] < 5
    else:
        report = figures_of(plan, options)
        counts = report["equal_to_plain"].values()
        good = all(c["tokens"] == c["logits"] == c["answers"] for c in counts)
        good = good and all(report["long_answers_equal"].values())
    heading = {
        "command": " ".join(sys.argv),
        "split": plan.config.split,
        "devices": plan.config.devices,
        "dtype": plan.config.dtype,
        "head": plan.head_name,
        "link_asked_for": os.environ.get("PPSD_LINK"),
        "good": good,
    }
    last = {"versions": versions(), "hardware": hardware(plan.config.devices, 1)}
    sys.stdout.write(json.dumps(heading | report | last, indent=1) + "\n")
    sys.stdout.flush()
    return 0 if good else 6


if __name__ == "__main__":
    sys.exit(main())
