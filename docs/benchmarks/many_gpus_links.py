"""Slow links and a device's own time, for the recorders of the CUDA engine and for rivals.

``HeldRecorder`` holds a device up by a fixed time before each tick that waits for others, as if
their messages came so much later, and times the device's own part of each tick.
"""

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter, sleep

import torch
import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Recorder


@triton.jit
def _linger_kernel(nanoseconds):
    begin = tl.extra.cuda.globaltimer().to(tl.int64)
    now = begin
    while now < begin + nanoseconds:
        now = tl.extra.cuda.globaltimer().to(tl.int64)


def linger(seconds: float, device: torch.device) -> None:
    """Hold the current stream of a device up for so long; on a CPU the caller."""
    if seconds <= 0:
        return
    if device.type == "cuda":
        _linger_kernel[(1,)](round(seconds * 1e9), num_warps=1)
    else:
        sleep(seconds)


class OwnTimes:
    """How long a device worked on each of the graphs that were replayed since ``clear``."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []
        self.on = False

    def clear(self, *, on: bool) -> None:
        """Forget, and go on timing or not."""
        self._events.clear()
        self._seconds.clear()
        self.on = on

    def around(self, work: Callable[[], None]) -> None:
        """Time ``work`` on the current stream; what that stream waits for before does not count."""
        if not self._cuda:
            begin = perf_counter()
            work()
            self._seconds.append(perf_counter() - begin)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        self._events.append((begin, end))

    def median_ms(self) -> float:
        """Of all graphs; the few of the prompt do not move it."""
        for _, end in self._events[-1:]:
            end.synchronize()  # the device is ahead of the host
        times = [begin.elapsed_time(end) for begin, end in self._events]
        return statistics.median(times or [1e3 * each for each in self._seconds])


class Timed:
    """A graph whose replays are timed while its device's times are wanted."""

    def __init__(self, graph: Playable, times: OwnTimes) -> None:
        self._graph, self._times = graph, times

    def replay(self) -> None:
        """Run it."""
        if self._times.on:
            self._times.around(self._graph.replay)
        else:
            self._graph.replay()


class HeldRecorder(Recorder):
    """A GPU's recorder with a slow link before it."""

    def __init__(self, device: torch.device, *, delay: float) -> None:
        """``delay``: seconds."""
        super().__init__(device, branches=2)
        self._place, self._delay = device, delay
        self.times = OwnTimes(device)

    def after(self, others: Sequence[Recorder | Immediate]) -> None:
        """What others sent comes later than they sent it."""
        super().after(others)
        if others and self._delay:
            with torch.cuda.device(self._place), self.stream():
                linger(self._delay, self._place)

    def record(self, launches: Callable[[], None]) -> Playable:
        """As the engine's, timed."""
        return Timed(super().record(launches), self.times)


class HeldImmediate(Immediate):
    """The same without a GPU."""

    def __init__(self, *, delay: float) -> None:
        self._delay = delay
        self.times = OwnTimes(torch.device("cpu"))

    def after(self, others: Sequence[Recorder | Immediate]) -> None:
        """Later than they sent it."""
        if others:
            linger(self._delay, torch.device("cpu"))

    def record(self, launches: Callable[[], None]) -> Playable:
        """Timed."""
        return Timed(super().record(launches), self.times)


def held(device: torch.device, *, delay: float) -> HeldRecorder | HeldImmediate:
    """The recorder of a device behind a slow link; ``delay`` in seconds, 0 for none."""
    if device.type == "cuda":
        return HeldRecorder(device, delay=delay)
    return HeldImmediate(delay=delay)
