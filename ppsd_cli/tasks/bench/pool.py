"""Loaded engines and models of a run, each loaded once and shared by contenders."""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from time import sleep
from typing import Any

from ppsd_cli.runtime.engine import Engine, open_engine
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.tasks.bench.faults import memory_errors
from ppsd_cli.tasks.bench.memory import GpuMeter, peak_of_processes
from ppsd_cli.tasks.bench.reference import load_transformers


@dataclass(frozen=True, slots=True)
class Shape:
    """A pipeline that contenders use. ``head``: its head's name; ``processes``: one each stage."""

    config: PipelineConfig
    processes: bool
    head: str | None = None

    def with_threads(self, threads: int | None) -> "Shape":
        """The same with another number of threads for each stage."""
        if threads is None:
            return self
        return replace(self, config=replace(self.config, threads=threads))

    @property
    def on_cpu(self) -> bool:
        """Whether thread counts matter."""
        return self.config.devices[0] == "cpu"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Something in memory: an engine or a transformers model, and what it weighs."""

    thing: Any
    meter: GpuMeter
    pids: tuple[int, ...] = ()

    def peak_memory(self) -> int | None:
        """Highest use so far in bytes; None where nobody can tell it from others'."""
        return self.meter.peak if self.meter.peak is not None else peak_of_processes(self.pids)


class Pool:
    """Opens engines on demand. Close it, or use ``with contextlib.closing``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: dict[Shape, Loaded] = {}
        self._models: dict[tuple[str, str], Loaded] = {}

    def engine(self, shape: Shape) -> Loaded:
        """The engine of a shape. Shapes in this process that differ in threads share weights."""
        key = _key(shape)
        if key not in self._engines:
            self._engines[key] = _load(shape)
        loaded = self._engines[key]
        if shape.processes:
            return loaded
        return replace(loaded, thing=Engine(shape.config, loaded.thing.runner))

    def model(self, dtype: str, device: str) -> Loaded:
        """The model as transformers loads it."""
        if (dtype, device) not in self._models:
            meter = GpuMeter((device,))
            model = meter.running(lambda: load_transformers(self._folder, dtype, device))
            self._models[dtype, device] = Loaded(model, meter)
        return self._models[dtype, device]

    def keep(self, shapes: Collection[Shape]) -> None:
        """Close all engines but those of ``shapes``."""
        wanted = {_key(shape) for shape in shapes}
        for key in [key for key in self._engines if key not in wanted]:
            self._engines.pop(key).thing.close()

    def close(self) -> None:
        """Close everything."""
        self.keep(())
        self._models.clear()


def _key(shape: Shape) -> Shape:
    """What shapes share an engine by: in this process the number of threads does not matter."""
    return shape if shape.processes else shape.with_threads(1)


def settle() -> None:
    """Let the threads of whoever worked last go to sleep: OpenMP's spin for a while first."""
    sleep(0.05)


def _load(shape: Shape) -> Loaded:
    meter = GpuMeter(shape.config.devices)
    with memory_errors("loading the pipeline"):
        engine = meter.running(lambda: open_engine(shape.config, processes=shape.processes))
    pids: tuple[int, ...] = ()
    with contextlib.suppress(AttributeError):  # only runners of stage processes have them
        pids = tuple(engine.runner.pids)  # type: ignore[attr-defined]
    return Loaded(engine, meter, pids)
