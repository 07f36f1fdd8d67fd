"""Ticks of two one-core stages against plain decoding, on this machine's CPU.

Prints, from one alternating run over the same prompts with checked equal token ids:

- AR in one process at its best thread count, milliseconds per token;
- the naive split (AR over the same two one-core processes), milliseconds per token;
- PPSD over two one-core processes, milliseconds per tick, for several splits;
- the fixed cost of a tick: the tick minus its slowest stage;
- seconds until two stage processes are ready, the files being in the cache of the system.

Usage: python docs/benchmarks/cpu_pipeline.py [--model smollm2-135m] [--head NAME] > FILE.json
"""

import argparse
import contextlib
import json
import statistics
import sys
from dataclasses import replace
from time import perf_counter

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.report import hardware, versions
from ppsd_cli.commands.session import ModelChoice, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.core.events import Committed, Ticked
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.stats import StatsBuilder
from ppsd_cli.runtime.engine import Drafting, Engine, open_engine

PROMPTS = [
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a storm.",
    "What are the differences between a list and a tuple in Python?",
    "Give me three tips for sleeping better.",
    "Summarise how a bill becomes a law.",
    "Describe the water cycle to a child.",
]
SAMPLING = Sampling()
READY: list[float] = []


def run(engine: Engine, prompt: tuple[int, ...], tokens: int, drafting: bool | Drafting) -> dict:
    """One answer: its ids and medians, times in milliseconds."""
    drafting = drafting if isinstance(drafting, Drafting) else Drafting(drafting)
    stats, ids, commits = StatsBuilder(engine.runner.stages), [], []
    fresh = False
    limits = Limits(tokens, engine.config.slots)
    for event in engine.answer(prompt, sampling=SAMPLING, limits=limits, drafting=drafting):
        stats.add(event)
        if isinstance(event, Committed):
            ids.append(event.token_id)
            fresh = True
        elif isinstance(event, Ticked) and fresh:
            commits.append((event.received, event.tick))
            fresh = False
    (begin, first), (end, last) = commits[0], commits[-1]
    figures = stats.snapshot()
    return {
        "ids": ids,
        "token_ms": 1e3 * (end - begin) / (len(ids) - 1),
        "tick_ms": 1e3 * (end - begin) / (last - first),
        "stage_ms": [1e3 * each.median for each in figures.stage_seconds],
        "draft_ms": 1e3 * figures.tick_time.draft if figures.tick_time else None,
        "verified": figures.verified,
        "accepted": figures.accepted,
        "tokens_per_tick": (len(ids) - 1) / (last - first),
    }


def contenders(arguments: argparse.Namespace) -> dict[str, tuple[Engine, bool]]:
    """Every engine by name, and whether it drafts."""
    choice = ModelChoice(arguments.model, None, None, False)
    plain = make_plan(choice, Settings(decoder="ar", devices=("cpu",), context=1024), note)
    engines = {}
    for threads in range(1, arguments.threads + 1):
        config = replace(plain.config, threads=threads)
        engines[f"ar, {threads} thread{'s' * (threads > 1)}"] = (
            open_engine(config, processes=True),
            False,
        )
    for split in arguments.splits:
        flags = Settings(
            decoder="ppsd",
            split=split,
            devices=("cpu", "cpu"),
            head=arguments.head,
            draft_vocab=arguments.draft_vocab if arguments.head == "raw" else None,
            context=1024,
            threads=1,
        )
        config = make_plan(choice, flags, note).config
        begin = perf_counter()
        engine = open_engine(config, processes=True)
        name = "/".join(map(str, split))
        note(f"{name} ready in {perf_counter() - begin:.2f} s")
        READY.append(perf_counter() - begin)
        engines[f"naive split {name}"] = (engine, False)
        engines[f"ppsd {name}"] = (engine, True)
    return engines


def note(line: str) -> None:
    """Progress of downloads and conversions."""
    sys.stderr.write(line + "\n")


def summarise(samples: dict[str, list[dict]], identical: bool) -> dict:
    """Medians of each contender, and ratios paired prompt by prompt."""
    best = min(
        (n for n in samples if n.startswith("ar")),
        key=lambda n: statistics.median(s["token_ms"] for s in samples[n]),
    )
    table = {}
    for name, runs in samples.items():
        row = {
            key: statistics.median(r[key] for r in runs)
            for key in ("token_ms", "tick_ms", "tokens_per_tick")
        }
        row["stage_ms"] = [
            statistics.median(column) for column in zip(*(r["stage_ms"] for r in runs), strict=True)
        ]
        if name.startswith("ppsd"):
            naive = samples[name.replace("ppsd", "naive split")]
            row["draft_ms"] = statistics.median(r["draft_ms"] for r in runs)
            slowest = max(row["stage_ms"][0] + row["draft_ms"], *row["stage_ms"][1:])  # medians
            row["fixed_ms"] = row["tick_ms"] - slowest
            row["tick_over_ar"] = paired(runs, samples[best], "tick_ms")
            row["tick_over_naive"] = paired(runs, naive, "tick_ms")
            row["speedup_over_ar"] = 1 / paired(runs, samples[best], "token_ms", "token_ms")
            row["speedup_over_naive"] = 1 / paired(runs, naive, "token_ms", "token_ms")
        table[name] = row
    return {"best_ar": best, "identical": identical, "figures": table}


def paired(runs: list[dict], others: list[dict], key: str, own: str | None = None) -> float:
    """Median over the prompts of this run's figure over the other's time per token."""
    return statistics.median(
        a[own or key] / b["token_ms"] for a, b in zip(runs, others, strict=True)
    )


def main() -> None:
    """Run all contenders over the prompts in turn and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--head", default="raw")
    parser.add_argument("--draft-vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--splits", default="15,15 16,14 17,13")
    arguments = parser.parse_args()
    arguments.splits = [tuple(map(int, s.split(","))) for s in arguments.splits.split()]
    plan = make_plan(ModelChoice(arguments.model, None, None, False), Settings(decoder="ar"), note)
    tokenizer = load_tokenizer(plan.files.folder)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": p}]) for p in PROMPTS]
    samples: dict[str, list[dict]] = {}
    with contextlib.ExitStack() as stack:
        engines = contenders(arguments)
        for engine in {id(e): e for e, _ in engines.values()}.values():
            stack.callback(engine.close)
        for name, (engine, drafting) in engines.items():
            run(engine, prompts[0], 8, drafting)
            samples[name] = []
        for turn in range(arguments.rounds * len(prompts)):
            for name, (engine, drafting) in engines.items():
                prompt = prompts[turn % len(prompts)]
                samples[name].append(run(engine, prompt, arguments.tokens, drafting))
    one_thread = [
        [s["ids"] for s in runs] for name, runs in samples.items() if "2 threads" not in name
    ]
    identical = all(ids == one_thread[0] for ids in one_thread)
    report = summarise(samples, identical) | {
        "ready_seconds": READY,
        "command": " ".join(sys.argv),
        "versions": versions(),
        "hardware": hardware(("cpu",), 1),
    }
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
