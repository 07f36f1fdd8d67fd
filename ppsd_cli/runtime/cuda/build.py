"""From settings to a graph runner."""

from dataclasses import replace

import torch

from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.launch import Launcher
from ppsd_cli.runtime.cuda.prompts import bucket_of
from ppsd_cli.runtime.cuda.recorder import Immediate, Recorder
from ppsd_cli.runtime.cuda.runner import GraphRunner
from ppsd_cli.runtime.cuda.ticks import Pod
from ppsd_cli.runtime.pipeline import PipelineConfig, load_head, load_worker


def load_graph_runner(config: PipelineConfig) -> GraphRunner:
    """Load all stages onto their one device, with room for whole buckets and a spare slot."""
    roomy = replace(config, slots=bucket_of(config.slots) + 1)
    stages = [load_worker(roomy, s).stage for s in range(config.stages)]
    return graph_runner(stages, load_head(roomy, stages[0]), chunk=config.chunk)


def graph_runner(stages: list[Stage], head: DraftHead | None, *, chunk: int = 128) -> GraphRunner:
    """A runner for stages of one device. Their caches need room for the bucket of the last slot in
    use, and one slot to spare, for bubbles. ``chunk``: prompt tokens of one plan, at most.

    On a CPU the kernels run in Triton's interpreter, one launch after the other: for tests.
    """
    device = stages[0].device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    chained = cuda and torch.cuda.get_device_capability(device) >= (9, 0)
    launcher = Launcher(clock=cuda, chained=chained, slots=stages[0].slots)
    recorder = Recorder(device, branches=2) if cuda else Immediate()
    clock = DeviceClock(device if cuda else None)
    with torch.inference_mode():
        pod = Pod(launcher, stages, head)
    return GraphRunner(stages, head, pod, recorder, clock, chunk=chunk)
