"""The CUDA engine on this machine: plain decoding, PPSD, the naive split, and what explains them.

Per model and stage count, from alternating answers of equal length with checked equal token ids:
milliseconds per token and per tick, per stage and for the head; weights read per second over the
measured copy bandwidth; speed-up over plain decoding on the same engine. With ``--acceptance`` the
drafts are right with that probability while the real head runs.

    python docs/benchmarks/gpu_engine.py --model smollm2-135m --stages 2 3 > FILE.json
    python docs/benchmarks/gpu_engine.py --random-weights llama-8b --stages 2 --acceptance 0.8
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from cpu_pipeline import PROMPTS, note, run
from gpu_tiles import copy_rate

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.report import hardware, versions
from ppsd_cli.commands.session import ModelChoice, Plan, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.runtime.engine import Drafting, Engine, open_engine
from ppsd_cli.tasks.bench.prompts import encode_without_tokenizer


def prompts_of(plan: Plan, count: int) -> list[tuple[int, ...]]:
    """Token ids of the first prompts."""
    if (plan.files.folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(plan.files.folder)
        return [
            encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS[:count]
        ]
    return [encode_without_tokenizer(4 * text, plan.spec.vocabulary) for text in PROMPTS[:count]]


def engine_of(plan: Plan) -> tuple[Engine, float]:
    """A ready engine, warmed by one short answer, and the seconds that took."""
    begin = perf_counter()
    engine = open_engine(plan.config, processes=plan.processes)
    prompt = tuple(range(1, 20))
    drafting = plan.decoder != "ar"
    run(engine, prompt, 8, drafting)
    if drafting:
        run(engine, prompt, 8, False)
    torch.cuda.synchronize()
    return engine, perf_counter() - begin


def weight_bytes(engine: Engine) -> int:
    """Bytes of weights that one token reads on its way through all stages."""
    stages = engine.runner.stage_list
    total = sum(stage.weight_bytes() for stage in stages)
    first = stages[0]
    tied = first.output is not None and first.output.lm_matrix is first.embedding
    return total - (0 if tied else first.embedding.nbytes)


def forced(ids: list[int], share: float, vocabulary: int, seed: int) -> tuple[int, ...]:
    """The answer's tokens, each replaced by a wrong one with probability 1 - ``share``."""
    draws = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed))
    return tuple(
        t if r < share else (t + 1) % vocabulary for t, r in zip(ids, draws.tolist(), strict=True)
    )


def compare(engine: Engine, plan: Plan, plain: list[dict], prompts, options) -> dict:
    """PPSD and the naive split on one engine, against the answers and times of plain decoding."""
    figures: dict = {}
    shares = [None, *options.acceptance] if not options.random_weights else options.acceptance
    for share in shares:
        rows, naive = [], []
        for index, prompt in enumerate(prompts):
            drafts = None
            if share is not None:
                ids = plain[index]["ids"]
                drafts = forced(ids, share, plan.spec.vocabulary, index)
            drafting = Drafting(True, drafts)
            rows.append(run(engine, prompt, options.tokens, drafting))
            naive.append(run(engine, prompt, options.tokens, False))
        verified = sum(r["verified"] for r in rows)
        alpha = sum(r["accepted"] for r in rows) / max(verified, 1)
        n = len(plan.config.split)
        ratio = statistics.median(
            a["token_ms"] / b["token_ms"] for a, b in zip(plain, rows, strict=True)
        )
        ideal = n / (1 + (n - 1) * (1 - alpha))
        figures[str(share or "head")] = {
            "acceptance": alpha,
            "tick_ms": statistics.median(r["tick_ms"] for r in rows),
            "token_ms": statistics.median(r["token_ms"] for r in rows),
            "stage_ms": [
                statistics.median(c) for c in zip(*(r["stage_ms"] for r in rows), strict=True)
            ],
            "draft_ms": statistics.median(r["draft_ms"] for r in rows),
            "tokens_per_tick": statistics.median(r["tokens_per_tick"] for r in rows),
            "speedup_over_ar": ratio,
            "formula": ideal,
            "speedup_over_formula": ratio / ideal,
            "speedup_over_naive_split": statistics.median(
                a["token_ms"] / b["token_ms"] for a, b in zip(naive, rows, strict=True)
            ),
            "naive_split_token_ms": statistics.median(r["token_ms"] for r in naive),
            "answers_equal_to_ar": sum(
                a["ids"] == b["ids"] for a, b in zip(plain, rows, strict=True)
            ),
            "naive_equal_to_ar": sum(
                a["ids"] == b["ids"] for a, b in zip(plain, naive, strict=True)
            ),
        }
        note(f"{n} stages, {share}: {json.dumps(figures[str(share or 'head')])}")
    return figures


def by_length(engine: Engine, plan: Plan, lengths: list[int]) -> dict[str, float]:
    """Milliseconds per token of plain decoding behind prompts of these lengths."""
    found = {}
    for length in lengths:
        draws = torch.randint(plan.spec.vocabulary, (length,), generator=torch.manual_seed(length))
        found[str(length)] = run(engine, tuple(draws.tolist()), 48, False)["token_ms"]
    note(json.dumps(found))
    return found


def soak(engine: Engine, tokens: int) -> dict[str, float]:
    """Memory before and after answers of so many tokens, in bytes: of the GPU, and of this process.

    As many answers as fit the context.
    """

    def now() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return torch.cuda.memory_allocated(), pages * 4096

    answers = -(-tokens // (engine.config.slots - 8))
    run(engine, (1, 2, 3), tokens // answers, False)
    before = now()
    times = [run(engine, (1, 2, 3), tokens // answers, False) for _ in range(answers)]
    gpu, host = (b - a for a, b in zip(before, now(), strict=True))
    token_ms = statistics.median(each["token_ms"] for each in times)
    return {"tokens": tokens, "token_ms": token_ms, "gpu_growth": gpu, "host_growth": host}


def main() -> None:
    """Run and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--random-weights")
    parser.add_argument("--devices", nargs="+", default=["cuda:0"])
    parser.add_argument("--stages", nargs="*", type=int, default=[2, 3])
    parser.add_argument("--split", nargs="*", default=[])
    parser.add_argument("--acceptance", nargs="*", type=float, default=[])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--lengths", nargs="*", type=int, default=[])
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    choice = ModelChoice(options.model, None, None, False, options.random_weights)
    base = Settings(devices=tuple(options.devices), context=options.context)
    rate = copy_rate()
    torch.cuda.empty_cache()
    plan = make_plan(choice, replace(base, decoder="ar", devices=("cuda:0",)), note)
    prompts = prompts_of(plan, options.prompts)
    engine, ready = engine_of(plan)
    plain = [run(engine, prompt, options.tokens, False) for prompt in prompts]
    token_ms = statistics.median(r["token_ms"] for r in plain)
    size = weight_bytes(engine)
    report = {
        "command": " ".join(sys.argv),
        "copy_bytes_per_second": rate,
        "ar": {
            "token_ms": token_ms,
            "stage_ms": statistics.median(r["stage_ms"][0] for r in plain),
            "weight_bytes": size,
            "weight_bytes_per_second": size / token_ms * 1e3,
            "share_of_copy": size / token_ms * 1e3 / rate,
            "ready_seconds": ready,
            "peak_memory": torch.cuda.max_memory_allocated(),
        },
        "versions": versions(),
        "hardware": hardware(("cuda:0",), 1),
        "stages": {},
    }
    note(json.dumps(report["ar"]))
    report["token_ms_by_length"] = by_length(engine, plan, options.lengths)
    if options.soak:
        report["soak"] = soak(engine, options.soak)
        note(json.dumps(report["soak"]))
    engine.close()
    del engine
    wanted = [replace(base, decoder="ppsd", stages=n) for n in options.stages]
    wanted += [
        replace(base, decoder="ppsd", split=tuple(map(int, text.split(","))))
        for text in options.split
    ]
    for settings in wanted:
        plan = make_plan(choice, settings, note)
        engine, ready = engine_of(plan)
        figures = compare(engine, plan, plain, prompts, options)
        key = ",".join(map(str, plan.config.split))
        report["stages"][key] = {"head": plan.head_name, "ready_seconds": ready, **figures}
        engine.close()
        del engine
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
