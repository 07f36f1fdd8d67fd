"""Predicted against measured speed over a sweep: every head, 1 to 4 stages, even and uneven.

Measures times and acceptance once, predicts every setting from them, then runs all settings with
the function by which `ppsd calibrate` checks its candidates, a few at a time, each time with
plain decoding beside them. The JSON is written after every group, so that a run that is ended
early leaves what it has; --plot draws predicted against measured.

Usage: python docs/benchmarks/calibrate_sweep.py -o FILE.json [--model smollm2-135m] [--devices ...]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppsd_cli.calibration_records import Candidate, Checked
from ppsd_cli.commands.calibrate_run import CalibrateOptions, prepare_job
from ppsd_cli.commands.report import versions
from ppsd_cli.commands.session import ModelChoice, find_model, find_profile
from ppsd_cli.config import Settings, parse_devices
from ppsd_cli.files import replace_bytes
from ppsd_cli.runtime.pipeline import RAW_EXIT
from ppsd_cli.tasks.calibrate.candidates import Guesser, Predictor, best_three
from ppsd_cli.tasks.calibrate.check import run_candidates
from ppsd_cli.tasks.calibrate.forecast import ProcessTimes
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
    job: Job, times: object, predictor: Predictor, guessers: list[Guesser]
) -> list[Candidate]:
    """Plain decoding, the naive split, every head at each number of stages, and uneven splits."""
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
    if isinstance(times, ProcessTimes):
        for stages in (2, 3):
            share = layers // stages
            split = (share,) * (stages - 1) + (layers - share * (stages - 1),)
            found.append(naive(job, times, predictor, split))
    return list(dict.fromkeys(found))


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
        "acceptance": checked.acceptance,
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

    colours = {"ar": "#6d7886", "naive-split": "#9c6412", "ppsd": "#2b5f94"}
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
        name = f"{each['decoder']} {each['split']} {each['head'] or ''}, {each['threads']} threads"
        colour = colours[str(each["decoder"])]
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


def main() -> None:
    """Predict, run all, write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices")
    parser.add_argument("--dtype")
    parser.add_argument("--context", type=int)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    devices = None if arguments.devices is None else parse_devices(arguments.devices)
    flags = Settings(devices=devices, dtype=arguments.dtype, context=arguments.context)
    options = CalibrateOptions(
        None, None, arguments.limit, arguments.tokens, True, None, False, None, False
    )
    choice = ModelChoice(arguments.model, None, None, True)
    profile, steps = find_profile(choice), Steps(quiet=False)
    job = prepare_job(find_model(choice, profile, steps.say), profile, flags, options)
    scores = score(job, steps)
    measured = measure(job, scores.length, steps)
    predictor = predictor_of(job, measured.times)
    guessers = guessers_of(job, scores)
    names = {head.folder: head.name for head in job.heads}
    settings = settings_of(job, measured.times, predictor, guessers)
    best = best_three(predictor.candidates(guessers, (1,)))
    records, plains = [], []
    for first in range(0, len(settings), GROUP):
        group = settings[first : first + GROUP]
        plain, *checked = run_candidates(
            predictor.plain, group, track_of(job, len(group) + 1, steps)
        )
        plains.append(plain)
        found = [record(named_heads_of(each, names), plain) for each in checked]
        records += found if first else [record(plain, plain), *found]
        for each in records[-len(found) :]:
            steps.say(line(each))
        report = {
            "model": job.model,
            "machine": dict(job.machine),
            "versions": versions(),
            "prompts": len(scores.texts),
            "tokens": arguments.tokens,
            "ar_of_each_group": [each.speed for each in plains],
            "best_three_predicted": [
                {"split": list(c.split), "head": names.get(c.head or "", c.head)} for c in best
            ],
            "complete": first + GROUP >= len(settings),
            "settings": records,
        }
        replace_bytes(arguments.output, (json.dumps(report, indent=1) + "\n").encode())
        if arguments.plot is not None:
            title = f"{job.model}: {len(records)} settings"
            replace_bytes(arguments.plot, plot(records, title).encode())
    steps.close()


def line(each: dict[str, Any]) -> str:
    """One setting for people."""
    return (
        f"{each['decoder']} {each['split']} {each['head'] or ''} {each['threads']} threads: "
        f"predicted {each['predicted']:.1f}, measured {each['measured']:.1f}, "
        f"ratio {each['predicted_over_measured']:.3f}, speed-up {each['speedup']:.3f}"
    )


if __name__ == "__main__":
    main()
