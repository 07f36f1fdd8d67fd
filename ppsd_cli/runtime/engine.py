"""The engine that commands use: a runner for the chosen stages, and answers from it."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Self

import torch

from ppsd_cli.core.decode import decode
from ppsd_cli.core.events import Event
from ppsd_cli.core.plan import Request, Runner, Sampling
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.errors import ConfigError
from ppsd_cli.model.places import spec_of
from ppsd_cli.runtime.children import allowed_cores
from ppsd_cli.runtime.cuda.tiles import MOST_GUESSES
from ppsd_cli.runtime.pipeline import PipelineConfig, local_runner
from ppsd_cli.runtime.processes import spawn_runner
from ppsd_cli.runtime.rank_devices import check_device, rank_devices
from ppsd_cli.runtime.store_watch import leave
from ppsd_cli.runtime.torchrun import is_torchrun, joined_runner, serve_worker


@dataclass(frozen=True, slots=True)
class Drafting:
    """How an answer is drafted: not at all, by the head, or by given tokens (for measurements).

    ``draft_length``: guesses before all are verified at once (EESD); 0 is the chain, or with
    ``width`` above 1 the tree, whose other settings are those of ``core.plan.Request``.
    """

    on: bool
    forced: tuple[int, ...] | None = None
    keep_logits: bool = False
    draft_length: int = 0
    width: int = 1
    tree_scale: float = 1.0
    forced_ranks: tuple[int, ...] | None = None
    rank_scores: tuple[float, ...] = ()
    depth: int = 1


class Engine:
    """Loaded stages that answer prompts one after another. Close it, or use ``with``."""

    def __init__(self, config: PipelineConfig, runner: Runner) -> None:
        self.config, self.runner = config, runner

    def answer(
        self, prompt: tuple[int, ...], *, sampling: Sampling, limits: Limits, drafting: Drafting
    ) -> Iterator[Event]:
        """Events of one answer. Closing the iterator ends it early."""
        assert drafting.width <= self.config.width, "the stages were made for narrower trees"
        assert drafting.depth <= self.config.depth, "the head was not checked for this depth"
        torch.set_num_threads(self.config.threads)  # torch keeps it per calling thread
        request = Request(
            sampling=sampling,
            drafting=drafting.on,
            feed_limit=limits.feed_limit(len(prompt)),
            forced_drafts=drafting.forced,
            prompt_tokens=len(prompt),
            keep_logits=drafting.keep_logits,
            draft_length=drafting.draft_length if drafting.on else 0,
            width=drafting.width if drafting.on else 1,
            tree_scale=drafting.tree_scale,
            forced_ranks=drafting.forced_ranks,
            rank_scores=drafting.rank_scores,
            depth=drafting.depth if drafting.on else 1,
        )
        schedule = Schedule(
            prompt,
            stages=self.runner.stages,
            chunk=self.config.chunk,
            request=request,
            limits=limits,
        )
        return decode(self.runner, schedule)

    def close(self) -> None:
        """Release devices and processes."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_engine(
    config: PipelineConfig,
    *,
    processes: bool,
    port: int | None = None,
    on_frozen: Callable[[str], None] = leave,
) -> Engine:
    """Load the stages: joined under torchrun, one process each, or all in this process.

    ``on_frozen`` is for torchrun alone; see ``joined_runner``.
    """
    if is_torchrun():
        return Engine(config, _joined(config, on_frozen))
    if processes:
        return Engine(config, spawn_runner(config, port=port))
    if has_graphs(config):
        from ppsd_cli.runtime.cuda.build import load_graph_runner  # Triton, where there is a GPU

        return Engine(config, load_graph_runner(config))
    return Engine(config, local_runner(config))


def _joined(config: PipelineConfig, on_frozen: Callable[[str], None]) -> Runner:
    """Rank 0's runner."""
    if has_graphs(config):
        from ppsd_cli.runtime.cuda.rank_build import joined_graphs

        return joined_graphs(config, on_frozen=on_frozen)
    return joined_runner(config, on_frozen=on_frozen)


def serve_rank(config: PipelineConfig) -> None:
    """Ranks after 0: do this rank's part until rank 0 closes its engine.

    An error is reported to rank 0 and raised here too.
    """
    if has_graphs(config):
        from ppsd_cli.runtime.cuda.rank_build import serve_graphs

        serve_graphs(config)
    else:
        serve_worker(config)


def check_engine(config: PipelineConfig, *, draft_length: int = 0) -> None:
    """ConfigError for what the engine of these devices does not serve, before anything loads.

    ``draft_length``: guesses of a burst (EESD), 0 for other decoders.
    """
    if not has_graphs(config):
        return
    if not draft_length:
        return
    if is_torchrun():
        raise ConfigError(
            "--decoder eesd: its stages take turns, so on GPUs it runs without torchrun; "
            "use --decoder ppsd, or drop torchrun"
        )
    if draft_length > MOST_GUESSES:
        raise ConfigError(
            f"--draft-length {draft_length}: on a GPU one burst verifies at most "
            f"{MOST_GUESSES} guesses; choose 1 to {MOST_GUESSES}"
        )
    if len({torch.device(name) for name in config.devices}) > 1:
        raise ConfigError(
            f"--decoder eesd on {', '.join(config.devices)}: its stages take turns, so it runs on "
            f"one GPU; use --devices {config.devices[0]}"
        )


def device_notes(config: PipelineConfig) -> list[str]:
    """A line for the person where GPUs pass states through the host's memory. It is tried."""
    if is_torchrun() or not has_graphs(config) or on_one_gpu(config.devices):
        return []
    from ppsd_cli.runtime.cuda.crew import devices_reach  # Triton, where there is a GPU

    names = sorted(set(config.devices))
    if devices_reach([torch.device(name) for name in names]):
        return []
    return [
        f"{', '.join(names)} cannot write to each other's memory: "
        "what they pass on goes through the host's, which is slower"
    ]


def has_graphs(config: PipelineConfig) -> bool:
    """Whether the graph runner serves these devices and this model."""
    return on_gpus(config.devices) and kernels_fit(spec_of(config.folder).head_dim)


def on_gpus(devices: tuple[str, ...]) -> bool:
    """Whether all stages are on GPUs, with Triton installed."""
    return all(name.startswith("cuda") for name in devices) and find_spec("triton") is not None


def on_one_gpu(devices: tuple[str, ...]) -> bool:
    """Whether all stages share a GPU under the graph runner, and so go in step.

    Under torchrun each rank has its own, whatever it is called on its host.
    """
    return (
        not is_torchrun()
        and len({torch.device(name) for name in devices}) == 1
        and on_gpus(devices)
    )


def kernels_fit(head_dim: int) -> bool:
    """Whether the graph runner's attention has tiles for heads of this size."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def choose_devices(asked: tuple[str, ...] | None, *, stages: int) -> tuple[tuple[str, ...], bool]:
    """A device for each stage, and whether each stage gets a process.

    One name serves all stages in this process. Without a choice: the first GPU; without a GPU a
    process for each stage where there is more than one. Under torchrun see ``rank_devices``.
    """
    if is_torchrun():
        return rank_devices(asked, stages=stages), False
    if asked is None:
        if torch.cuda.is_available():
            return ("cuda:0",) * stages, False
        return ("cpu",) * stages, stages > 1
    for device in asked:
        check_device(device)
    if len(asked) == 1:
        return asked * stages, False
    if len(asked) != stages:
        raise ConfigError(
            f"--devices names {len(asked)} devices for {stages} stages; "
            "name one for all, or one for each stage"
        )
    return asked, asked[0] == "cpu"


def default_threads(stages: int) -> int:
    """Threads of each stage: an equal share of the cores, for one stage that of two.

    The thread count decides rounding, so plain decoding takes what a two-stage pipeline would.
    """
    cores = allowed_cores()
    count = (os.cpu_count() or 1) if cores is None else len(cores)
    return max(1, count // max(stages, 2))


def choose_dtype(asked: str | None, devices: tuple[str, ...]) -> str:
    """The number format: bfloat16 on a GPU, float32 on a CPU, unless asked otherwise."""
    if asked not in (None, "auto"):
        return str(asked)
    return "bfloat16" if devices[0].startswith("cuda") else "float32"
