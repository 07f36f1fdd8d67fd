"""From settings to a graph runner."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.crew import Crew, Member, devices_reach
from ppsd_cli.runtime.cuda.launch import Launcher
from ppsd_cli.runtime.cuda.prompts import bucket_of
from ppsd_cli.runtime.cuda.recorder import Immediate, Recorder
from ppsd_cli.runtime.cuda.runner import GraphRunner
from ppsd_cli.runtime.cuda.ticks import FollowerPod, Pod
from ppsd_cli.runtime.cuda.tiles import HOPPER_SHARED
from ppsd_cli.runtime.pipeline import PipelineConfig, load_head, load_worker


def load_graph_runner(
    config: PipelineConfig, *, groups: Sequence[int] | None = None
) -> GraphRunner:
    """Load all stages onto their devices, with room for whole buckets and a spare slot.

    ``groups``: see ``graph_runner``.
    """
    roomy = replace(config, slots=bucket_of(config.slots) + 1)
    stages = [load_worker(roomy, s).stage for s in range(config.stages)]
    return graph_runner(stages, load_head(roomy, stages[0]), chunk=config.chunk, groups=groups)


def graph_runner(
    stages: list[Stage],
    head: DraftHead | None,
    *,
    chunk: int = 128,
    groups: Sequence[int] | None = None,
    through_host: bool | None = None,
    recorder: Callable[[torch.device], Recorder | Immediate] | None = None,
) -> GraphRunner:
    """A runner for stages whose caches have room for the bucket of the last slot in use, and one
    slot to spare, for bubbles. ``chunk``: prompt tokens of one plan, at most.

    Neighbours on the same device work in step; ``groups`` (stages of each group) tells them apart
    otherwise. ``through_host``: boxes between devices in pinned host memory; None finds out.
    ``recorder`` makes each device's recorder, for measurements that time it or hold it up.
    On a CPU the kernels run in Triton's interpreter, one launch after the other: for tests.
    """
    if groups is None:
        groups = [len(list(same)) for _, same in groupby(stages, key=lambda s: s.device)]
    parts: list[tuple[int, list[Stage]]] = []
    for size in groups:
        first = sum(len(part) for _, part in parts)
        parts.append((first, stages[first : first + size]))
    if through_host is None:
        devices = sorted({str(stage.device) for stage in stages})
        through_host = not devices_reach([torch.device(name) for name in devices])
    with torch.inference_mode():
        members = [
            member_of(
                part, head if not first else None, first, len(stages), recorder or recorder_of
            )
            for first, part in parts
        ]
        crew = Crew(members, through_host=through_host)
    return GraphRunner(stages, head, crew, chunk=chunk)


def recorder_of(device: torch.device) -> Recorder | Immediate:
    """What brings launches to a device."""
    return Recorder(device, branches=2) if device.type == "cuda" else Immediate()


def member_of(
    stages: list[Stage],
    head: DraftHead | None,
    first: int,
    total: int,
    recorder: Callable[[torch.device], Recorder | Immediate] = recorder_of,
) -> Member:
    """The pod of some neighbours on one device, with its streams and clock.

    ``first``: number of their first stage among the ``total``.
    """
    device = stages[0].device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    chained = cuda and torch.cuda.get_device_capability(device) >= (9, 0)
    shared = HOPPER_SHARED
    if cuda:
        here = torch.cuda.get_device_properties(device)
        shared = getattr(here, "shared_memory_per_block_optin", shared)
    launcher = Launcher(clock=cuda, chained=chained, slots=stages[0].slots, shared=shared)
    kind = FollowerPod if first else Pod
    pod = kind(launcher, stages, head, first=first, total=total)
    return Member(pod, recorder(device), DeviceClock(device if cuda else None))
