"""Finds the tile sizes of the CUDA engine's products: times every candidate on this GPU.

For each product of a model's layers a CUDA graph runs the kernel over as many weight copies as do
not fit the GPU's cache, as decoding does. Prints, for each shape and width, the best candidates
with microseconds per launch and the share of the copy bandwidth; the choice then goes by hand into
``ppsd_cli/runtime/cuda/tiles.py``.

    python docs/benchmarks/gpu_tiles.py --models smollm2-135m llama-8b > FILE.json
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from dataclasses import asdict, replace

import torch

from ppsd_cli.model.layers import Shape
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime.cuda import launch
from ppsd_cli.runtime.cuda.launch import Launcher, Linear, Qkv, Votes
from ppsd_cli.runtime.cuda.tiles import Tile, power_of_two

FEW = 2**28
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}
LAUNCHER = Launcher(clock=False, chained=True, slots=64)


def products(spec: ModelSpec) -> dict[str, tuple[int, int, bool]]:
    """Inner and outer size of each product, and whether its rows come in pairs."""
    h, f, d = spec.hidden, spec.intermediate, spec.head_dim
    return {
        "qkv": (h, (spec.heads + 2 * spec.kv_heads) * d // 2, True),
        "output": (spec.heads * d, h, False),
        "gate_up": (h, f, True),
        "down": (f, h, False),
        "lm": (h, spec.vocabulary, False),
    }


def candidates(inner: int, *, width: int) -> list[Tile]:
    """What is tried."""
    dots = [
        Tile(rows, columns, warps, True, stages)
        for rows, columns, warps, stages in itertools.product(
            (16, 32, 64), (64, 128, 256), (4,), (3, 5)
        )
    ]
    if width > 1:
        return dots
    top = min(power_of_two(inner), 2048)
    sizes = sorted({min(top, c) for c in (256, 512, 1024, 2048)})
    plain = [
        Tile(rows, columns, warps)
        for rows, columns, warps in itertools.product((1, 2, 4, 8), sizes, (2, 4, 8))
        if 512 <= rows * columns <= 8192
    ]
    return plain + [t for t in dots if t.stages == 5 and t.rows < 64]


def calls(name: str, spec: ModelSpec, width: int):
    """A function that launches the product once for weight copy i, and the number of copies."""
    inner, outer, paired = products(spec)[name]
    shape = Shape.of(spec)
    rows = outer * (2 if paired else 1)
    copies = max(2, min(400, FEW // (rows * inner * 2)))
    weights = [torch.randn(rows, inner, **BF16) * inner**-0.5 for _ in range(copies)]
    x = torch.randn(width, inner, **BF16)
    norm = torch.ones(inner, **BF16)
    out = torch.zeros(width, outer, **BF16)
    place = torch.zeros(width, 2, dtype=torch.int64, device="cuda")
    if name == "qkv":
        tables = (torch.ones(64, shape.head_dim, **BF16),) * 2
        keys = torch.zeros(shape.kv_heads, 64, shape.head_dim, **BF16)
        q = torch.zeros(width, shape.heads, shape.head_dim, **BF16)

        def one(i: int) -> None:
            call = Qkv(x, weights[i], norm, place, q, keys, keys)
            launch.qkv(LAUNCHER, [call], shape=shape, tables=tables)
    elif name == "lm":
        logits = torch.zeros(width, outer, dtype=torch.float32, device="cuda")
        votes = Votes.of(width, outer, torch.device("cuda"))

        def one(i: int) -> None:
            launch.output(
                LAUNCHER, x, norm, weights[i], eps=1e-5, place=place, logits=logits, votes=votes,
                noise=None, token_ids=None,
            )  # fmt: skip
    else:
        gated = name == "gate_up"
        given = {"norm": norm} if gated else {"residual": out}

        def one(i: int) -> None:
            launch.linear(LAUNCHER, [Linear(x, weights[i], out, **given)], eps=1e-5, gated=gated)

    return one, copies, rows * inner * 2


def graph_time(function, repeats: int) -> float:
    """Microseconds of one replay, median of ``repeats``."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def measure(name: str, spec: ModelSpec, width: int, rate: float) -> list[dict]:
    """All candidates of one product, best first."""
    one, copies, size = calls(name, spec, width)
    found = []
    for tile in candidates(products(spec)[name][0], width=width):
        launch.choose_tile = lambda *_, tile=tile, **__: tile
        try:
            spent = graph_time(lambda: [one(i) for i in range(copies)], 5) / copies
        except Exception as error:  # noqa: BLE001 (a candidate that does not fit is no candidate)
            sys.stderr.write(f"{name} {tile}: {str(error).splitlines()[0][:90]}\n")
            continue
        found.append({**asdict(tile), "us": spent, "of_copy": size / spent * 1e6 / rate})
    return sorted(found, key=lambda each: each["us"])


def compile_some(job: tuple[str, str, int, int, int]) -> None:
    """Compile every ``step``-th candidate into Triton's cache, in a process of its own."""
    model, name, width, first, step = job
    spec = replace(SHAPES[model])
    try:
        one, _, _ = calls(name, spec, width)
        for tile in candidates(products(spec)[name][0], width=width)[first::step]:
            launch.choose_tile = lambda *_, tile=tile, **__: tile
            try:
                one(0)
            except Exception:  # noqa: BLE001, S112 (the measuring process says so)
                continue
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return


def copy_rate() -> float:
    """Bytes read and written per second by the fastest of three device-to-device copies."""
    a = torch.zeros(2**30, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    ways = (lambda: b.copy_(a), lambda: torch.mul(a, 1.0, out=b), lambda: torch.add(a, a, out=b))
    return max(2 * a.nbytes / graph_time(way, 9) * 1e6 for way in ways)


def main() -> None:
    """Compile in parallel, measure one by one, print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "llama-8b"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    names = ("qkv", "output", "gate_up", "down", "lm")
    jobs = [
        (model, name, width, first, 3)
        for model in options.models
        for name in names
        for width in options.widths
        for first in range(3)
    ]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.map(compile_some, jobs, chunksize=1)
    rate = copy_rate()
    report = {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": rate, "best": []}
    for model, name, width in itertools.product(options.models, names, options.widths):
        best = measure(name, SHAPES[model], width, rate)[:6]
        report["best"].append({"model": model, "product": name, "width": width, "tiles": best})
        for each in best[:3]:
            sys.stderr.write(f"{model} {name} w{width} {each}\n")
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
