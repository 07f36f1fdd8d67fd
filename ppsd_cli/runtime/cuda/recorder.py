"""Streams, graphs and events: how launches reach the device. On a CPU they simply run.

A CPU never gets here but through Triton's interpreter, in tests.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ppsd_cli.runtime.cuda.control import TICKS

_FIRST = -3
"""Priority of a stream; 0 is the usual one, and torch takes the nearest that a device has."""


class Playable(Protocol):
    """A recorded piece of work."""

    def replay(self) -> None:
        """Run it."""


class Ready(Protocol):
    """Something that the host can wait for."""

    def synchronize(self) -> None:
        """Wait."""


class Immediate:
    """Runs every launch at once, in order: the recorder of the interpreter."""

    def stream(self) -> AbstractContextManager[object]:
        """Nothing to switch to."""
        return nullcontext()

    def fork(self, branches: Sequence[Callable[[], None]]) -> None:
        """One after the other, the last stage first: no order between branches is promised."""
        for branch in reversed(branches):
            branch()

    def record(self, launches: Callable[[], None]) -> Playable:
        """The launches themselves."""
        return _Direct(launches)

    def mark(self) -> None:
        """What was launched has happened."""

    def after(self, others: Sequence["Recorder | Immediate"]) -> None:
        """Nothing to wait for."""

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Ready]:
        """Copies for the host."""
        return [tensor.clone() for tensor in tensors], _Done()


class Recorder:
    """CUDA graphs on one device: a main stream, one more for each branch, and one for results."""

    def __init__(self, device: torch.device, *, branches: int) -> None:
        self._device = device
        # The main stream's branch of a fork is the longer one: its programs go first.
        self._main = torch.cuda.Stream(device, priority=_FIRST)
        self._side = [torch.cuda.Stream(device) for _ in range(branches - 1)]
        self._back = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._mark, self._now = torch.cuda.Event(), torch.cuda.Event()
        self._done = [torch.cuda.Event() for _ in range(TICKS)]
        self._fetches = 0
        self._mirrors: dict[tuple[int, torch.Size], Tensor] = {}

    def mark(self) -> None:
        """Note what was launched so far, for other devices to wait for."""
        self._mark.record(self._main)

    def after(self, others: Sequence["Recorder | Immediate"]) -> None:
        """What is launched from now on waits for the latest marks of other devices."""
        for other in others:
            assert isinstance(other, Recorder)
            self._main.wait_event(other._mark)

    def stream(self) -> AbstractContextManager[object]:
        """Work in this context goes to the main stream."""
        return torch.cuda.stream(self._main)

    def fork(self, branches: Sequence[Callable[[], None]]) -> None:
        """Branches on streams of their own, behind and before the main stream."""
        if len(branches) == 1:
            branches[0]()
            return
        begin = torch.cuda.Event()
        begin.record(self._main)
        for stream, branch in zip(self._side, branches[1:], strict=False):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                branch()
        branches[0]()
        for stream in self._side[: len(branches) - 1]:
            end = torch.cuda.Event()
            end.record(stream)
            self._main.wait_event(end)

    def record(self, launches: Callable[[], None]) -> Playable:
        """Compile and warm up by running once, then capture. Safe only for idle launches."""
        with self.stream():
            launches()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._main):
            launches()
        return graph

    def fetch(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Ready]:
        """Pinned copies of device tensors as they are after what was launched so far.

        Whole numbers are rows of a log, each written once in ``TICKS`` ticks: all copies of a log
        are one piece of host memory. No more than ``TICKS`` fetches may be waited for.
        """
        self._now.record(self._main)
        self._back.wait_event(self._now)
        done = self._done[self._fetches % TICKS]
        self._fetches += 1
        with torch.cuda.stream(self._back):
            copies = [self._landing(tensor) for tensor in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            done.record(self._back)
        return copies, done

    def _landing(self, tensor: Tensor) -> Tensor:
        """Pinned memory for a copy. Asking for it anew costs tens of microseconds, at times more
        than a tick, so logs have theirs for good."""
        if tensor.dtype != torch.int64:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        key = (tensor.data_ptr(), tensor.shape)
        if key not in self._mirrors:
            self._mirrors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._mirrors[key]


class _Direct:
    def __init__(self, launches: Callable[[], None]) -> None:
        self._launches = launches

    def replay(self) -> None:
        self._launches()


class _Done:
    def synchronize(self) -> None:
        return None


def send(target: Tensor, values: Sequence[float]) -> None:
    """Numbers into a tensor, in the current stream; does not wait for the device."""
    # Torch does not use the pinned memory for anything else before the copy has been made.
    pinned = target.is_cuda
    numbers = torch.tensor(values, dtype=target.dtype, device="cpu", pin_memory=pinned)
    target.copy_(numbers, non_blocking=True)
