"""Tiles of a layer's products where they run: in a chain of layers, one product changed at a time.

``gpu_tiles.py`` times products alone. In a chain their programs also meet those of the kernel
before and after (programmatic dependent launch), so what is best alone need not be best there.
Prints microseconds a layer for each candidate, and for the choice of ``tiles.py``; for LM matrices
microseconds a launch.

    python docs/benchmarks/gpu_layers.py --model llama-8b --width 4 > FILE.json
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from gpu_tiles import calls, graph_time, products

from ppsd_cli.model.load import Loader
from ppsd_cli.model.random_weights import RandomCheckpoint
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.stage import Stage, StageRange
from ppsd_cli.runtime.cuda import launch
from ppsd_cli.runtime.cuda.lanes import StageLane, run_blocks
from ppsd_cli.runtime.cuda.launch import Branch, Launcher
from ppsd_cli.runtime.cuda.tiles import Tile, choose_tile

POSITION, SLOTS, PATH = 200, 1025, 2
SHARED = 220 * 1024
LAYER = ("qkv", "output", "gate_up", "down")


def candidates(inner: int, *, paired: bool) -> list[Tile]:
    """What is tried for several rows."""
    found = []
    for rows, columns, warps, stages in itertools.product(
        (16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5)
    ):
        size = (rows * (2 if paired else 1) + 16) * columns * 2 * stages
        if size <= SHARED and rows * columns >= 2048 and columns <= inner:
            found.append(Tile(rows, columns, warps, True, stages))
    return found


class Chain:
    """Layers of one stage or more behind each other, as in a tick of a tree."""

    def __init__(self, spec: ModelSpec, *, width: int, members: int) -> None:
        device = torch.device("cuda")
        checkpoint = RandomCheckpoint(spec, 0, device)
        loader = Loader(checkpoint, spec, torch.bfloat16, device)
        each = spec.layers // members
        self.launcher = Launcher(clock=False, chained=True, slots=SLOTS)
        room = {"dtype": torch.bfloat16, "device": device}
        inputs = torch.randn(members, width, spec.hidden, **room)
        states = torch.zeros(members, width, spec.hidden, **room)
        self.lanes = []
        for index in range(members):
            part = StageRange(index * each, (index + 1) * each, spec.layers + 1)
            stage = Stage.load(loader, part, slots=SLOTS)
            self.lanes.append(
                StageLane(
                    self.launcher,
                    stage,
                    source=inputs[index],
                    states={part.last: states[index]},
                )
            )
        rows = torch.arange(width, device=device) + POSITION
        self.place = torch.stack([rows, rows], dim=1)[None].expand(members, -1, -1).contiguous()
        self.paths = torch.zeros(members, width, PATH, dtype=torch.int32, device=device)
        self.paths[:, :, 0] = 99
        owner = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        where = torch.arange(SLOTS, dtype=torch.int32, device=device)
        views = torch.tensor([[POSITION + width, 9]] * members, device=device)
        self.branches = [Branch(owner, where, p, v) for p, v in zip(self.paths, views, strict=True)]
        self.width = width

    def run(self) -> None:
        """All layers."""
        for index in range(len(self.lanes[0])):
            made = [lane.call(index, self.place[s], None) for s, lane in enumerate(self.lanes)]
            if self.width > 1:
                made = [replace(c, branch=b) for c, b in zip(made, self.branches, strict=True)]
            lane = self.lanes[0]
            run_blocks(self.launcher, made, lane.shape, lane.stage.tables, first=not index)

    def layer_us(self) -> float:
        """Microseconds a layer."""
        return graph_time(self.run, 9) / len(self.lanes[0])


def overriding(spec: ModelSpec, tiles: dict[str, Tile]) -> Callable[..., Tile]:
    """``choose_tile`` with other tiles for some products."""
    sizes = {
        (inner, outer, paired): tiles[name]
        for name, (inner, outer, paired) in products(spec).items()
        if name in tiles
    }

    def choose(inner: int, outer: int, *, paired: bool, **options) -> Tile:
        known = sizes.get((inner, outer, paired))
        return known or choose_tile(inner, outer, paired=paired, **options)

    return choose


def compile_some(job: tuple[str, str, int, int, int]) -> None:
    """Compile every ``step``-th candidate into Triton's cache, in a process of its own."""
    model, name, width, first, step = job
    spec = spec_of(model, name)
    product = "lm" if name.endswith("lm") else name
    inner, _, paired = products(spec)[product]
    one, _, _ = calls(product, replace(spec, layers=1), width)
    for tile in candidates(inner, paired=paired)[first::step]:
        launch.choose_tile = lambda *_, tile=tile, **__: tile
        try:
            one(0)
        except Exception:  # noqa: BLE001, S112 (the measuring process says so)
            continue
    torch.cuda.synchronize()


def spec_of(model: str, name: str) -> ModelSpec:
    """The shape, with a reduced vocabulary for the draft head's LM matrix."""
    spec = SHAPES[model]
    return replace(spec, vocabulary=min(32000, spec.vocabulary)) if name == "draft_lm" else spec


def try_layer(chain: Chain, spec: ModelSpec, name: str, best: dict[str, Tile]) -> list[dict]:
    """All candidates of one product in the chain, best first."""
    inner, _, paired = products(spec)[name]
    found = []
    for tile in candidates(inner, paired=paired):
        launch.choose_tile = overriding(spec, best | {name: tile})
        try:
            found.append({**asdict(tile), "us": chain.layer_us()})
        except Exception as error:  # noqa: BLE001 (a candidate that does not fit is no candidate)
            sys.stderr.write(f"{name} {tile}: {str(error).splitlines()[0][:90]}\n")
    return sorted(found, key=lambda each: each["us"])


def try_lm(spec: ModelSpec, width: int) -> list[dict]:
    """All candidates of an LM matrix, and the choice of ``tiles.py`` (``chosen``)."""
    one, copies, _ = calls("lm", spec, width)
    found = []
    for tile in [None, *candidates(spec.hidden, paired=False)]:
        launch.choose_tile = choose_tile if tile is None else lambda *_, tile=tile, **__: tile
        try:
            spent = graph_time(lambda: [one(i) for i in range(copies)], 5) / copies
        except Exception as error:  # noqa: BLE001
            sys.stderr.write(f"lm {tile}: {str(error).splitlines()[0][:90]}\n")
            continue
        shown = {"chosen": True} if tile is None else asdict(tile)
        found.append(shown | {"us": spent})
    return sorted(found, key=lambda each: each["us"])


def main() -> None:
    """Compile in parallel, then go from product to product, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument(
        "--also", type=int, nargs="*", default=[2, 8, 16], help="widths, at the end"
    )
    options = parser.parse_args()
    names = (*LAYER, "lm", "draft_lm")
    jobs = [(options.model, name, options.width, first, 3) for name in names for first in range(3)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.map(compile_some, jobs, chunksize=1)
    spec = replace(
        SHAPES[options.model],
        layers=options.layers,
        windows=SHAPES[options.model].windows[: options.layers],
    )
    chain = Chain(spec, width=options.width, members=1)
    launch.choose_tile = choose_tile
    report = {"gpu": torch.cuda.get_device_name(), "width": options.width, "layer_us": {}}
    report["layer_us"]["chosen"] = chain.layer_us()
    report["layer_us"]["width 1"] = Chain(spec, width=1, members=1).layer_us()
    best: dict[str, Tile] = {}
    for name in ("qkv", "gate_up", "down", "output"):
        found = try_layer(chain, spec, name, best)
        report[name] = found[:12]
        best[name] = Tile(**{k: v for k, v in found[0].items() if k != "us"})
        sys.stderr.write(f"{name}: {json.dumps(found[:4])}\n")
    for width in options.also:
        other = Chain(spec, width=width, members=1)
        launch.choose_tile = choose_tile
        before = other.layer_us()
        launch.choose_tile = overriding(spec, best)
        report["layer_us"][f"width {width}"] = [before, other.layer_us()]
    pair = Chain(spec, width=options.width, members=2)
    launch.choose_tile = choose_tile
    before = pair.layer_us()
    launch.choose_tile = overriding(spec, best)
    report["layer_us"]["two stages"] = [before, pair.layer_us()]
    del chain, pair
    for name in ("lm", "draft_lm"):
        report[name] = try_lm(spec_of(options.model, name), options.width)[:12]
        sys.stderr.write(f"{name}: {json.dumps(report[name][:4])}\n")
    sys.stderr.write(json.dumps(report["layer_us"]) + "\n")
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
