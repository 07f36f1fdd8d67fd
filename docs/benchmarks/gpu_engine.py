"""The CUDA engine on this machine: plain decoding, PPSD, the naive split, and what explains them.

Per model and stage count, from alternating answers of equal length with checked equal token ids:
milliseconds per token and per tick, per stage and for the head; weights read per second over the
measured copy bandwidth; speed-up over plain decoding on the same engine. With ``--acceptance`` the
drafts are right with that probability while the real head runs. ``--first``: milliseconds to the
first token behind prompts of so many random tokens; with no other figures by ``--prompts 0``.

    python docs/benchmarks/gpu_engine.py --model smollm2-135m --stages 2 3 > FILE.json
    python docs/benchmarks/gpu_engine.py --random-weights llama-8b --stages 2 --acceptance 0.8
    python docs/benchmarks/gpu_engine.py --model smollm2-135m --stages 2 3 --prompts 0
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from cpu_pipeline import PROMPTS, SAMPLING, note, run
from gpu_tiles import copy_rate

from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.report import hardware, versions
from ppsd_cli.commands.session import ModelChoice, Plan, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.core.events import Committed
from ppsd_cli.core.schedule import Limits
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


def plain_figures(engine: Engine, plain: list[dict], rate: float) -> dict:
    """What plain decoding takes, and what that is of the copy bandwidth."""
    if not plain:
        return {}
    token_ms = statistics.median(r["token_ms"] for r in plain)
    size = weight_bytes(engine)
    return {
        "token_ms": token_ms,
        "stage_ms": statistics.median(r["stage_ms"][0] for r in plain),
        "weight_bytes": size,
        "weight_bytes_per_second": size / token_ms * 1e3,
        "share_of_copy": size / token_ms * 1e3 / rate,
    }


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


def to_first_token(engine: Engine, plan: Plan, lengths: list[int]) -> dict[str, dict]:
    """Milliseconds from the question to its first token, by the prompt's length: median, least
    and most of 15 answers of 2 tokens to different prompts, of 3 more before that to warm up.

    Where the engine drafts, with and without drafting in turn (the latter is the naive split).
    ``tokens``: all answers, the same in every mode and for every engine.
    """
    modes = {"ar": False} if plan.decoder == "ar" else {"ppsd": True, "naive": False}
    found: dict[str, dict] = {}
    for length in lengths:
        times: dict[str, list[float]] = {name: [] for name in modes}
        tokens: dict[str, list[list[int]]] = {name: [] for name in modes}
        for index in range(18):
            draws = torch.Generator().manual_seed(1000 * length + index)
            prompt = torch.randint(plan.spec.vocabulary, (length,), generator=draws).tolist()
            for name, on in modes.items():
                seconds, ids = time_first(engine, tuple(prompt), Drafting(on))
                times[name].append(1e3 * seconds)
                tokens[name].append(ids)
        figures: dict = {
            name: {"median": statistics.median(t[3:]), "least": min(t[3:]), "most": max(t[3:])}
            for name, t in times.items()
        }
        note(f"to the first token, {length} tokens: {json.dumps(figures)}")
        assert all(answers == tokens[next(iter(modes))] for answers in tokens.values())
        found[str(length)] = figures | {"tokens": tokens[next(iter(modes))]}
    return found


def time_first(
    engine: Engine, prompt: tuple[int, ...], drafting: Drafting
) -> tuple[float, list[int]]:
    """Seconds to the first of two tokens, and both."""
    torch.cuda.synchronize()
    begin, ids, seconds = perf_counter(), [], 0.0
    limits = Limits(2, engine.config.slots)
    for event in engine.answer(prompt, sampling=SAMPLING, limits=limits, drafting=drafting):
        if isinstance(event, Committed):
            seconds = seconds or perf_counter() - begin
            ids.append(event.token_id)
    return seconds, ids


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
    parser.add_argument("--first", nargs="*", type=int, default=[100, 1000])
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
    report = {
        "command": " ".join(sys.argv),
        "copy_bytes_per_second": rate,
        "ar": plain_figures(engine, plain, rate)
        | {
            "ready_seconds": ready,
            "peak_memory": torch.cuda.max_memory_allocated(),
            "first_token_ms": to_first_token(engine, plan, options.first),
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
        figures = compare(engine, plan, plain, prompts, options) if prompts else {}
        first = to_first_token(engine, plan, options.first)
        for length, each in report["ar"]["first_token_ms"].items():
            first[length]["equal_to_ar"] = first[length]["tokens"] == each["tokens"]
        figures["first_token_ms"] = first
        key = ",".join(map(str, plan.config.split))
        report["stages"][key] = {"head": plan.head_name, "ready_seconds": ready, **figures}
        engine.close()
        del engine
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
