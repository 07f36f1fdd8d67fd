"""Predicted against measured speed over a sweep: every head and width, 1 to 4 stages, even and not.

Measures times and acceptance once, predicts every setting from them, then runs all settings with
the function by which `ppsd calibrate` checks its candidates, a few at a time, each time with
plain decoding beside them. The JSON is written before the first group and after every one. The
same command again goes on where the file ends, with the predictions that are in it: --groups 2
ends after two groups, --again forgets the file. --plot draws predicted against measured.

Usage: python docs/benchmarks/calibrate_sweep.py -o FILE.json [--model smollm2-135m] [--devices ...]
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ppsd_cli.calibration_records import Candidate, Checked
from ppsd_cli.commands.calibrate_run import CalibrateOptions, prepare_job
from ppsd_cli.commands.report import versions
from ppsd_cli.commands.session import ModelChoice, find_model, find_profile
from ppsd_cli.config import Settings, parse_devices
from ppsd_cli.files import replace_bytes
from ppsd_cli.runtime.pipeline import RAW_EXIT
from ppsd_cli.tasks.calibrate.candidates import Predictor, best_three
from ppsd_cli.tasks.calibrate.check import run_candidates
from ppsd_cli.tasks.calibrate.forecast import ProcessTimes, Times
from ppsd_cli.tasks.calibrate.guessers import Guesser
from ppsd_cli.tasks.calibrate.run import (
    Job,
    guessers_of,
    measure,
    named_heads_of,
    predictor_of,
    score,
    track_of,
)
from ppsd_cli.tasks.progress import Steps
from ppsd_cli.ui.bench_svg import tag

GROUP = 4
"""Settings that are loaded and run together, beside plain decoding."""


def settings_of(
    job: Job, times: Times, predictor: Predictor, guessers: list[Guesser]
) -> list[Candidate]:
    """Plain decoding, the naive split, every head at each number of stages, uneven ones, trees."""
    layers, found = job.spec.layers, []
    found += predictor.plains()[1:]
    trained = [g for g in guessers if g.name != RAW_EXIT]
    some_raw = [g for g in guessers if g.taps[0] in (layers // 4, layers // 2, 2 * layers // 3)]
    for guesser in (*trained, *(g for g in some_raw if g.name == RAW_EXIT)):
        for stages in job.layout.devices:
            best = predictor.split(guesser, stages)
            if best is None or (guesser.name == RAW_EXIT and stages > 2):
                continue
            found.append(predictor.predict(guesser, best))
            for split in uneven(best):
                if stages == 3 and predictor.fitting(guesser, split):
                    found.append(predictor.predict(guesser, split))
            if guesser.name != RAW_EXIT and stages < 4:
                found += trees(times, predictor, guesser, stages)
    if isinstance(times, ProcessTimes):
        for stages in (2, 3):
            share = layers // stages
            split = (share,) * (stages - 1) + (layers - share * (stages - 1),)
            found.append(naive(job, times, predictor, split))
    return list(dict.fromkeys(found))


def trees(times: Times, predictor: Predictor, guesser: Guesser, stages: int) -> list[Candidate]:
    """The best split at the two least widths above 1."""
    found = []
    for width in sorted(times.widths)[1:3]:
        split = predictor.split(guesser, stages, width)
        found += [] if split is None else [predictor.predict(guesser, split, width)]
    return found


def uneven(split: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The same exit with the layers behind it shared evenly, and with most of them at the front."""
    first, rest = split[0], sum(split[1:])
    half = rest // 2
    return [(first, half, rest - half), (first, 3 * rest // 4, rest - 3 * rest // 4)]


def naive(job: Job, times: ProcessTimes, predictor: Predictor, split: tuple[int, ...]) -> Candidate:
    """Plain decoding over several stages, one of which works at a time."""
    stages, seconds = len(split), times.naive(split)
    return replace(
        predictor.plain,
        split=split,
        devices=job.layout.devices[stages],
        threads=job.layout.threads[stages],
        tick_seconds=seconds / stages,
        tokens_per_tick=1 / stages,
        tokens_per_second=1 / seconds,
    )


def record(checked: Checked, plain: Checked) -> dict[str, Any]:
    """One setting as plain data."""
    each = checked.candidate
    return {
        "decoder": each.decoder if each.head or len(each.split) == 1 else "naive-split",
        "split": list(each.split),
        "threads": each.threads,
        "head": each.head,
        "width": each.width,
        "acceptance": checked.acceptance,
        "predicted_acceptance": each.acceptance,
        "tokens_per_tick": checked.tokens_per_tick,
        "predicted_tokens_per_tick": each.tokens_per_second * each.tick_seconds,
        "predicted_tick": each.tick_seconds,
        "predicted": each.tokens_per_second,
        "measured": checked.speed,
        "interval": [checked.low, checked.high],
        "predicted_over_measured": each.tokens_per_second / checked.speed,
        "speedup": checked.speed / plain.speed,
        "limit": each.limit,
    }


def plot(records: list[dict[str, Any]], title: str) -> str:
    """Measured against predicted tokens/s, with lines at 10% to either side."""
    top = 1.1 * max(max(r["predicted"], r["measured"]) for r in records)
    size, left, base = 400, 60, 440

    def place(predicted: float, measured: float) -> tuple[float, float]:
        return left + size * predicted / top, base - size * measured / top

    colours = {"ar": "#6d7886", "naive-split": "#9c6412", "ppsd": "#2b5f94", "tree": "#3d7a4e"}
    parts = [tag("rect", width=640, height=500, fill="#fcfcfa")]
    for factor, style in ((1.0, "none"), (1 / 0.9, "4 3"), (1 / 1.1, "4 3")):
        x, y = place(min(top, top / factor), min(top, top / factor) * factor)
        line = {"x1": left, "y1": base, "x2": f"{x:.1f}", "y2": f"{y:.1f}"}
        parts.append(tag("line", stroke="#9ba4b0", stroke_dasharray=style, **line))
    for at in range(0, int(top) + 1, max(1, int(top / 5))):
        x, y = place(at, at)
        font = {"font_size": 12, "font_family": "system-ui, sans-serif", "fill": "#565f6c"}
        parts.append(tag("text", str(at), x=f"{x:.1f}", y=base + 18, text_anchor="middle", **font))
        parts.append(tag("text", str(at), x=left - 8, y=f"{y + 4:.1f}", text_anchor="end", **font))
    for each in records:
        x, y = place(each["predicted"], each["measured"])
        name = words(each)
        colour = colours["tree" if each["width"] > 1 else str(each["decoder"])]
        dot = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": 4.5, "fill": colour}
        parts.append(tag("circle", tag("title", name), **dot))
    font = {"font_size": 13, "font_family": "system-ui, sans-serif", "fill": "#1b222d"}
    parts.append(tag("text", title, x=left, y=22, **font))
    axes = "predicted tokens/s (across), measured (up); dashed: 10%"
    parts.append(tag("text", axes, x=left, y=488, **font))
    for number, (name, colour) in enumerate(colours.items()):
        y = 60 + 22 * number
        parts.append(tag("circle", cx=500, cy=y - 4, r=4.5, fill=colour))
        parts.append(tag("text", name, x=512, y=y, **font))
    space = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": "0 0 640 500"}
    return tag("svg", "".join(parts), **space) + "\n"


def options_of() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices")
    parser.add_argument("--dtype")
    parser.add_argument("--context", type=int)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--groups", type=int, help="end after so many groups")
    parser.add_argument("--again", action="store_true", help="measure anew, whatever the file has")
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def job_of(arguments: argparse.Namespace, steps: Steps) -> Job:
    """What `ppsd calibrate` would measure with these flags."""
    devices = None if arguments.devices is None else parse_devices(arguments.devices)
    flags = Settings(devices=devices, dtype=arguments.dtype, context=arguments.context)
    options = CalibrateOptions(
        None, None, arguments.limit, arguments.tokens, True, None, False, None, False
    )
    choice = ModelChoice(arguments.model, None, None, True)
    profile = find_profile(choice)
    return prepare_job(find_model(choice, profile, steps.say), profile, flags, options)


def predicted(job: Job, steps: Steps) -> dict[str, Any]:
    """A report without results: times, and everything that is to be run with its prediction."""
    scores = score(job, steps)
    measured = measure(job, scores.length, steps)
    predictor = predictor_of(job, measured.times)
    guessers = guessers_of(job, scores)
    settings = settings_of(job, measured.times, predictor, guessers)
    best = best_three(predictor.candidates(guessers, sorted(measured.times.widths)))
    names = {head.folder: head.name for head in job.heads}
    return {
        "model": job.model,
        "machine": dict(job.machine),
        "versions": versions(),
        "prompts": len(scores.texts),
        "tokens": job.tokens,
        "boundary": None if measured.boundary is None else asdict(measured.boundary),
        "best_three_predicted": [asdict(each) | renamed(each.head, names) for each in best],
        "plain": asdict(predictor.plain),
        "planned": [asdict(each) | renamed(each.head, names) for each in settings],
        "complete": False,
        "ar_of_each_group": [],
        "settings": [],
    }


def renamed(head: str | None, names: dict[str, str]) -> dict[str, str | None]:
    """A head by its name in place of its folder, or the other way around."""
    return {"head": names.get(head or "", head)}


def candidate(fields: dict[str, Any], job: Job) -> Candidate:
    """A prediction from a report."""
    lists = {name: tuple(fields[name]) for name in ("split", "devices")}
    folders = {head.name: head.folder for head in job.heads}
    return Candidate(**fields | lists | renamed(fields["head"], folders))


def run_group(job: Job, report: dict[str, Any], steps: Steps) -> None:
    """Run the next few settings and add what they gave to the report."""
    names = {head.folder: head.name for head in job.heads}
    done = len(report["settings"]) - 1 if report["settings"] else 0  # the first one is plain
    group = [candidate(each, job) for each in report["planned"][done : done + GROUP]]
    track = track_of(job, len(group) + 1, steps)
    plain, *checked = run_candidates(candidate(report["plain"], job), group, track)
    report["ar_of_each_group"].append(plain.speed)
    if not done:
        report["settings"].append(record(plain, plain))
    for each in checked:
        report["settings"].append(record(named_heads_of(each, names), plain))
        steps.say(line(report["settings"][-1]))
    report["complete"] = done + GROUP >= len(report["planned"])


def main() -> None:
    """Predict, run all, write JSON."""
    arguments, steps = options_of(), Steps(quiet=False)
    job = job_of(arguments, steps)
    known = arguments.output.is_file() and not arguments.again
    report = json.loads(arguments.output.read_text()) if known else predicted(job, steps)
    if report.get("machine") != dict(job.machine) or "planned" not in report:
        sys.exit(f"{arguments.output} is of another machine or script; take --again")
    left = arguments.groups
    while not report["complete"] and left != 0:
        write(report, arguments.output)
        run_group(job, report, steps)
        left = None if left is None else left - 1
    write(report, arguments.output)
    if arguments.plot is not None:
        records = report["settings"]
        title = f"{job.model}: {len(records)} settings"
        replace_bytes(arguments.plot, plot(records, title).encode())
    steps.say(summary(report["settings"]))
    steps.close()


def write(report: dict[str, Any], path: Path) -> None:
    """The report as JSON."""
    replace_bytes(path, (json.dumps(report, indent=1) + "\n").encode())


def summary(records: list[dict[str, Any]]) -> str:
    """How many predictions are near, as tokens/s and as speed-ups over the group's plain decoding,
    from which drifts of the machine between groups are gone. The first record is plain decoding."""
    plain = records[0]["predicted"]
    near = [r for r in records if abs(r["predicted_over_measured"] - 1) <= 0.1]
    beside = [r for r in records if abs(r["predicted"] / plain / r["speedup"] - 1) <= 0.1]
    fastest = max(records, key=lambda each: each["measured"])
    return (
        f"{len(near)} of {len(records)} within 10%, {len(beside)} by their speed-up over plain "
        f"decoding; fastest: {words(fastest)}"
    )


def words(each: dict[str, Any]) -> str:
    """A setting's name."""
    width = f" width {each['width']}" if each["width"] > 1 else ""
    head = each["head"] or ""
    return f"{each['decoder']} {each['split']} {head}{width} {each['threads']} threads"


def line(each: dict[str, Any]) -> str:
    """One setting for people."""
    return (
        f"{words(each)}: predicted {each['predicted']:.1f}, measured {each['measured']:.1f}, "
        f"ratio {each['predicted_over_measured']:.3f}, speed-up {each['speedup']:.3f}"
    )


if __name__ == "__main__":
    main()
