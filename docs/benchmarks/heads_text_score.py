"""What more training text brings to a draft head, part 2 of 2: scores of the trained heads.

    python docs/benchmarks/heads_text_score.py -m MODEL WORK -o heads-text.json

WORK is the folder of ``heads_text.py`` with the heads trained as said there. Scores each head on
the held-out texts, MT-Bench and HumanEval (greedy answers, as in ``head_acceptance.py``), with
paired bootstrap intervals over texts or questions; beside them, on the two tasks, the shipped
head. Writes OUTPUT and, beside it, the training curves as NAME-curve.jsonl.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import head_acceptance as ha
import numpy as np
import torch
from heads_text import model_files, say
from numpy.typing import NDArray
from safetensors import safe_open

import ppsd_cli
from ppsd_cli.assets import ModelFiles
from ppsd_cli.errors import AssetError, PpsdError
from ppsd_cli.model.head_files import read_info
from ppsd_cli.tasks.batch_decode import GREEDY
from ppsd_cli.tasks.dataset import Batches, BatchSettings, Sample
from ppsd_cli.tasks.evaluate import measure

SHIPPED = Path(ppsd_cli.__file__).parent / "data" / "heads" / "smollm2-135m-2stage"
TASKS = ("held_out", "mt-bench", "humaneval")
_DRAWS = 2000


def hits_by_text(
    setup: ha.Setup, names: Sequence[str], samples: Sequence[Sample]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Top-1 hits [texts, heads] and wanted positions [texts], text by text without padding."""
    heads = [setup.heads[name] for name in names]
    hits, counts = [], []
    for sample in samples:
        batch = Batches([sample], BatchSettings(16, 0, 1, shuffle=False))[0]
        scores = measure(setup.backbone, heads, [batch])
        hits.append([score.whole.top[0] * score.whole.count for score in scores])
        counts.append(scores[0].whole.count)
    return np.array(hits), np.array(counts)


def intervals(
    names: Sequence[str],
    hits: NDArray[np.float64],
    counts: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> dict[str, Any]:
    """Top 1 of each head, and of each head less the one before it: [value, low, high].

    95% bootstrap intervals over ``groups`` [texts] (turns of a question belong together), the
    same draws for all heads. They say nothing of another training seed.
    """
    keys = np.unique(groups)
    h = np.stack([hits[groups == key].sum(axis=0) for key in keys])
    c = np.array([counts[groups == key].sum() for key in keys])
    pick = np.random.default_rng(0).integers(0, len(keys), (_DRAWS, len(keys)))
    boot = h[pick].sum(axis=1) / c[pick].sum(axis=1)[:, None]
    point = h.sum(axis=0) / c.sum()

    def show(value: float, draws: NDArray[np.float64]) -> list[float]:
        return [round(float(x), 4) for x in (value, *np.percentile(draws, [2.5, 97.5]))]

    top1 = {name: show(point[i], boot[:, i]) for i, name in enumerate(names)}
    gains = {
        f"{names[i]} - {names[i - 1]}": show(point[i] - point[i - 1], boot[:, i] - boot[:, i - 1])
        for i in range(1, len(names))
    }
    return {"positions": int(c.sum()), "groups": len(keys), "top1": top1, "gain": gains}


def read_arm(folder: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a run left: its figures, its last report on training text, and the share of the
    held-out answer tokens that its draft vocabulary reaches."""
    info = read_info(folder).training
    reports = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    heads = [next(iter(report["heads"].values())) for report in reports]
    curve = [
        (report["step"], head["held_out"]["top1"])
        for report, head in zip(reports, heads, strict=True)
        if "held_out" in head
    ]
    with safe_open(folder / "head.safetensors", "np") as file:
        name = next((key for key in file.keys() if "token_ids" in key), None)  # noqa: SIM118
        ids = None if name is None else file.get_tensor(name)
    text = np.concatenate([sample.ids[sample.answers] for sample in samples])
    return {
        "steps": info["steps"],
        "batch_tokens": info["batch_tokens"],
        "seconds": info["seconds"],
        "figures": info["figures"],
        "train_top1": heads[-1]["acceptance"],
        "curve": curve,
        "vocabulary_reach": 1.0 if ids is None else round(float(np.isin(text, ids).mean()), 5),
    }


@torch.no_grad()
def score(files: ModelFiles, options: argparse.Namespace) -> dict[str, Any]:
    """All figures as one record; also the file of curves."""
    shares = json.loads((options.work / "shares.json").read_text())
    folders = {name: options.work / f"head-{name}" for name in shares}
    missing = [str(f) for f in folders.values() if not (f / "head.json").exists()]
    if missing:
        raise AssetError(f"no head in {', '.join(missing)}; train it as heads_text.py says")
    rows = [json.loads(line) for line in (options.work / "held.jsonl").read_text().splitlines()]
    held = [Sample.of(row["ids"], row["answers"], greedy=row["greedy"]) for row in rows]
    extra = [SHIPPED] if read_info(SHIPPED).model_hash == files.model_hash else []
    options.heads = [*folders.values(), *extra]
    setup = ha.load(files, options)
    report = {
        "run": _run(files, setup),
        "text": shares,
        "arms": {name: read_arm(folder, held) for name, folder in folders.items()},
    }
    names = [folder.name for folder in folders.values()]

    def add(task: str, samples: list[Sample], heads: list[str], groups: NDArray[np.int64]) -> None:
        whole = measure(setup.backbone, [setup.heads[n] for n in heads], _batches(setup, samples))
        report[task] = {
            "scores": {n: s.to_json() for n, s in zip(heads, whole, strict=True)},
            "intervals": intervals(heads, *hits_by_text(setup, heads, samples), groups),
        }
        say(task)

    # The shipped head may have seen such text in training: no held-out figure for it.
    add("held_out", held, names, np.arange(len(held)))
    for task, prompts in ha.read_tasks(options).items():
        samples = ha.conversations(setup, prompts, GREEDY)
        groups = np.arange(len(samples))
        if len(samples) == len(prompts) * len(prompts[0]):  # first turns of all, then second ones
            groups %= len(prompts)
        add(task, samples, [*names, *(folder.name for folder in extra)], groups)
    options.output.with_name(f"{options.output.stem}-curve.jsonl").write_text(_curves(folders))
    return report


def _curves(folders: dict[str, Path]) -> str:
    """The lines of every ``curve.jsonl``, with the name of the share."""
    return "".join(
        json.dumps({"arm": name, **json.loads(line)}) + "\n"
        for name, folder in folders.items()
        for line in (folder / "curve.jsonl").read_text().splitlines()
    )


def _batches(setup: ha.Setup, samples: list[Sample]) -> list[Any]:
    batches = Batches(samples, BatchSettings(setup.batch_tokens, 0, 1, shuffle=False))
    return [batches[i] for i in range(batches.per_epoch)]


def _run(files: ModelFiles, setup: ha.Setup) -> dict[str, str]:
    """Command, model, versions and hardware."""
    device = setup.backbone.device
    return {
        "command": shlex.join(["python", *sys.argv]),
        "model": files.name,
        "model_hash": files.model_hash,
        "dtype": str(setup.backbone.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown, and the intervals below."""
    lines = [
        "| text (tokens) | steps | passes | training text | held out | MT-Bench | HumanEval "
        "| reach |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        size = report["text"][name]["tokens"]
        tops = [report[task]["scores"][f"head-{name}"]["top1"] for task in TASKS]
        shown = [f"{x:.3f}" for x in (arm["train_top1"], *tops, arm["vocabulary_reach"])]
        passes = arm["steps"] * arm["batch_tokens"] / size
        lines.append(f"| {size:,} | {arm['steps']} | {passes:.1f} | {' | '.join(shown)} |")
    if len({arm["steps"] for arm in report["arms"].values()}) > 1:
        lines.append("NOT EQUAL STEPS: compare only the curves at equal steps")
    lines += [f"{task}: {json.dumps(report[task]['intervals'])}" for task in TASKS]
    return "\n".join(lines)


def main() -> int:
    """Score, print the table, write JSON."""
    options = _options()
    try:
        report = score(model_files(options.model, offline=options.offline), options)
    except PpsdError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORK", help="the folder of heads_text.py")
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--mt-bench", type=Path, help="question.jsonl instead of the wheel's")
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl[.gz] instead")
    parser.add_argument("--limit", type=int, help="first N prompts of each task")
    parser.add_argument("--new-tokens", "-n", type=int, default=240)
    parser.add_argument("--offline", action="store_true")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.set_defaults(device=device, dtype=None, compile=False, batch_tokens=16384)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
