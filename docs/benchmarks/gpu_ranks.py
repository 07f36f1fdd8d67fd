"""The CUDA engine over the ranks of torchrun: exact as one device, and how long its ticks are.

    torchrun --standalone --nproc-per-node 2 docs/benchmarks/gpu_ranks.py \\
        --model smollm2-135m > FILE.json
    torchrun --standalone --nproc-per-node 2 docs/benchmarks/gpu_ranks.py \\
        --random-weights llama-8b --acceptance 0.8 --width 4 > FILE.json

With a GPU for each rank the ranks exchange over NCCL; with ``--devices cuda:0`` they share one, and
exchange over gloo by way of the host (``PPSD_LINK=gloo`` has them do so anyway). Rank 0 asks the
ranks for PPSD and for the naive split. When they have ended it asks the engine of one process, for
plain decoding on its own GPU and for the same split over as many GPUs, where there are so many. It
ends with 6 where tokens or logits differ.

``--width N``: trees, too. They are compared with trees of one process over the same split, on GPUs
as above or on one that plays several: of the same kernels with the same shapes, so that logits are
bit-equal even where a tree's text differs from the chain's. With ``--acceptance`` the guesses are
right that often; of the others a share ``--missed`` is not among the N best either.

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
from many_gpus_plan import MISSED_AMONG_FOUR, among_of

from ppsd_cli.bench_records import Key
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
from ppsd_cli.tasks.bench.forced import forced_tree

DRAWN = Sampling(temperature=0.8, top_p=0.95, seed=7)
EXACT = 32


def logits_of(engine: Engine, prompt: tuple[int, ...], drafting: Drafting, sampling: Sampling):
    """Token ids of a short answer and the logits [T, V] they were chosen from."""
    runner, limits = engine.runner, Limits(EXACT, engine.config.slots)
    request = Request(
        sampling,
        drafting.on,
        limits.feed_limit(len(prompt)),
        drafting.forced,
        len(prompt),
        keep_logits=True,
        width=drafting.width,
        forced_ranks=drafting.forced_ranks,
        rank_scores=drafting.rank_scores,
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


def exact(engine: Engine, prompts, drafting: list[Drafting]) -> list:
    """Greedy and sampled answers with their logits; each with one of ``drafting``, in turn: none
    without.
    """
    asked = [(prompt, sampling) for prompt in prompts[:2] for sampling in (Sampling(), DRAWN)]
    drafting = drafting * len(asked)
    return [
        logits_of(engine, prompt, how, sampling)
        for (prompt, sampling), how in zip(asked, drafting, strict=False)
    ]


def guessing(answers: list[list[int]], options, vocabulary: int, *, width: int) -> list[Drafting]:
    """How to draft for answers whose tokens are known: by the head, or of a fixed acceptance."""
    share, found = options.acceptance, []
    if share is None:
        return [Drafting(True, width=width)] * len(answers)
    for index, ids in enumerate(answers):
        if width == 1:
            found.append(Drafting(True, forced(ids, share, vocabulary, index)))
            continue
        both, key = (share, among_of(share, options.missed)), Key("ranks", str(index), "", 0, 0)
        tree = forced_tree(ids, both, width, seed=0, key=key)
        more = {"forced_ranks": tree.ranks, "rank_scores": tree.scores}
        found.append(Drafting(True, tree.tokens, width=width, **more))
    return found


def equal(ours: list, theirs: list) -> dict:
    """In how many answers tokens, and logits bit by bit, are the same."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "answers": len(pairs),
        "tokens": sum(mine[0] == other[0] for mine, other in pairs),
        "logits": sum(torch.equal(mine[1], other[1]) for mine, other in pairs),
    }


def timed(engine: Engine, prompts, options, asked: dict[str, list[Drafting]]) -> dict:
    """Medians over the prompts of each way to draft, the second time they are asked."""
    figures = {}
    for name, drafting in asked.items():
        rows = []
        for prompt, how in zip(prompts, drafting, strict=True):
            run(engine, prompt, 8, how)
            rows.append(run(engine, prompt, options.tokens, how))
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
    """The same split without ranks; a device that serves several stages plays as many."""
    config = replace(config, devices=devices)
    return Engine(config, load_graph_runner(config, groups=(1,) * config.stages))


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
    """Answer until a rank is lost: what is said, and how long after the last token.

    torchrun ends all ranks as soon as one is gone; like ``ppsd`` this one goes on to say why.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
    vocabulary, width = plan.spec.vocabulary, options.width
    with open_engine(config, processes=False) as engine:
        ours = exact(engine, prompts, [Drafting(True)])
        naive = exact(engine, prompts, [Drafting(False)])
        plain = [run(engine, p, options.tokens, False)["ids"] for p in prompts]
        asked = {
            "ppsd": guessing(plain, options, vocabulary, width=1),
            "naive": [Drafting(False)] * len(prompts),
        }
        levels: list[Drafting] = []
        if width > 1:
            asked["tree"] = guessing(plain, options, vocabulary, width=width)
            levels = guessing([ids for ids, _ in ours], options, vocabulary, width=width)
        wide = exact(engine, prompts, levels)
        report = {"ranks": timed(engine, prompts, options, asked)}
    torch.cuda.empty_cache()
    one = replace(config, split=(sum(config.split),), head=None, width=1)
    with in_one_process(one, config.devices[:1]) as engine:
        theirs = exact(engine, prompts, [Drafting(False)])
        plain_runs = [run(engine, p, options.tokens, False) for p in prompts]
        report["plain"] = {"token_ms": statistics.median(r["token_ms"] for r in plain_runs)}
        report["equal_to_plain"] = {"ppsd": equal(ours, theirs), "naive": equal(naive, theirs)}
    texts = {name: figures.pop("ids") for name, figures in report["ranks"].items()}
    expected = dict.fromkeys(texts, [row["ids"] for row in plain_runs])
    torch.cuda.empty_cache()
    own = len(set(config.devices)) == config.stages <= torch.cuda.device_count()
    if own or levels:
        devices = config.devices if own else config.devices[:1] * config.stages
        with in_one_process(config, devices) as engine:
            figures = timed(engine, prompts, options, asked)
            trees = equal(wide, exact(engine, prompts, levels))
        found = {name: row.pop("ids") for name, row in figures.items()}
        report |= {"one_process": figures, "one_gpu_plays_all": not own}
    if levels:
        pairs = list(zip(texts["tree"], expected["tree"], strict=True))
        report["long_trees_equal_to_plain"] = [sum(a == b for a, b in pairs), len(pairs)]
        report["trees_equal_to_one_process"], expected["tree"] = trees, found["tree"]
    report["long_answers_equal"] = {name: ids == expected[name] for name, ids in texts.items()}
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
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--missed", type=float, default=MISSED_AMONG_FOUR)
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
        width=options.width,
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
        counts = list(report["equal_to_plain"].values())
        if options.width > 1:
            counts.append(report["trees_equal_to_one_process"])
        good = all(c["tokens"] == c["logits"] == c["answers"] > 0 for c in counts)
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
