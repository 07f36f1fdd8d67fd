"""PPSD over 2, 4 and 8 GPUs of one host against the naive split, one GPU and tensor parallelism.

Random weights of a 70B and an 8B shape in bfloat16; guesses right with fixed probability while the
real head runs. Over the GPUs' own links, through host memory, and there with 50, 200 and 1000 µs
added at each boundary (at each all-reduce of tensor parallelism). Tokens/s, speed-ups, the
acceptance from which on PPSD passes tensor parallelism, the fixed cost of a tick (the tick without
the work of the slowest device), peak memory.

Each part runs in processes of its own for at most ``--part-seconds``, and what it measured is
written at once. The same command again goes on where the file ends; ``--seconds`` starts no part
behind that time. On one GPU (or a CPU, in Triton's interpreter) one device plays several: that
tries the script, and its figures mean nothing.

    python docs/benchmarks/many_gpus.py -o many-gpus.json --plot many-gpus.svg
    python docs/benchmarks/many_gpus.py -o FILE.json --parts 'llama-70b/*/8' 'llama-70b/one/*'
    python docs/benchmarks/many_gpus.py -o FILE.json --quick --shapes llama-8b --layers 8
    python docs/benchmarks/many_gpus.py -o FILE.json --list
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

from many_gpus_jobs import run_part, say
from many_gpus_plan import KINDS, LINKS, Part, Setup, chosen, counts_for, missing, parts_of, summary
from many_gpus_plot import plot

from ppsd_cli.files import replace_bytes
from ppsd_cli.model.shapes import SHAPES

ENDED_OTHERWISE = 5


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="an SVG of what the file holds in the end")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-70b", "llama-8b"])
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of GPUs; default: 2, 4, 8")
    parser.add_argument("--layers", type=int, help="only so many layers of each shape")
    parser.add_argument("--cpu", action="store_true", help="this host's CPU, although it has GPUs")
    parser.add_argument("--acceptance", nargs="+", type=float, help="of chains and trees")
    parser.add_argument("--missed", type=float, help="share of misses that a tree misses, too")
    parser.add_argument("--depth", type=int, choices=(1, 2), default=1, help="of trees at most")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--parts", nargs="+", default=[], help="only these, such as '*/tp/*'")
    parser.add_argument("--tokens", type=int, help="of each answer")
    parser.add_argument("--answers", type=int)
    parser.add_argument("--quick", action="store_true", help="few tokens, links and acceptances")
    parser.add_argument("--eager", action="store_true", help="tensor parallelism uncompiled only")
    parser.add_argument("--part-seconds", type=float, default=240.0)
    parser.add_argument("--seconds", type=float, help="start no part behind this time")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    parser.add_argument("--list", action="store_true", help="only name the parts")
    return parser.parse_args(arguments)


def gpus_here() -> int:
    """GPUs of this host. Asked for in a process of its own, so that this one takes no memory."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def setup_of(options: argparse.Namespace) -> Setup:
    """What these flags ask for on this host."""
    devices = 0 if options.cpu else gpus_here()
    counts = tuple(sorted(options.gpus or counts_for(devices)))
    setup = Setup(tuple(options.shapes), counts, devices, layers=options.layers)
    setup = replace(
        setup, depth=options.depth, links=tuple(name for name in LINKS if name in options.links)
    )
    if options.quick:
        few = tuple(name for name in ("peer", "host", "host+200us") if name in setup.links)
        setup = replace(
            setup,
            tokens=24 if devices else 4,
            answers=1,
            prompt=8,
            acceptance=(0.6, 1.0),
            links=few,
        )
        setup = replace(setup, slow_acceptance=setup.acceptance)
    if options.eager:
        setup = replace(setup, variants=("eager",))
    if options.acceptance:
        setup = replace(setup, acceptance=tuple(sorted(options.acceptance)))
    if options.missed is not None:
        setup = replace(setup, missed=options.missed)
    return replace(
        setup, tokens=options.tokens or setup.tokens, answers=options.answers or setup.answers
    )


def report_of(options: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """The file's report where it is of the same measurement, or a new one."""
    if options.output.is_file() and not options.again:
        report = json.loads(options.output.read_text())
        if report.get("setup") != setup.to_json():
            sys.exit(f"{options.output} is of other settings or another host; take --again")
        return report
    command = " ".join(sys.argv)
    return {"command": command, "setup": setup.to_json(), "environment": None, "parts": {}}


def measure(part: Part, setup: Setup, report: dict[str, Any], seconds: float) -> None:
    """Run what is missing of a part, and add it to the report."""
    known = report["parts"].get(part.name)
    wanted = missing(part, known)
    say(f"{part.name}: {', '.join(wanted)}, {seconds:.0f} s at most")
    outcome = run_part(part, setup, wanted, seconds=seconds)
    facts = (known or {}).get("facts", {}) | outcome.facts
    report["environment"] = facts.pop("environment", None) or report["environment"]
    links = (known or {}).get("links", {}) | outcome.links
    record = asdict(part) | {"state": outcome.state, "why": outcome.why}
    record |= {"seconds": outcome.seconds, "facts": facts, "links": links}
    report["parts"][part.name] = record
    say(f"{part.name}: {outcome.state} after {outcome.seconds:.0f} s; {outcome.why or ''}")


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for people, a line for each pipeline and link."""
    lines = []
    for name, part in report["parts"].items():
        if part["state"] != "done":
            lines.append(f"{name}: {part['state']}: {part['why']}")
    for shape, found in report["summary"].items():
        lines.append(f"{shape}: one GPU {_ms(found['one_gpu_ms'])}, fixed {found['fixed_ms']} ms")
        for count, links in found["pipelines"].items():
            for link, figures in links.items():
                lines += _link_lines(f"  {count} devices, {link}:", figures)
    return lines


def _link_lines(name: str, figures: dict[str, Any]) -> list[str]:
    rival = _ms(figures["tensor_parallel_ms"])
    lines = [f"{name} naive {_ms(figures['naive_ms'])}, tensor parallel {rival}"]
    for kind in KINDS:
        rows = figures[kind]
        if rows is None:
            continue
        if not isinstance(rows, list):
            lines.append(f"    {kind}: {rows}")
            continue
        for row in rows:
            over = row["over_tensor_parallel"]
            lines.append(
                f"    {kind} {row['acceptance']:g} ({row['realised']:.2f}): "
                f"{row['tokens_per_second']:.1f} tokens/s, {row['over_naive_split']:.2f} of naive, "
                f"{'-' if over is None else f'{over:.2f}'} of tensor parallel"
            )
        lines.append(f"    {kind} passes: {figures.get(f'{kind}_passes_tensor_parallel')}")
    return lines


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"


def main(arguments: Sequence[str]) -> int:
    """Measure part by part; 0 where all that was asked for is there or cannot run here."""
    begin, options = monotonic(), options_of(arguments)
    setup = setup_of(options)
    parts = chosen(parts_of(setup), options.parts)
    if options.list:
        sys.stdout.write("".join(f"{part.name}\n" for part in parts))
        return 0
    report = report_of(options, setup)
    for part in parts:
        spent = monotonic() - begin
        left = options.part_seconds
        if options.seconds is not None:
            left = min(left, options.seconds - spent)
        if left > 0 and missing(part, report["parts"].get(part.name)):
            measure(part, setup, report, left)
        report["summary"] = summary(report)
        replace_bytes(options.output, (json.dumps(report, indent=1) + "\n").encode())
    if options.plot is not None:
        replace_bytes(options.plot, plot(report).encode())
    sys.stdout.write("\n".join(lines_of(report)) + "\n")
    open_ones = [p.name for p in parts if missing(p, report["parts"].get(p.name))]
    if open_ones:
        say(f"not measured yet: {', '.join(open_ones)}; the same command goes on")
    return ENDED_OTHERWISE if open_ones else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
