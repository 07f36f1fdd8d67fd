"""Compiles for a Hopper GPU every kernel that a pipeline of a shape launches; run by a test.

No GPU is needed: tensors have a shape and a format but no memory (torch's meta device), and a
launch ends when the kernel is compiled. Prints one line of JSON for each kernel that was made.

SHAPE DTYPE EXTENT: ``all`` pipelines and ways to choose a token; or ``longest``, the one on one
device that launches the most kernels, with the way that does the most, for the sizes and formats
of other models.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ppsd_cli.core.plan import Sampling
from ppsd_cli.model import random_weights
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.runtime.cuda import clock, relay
from ppsd_cli.runtime.cuda.bursts import BurstPod
from ppsd_cli.runtime.cuda.crew import Crew, Member
from ppsd_cli.runtime.cuda.first_token import FirstToken
from ppsd_cli.runtime.cuda.launch import Launcher
from ppsd_cli.runtime.cuda.march import TickKind
from ppsd_cli.runtime.cuda.recorder import Immediate
from ppsd_cli.runtime.cuda.ticks import FollowerPod, Pod
from ppsd_cli.runtime.cuda.trees import TreePod
from ppsd_cli.runtime.pipeline import PipelineConfig, load_head, load_worker

SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02),
)
WIDTH = 4
_run = JITFunction.run
_made: dict[tuple[str, str], dict[str, Any]] = {}


class NoDriver:
    """Names a GPU that need not be there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of a launch."""
    del warmup
    since = time.perf_counter()
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    seconds = round(time.perf_counter() - since, 2)
    key = (self.__name__, kernel.hash)
    facts = {"kernel": self.__name__, "seconds": seconds, "shared": kernel.metadata.shared}
    _made.setdefault(key, facts | {"machine_code": len(kernel.asm["cubin"])})


def no_numbers(self: Any, _name: str, shape: tuple[int, ...], *, std: float, dtype: Any) -> Tensor:
    """In the place of random numbers."""
    del std
    return torch.empty(shape, dtype=dtype, device=self.device)


def pods(shape: str, dtype: str) -> Iterator[tuple[Pod, list[TickKind]]]:
    """Pipelines without memory and the ticks that they may be asked for."""
    layers = SHAPES[shape].layers
    half, third = layers // 2, layers // 3
    for split, head in (
        ((layers,), None),
        ((half, layers - half), "random:block"),
        ((third, third, layers - 2 * third), "random:deep"),
    ):
        config = PipelineConfig(
            f"random:{shape}",
            "",
            split,
            ("meta",) * len(split),
            dtype,
            slots=4097,
            head=head,
            width=WIDTH,
            depth=2,
        )
        stages = [load_worker(config, s).stage for s in range(config.stages)]
        launcher = Launcher(clock=True, chained=True, slots=config.slots)
        kinds = [TickKind((s,), drafts=False) for s in range(config.stages)]
        if head is not None:
            kinds.append(TickKind(tuple(range(config.stages)), drafts=True))
        yield Pod(launcher, stages, load_head(config, stages[0])), kinds


def crew(shape: str, dtype: str) -> Crew:
    """The same without memory over two devices."""
    layers = SHAPES[shape].layers
    split = (layers // 3, layers // 3, layers - 2 * (layers // 3))
    config = PipelineConfig(
        f"random:{shape}",
        "",
        split,
        ("meta",) * 3,
        dtype,
        slots=4097,
        head="random:deep",
        width=WIDTH,
        depth=2,
    )
    stages = [load_worker(config, s).stage for s in range(3)]
    launcher = Launcher(clock=True, chained=True, slots=config.slots)
    home = Pod(launcher, stages[:1], load_head(config, stages[0]), total=3)
    follower = FollowerPod(launcher, stages[1:], None, first=1, total=3)
    return Crew([Member(pod, Immediate(), clock.DeviceClock(None)) for pod in (home, follower)])


def in_turn(branches: Sequence[Callable[[], None]]) -> None:
    """Branches of a tick one after the other."""
    for branch in branches:
        branch()


def launch_all(
    pod: Pod, kinds: Sequence[TickKind], sampling: Sampling, depths: Sequence[int]
) -> None:
    """Every kind of launch on a pipeline; trees of these depths."""
    for kind in kinds:
        pod.stretch([kind, kind], sampling, in_turn)
    assert pod.chooser is not None
    FirstToken(pod.chooser, Immediate(), pod.states[0])._launch(sampling)
    if pod.head is not None:
        BurstPod(pod, 4).run(sampling)
        for depth in depths:
            TreePod(pod, WIDTH, depth).stretch(kinds[-1:] * 2, sampling, in_turn)


def _depths(sampling: Sampling, *, whole: bool) -> tuple[int, ...]:
    """Two depths launch every kernel, too; both only with the way that does the most."""
    if sampling is not SAMPLINGS[-1]:
        return (1,)
    return (1, 2) if whole else (2,)


def main(shape: str, dtype: str, extent: str) -> None:
    whole = extent == "all"
    samplings = SAMPLINGS if whole else SAMPLINGS[-1:]
    triton.runtime.driver.set_active(NoDriver())
    JITFunction.run = compile_only
    random_weights.Noise.normal = no_numbers
    clock._now_kernel[(1,)](torch.empty(1, dtype=torch.int64, device="meta"))
    made = list(pods(shape, dtype))
    for pod, kinds in made[0 if whole else -1 :]:
        for sampling in samplings if pod is made[-1][0] else SAMPLINGS[-1:]:
            launch_all(pod, kinds, sampling, _depths(sampling, whole=whole))
    relay.poke(torch.empty(1, dtype=torch.int64, device="meta"), 1)
    if whole:
        launch_crews(shape, dtype)
    for facts in _made.values():
        sys.stdout.write(json.dumps(facts) + "\n")


def launch_crews(shape: str, dtype: str) -> None:
    """Pipelines over several devices."""
    several = crew(shape, dtype)
    trees = [several.with_trees(WIDTH, depth) for depth in (1, 2)]
    for member in (*several.members, *(member for crew in trees for member in crew.members)):
        for sampling in SAMPLINGS:
            member.pod.stretch([TickKind((0, 1, 2), drafts=True)], sampling, in_turn)


if __name__ == "__main__":
    main(*sys.argv[1:])
