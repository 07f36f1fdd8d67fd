"""Peak memory of what is measured: of stage processes on a CPU, of the allocator on a GPU."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def peak_of_processes(pids: Sequence[int]) -> int | None:
    """Sum of the highest resident sizes in bytes; None where the system does not say."""
    total = 0
    for pid in pids:
        size = _highest_resident(pid)
        if size is None:
            return None
        total += size
    return total if pids else None


def _highest_resident(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


class GpuMeter:
    """What one engine adds to the GPUs of this process, at most, from before its weights load.

    Whatever it does runs in ``running``: loading, trials, the warm-up, in which graphs and buffers
    are made that stay, and answers. Others on the same GPUs do not count.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = sorted({device for device in devices if device.startswith("cuda")})
        self._held = 0
        self._peak = 0

    @property
    def peak(self) -> int | None:
        """Bytes; None on a CPU."""
        return self._peak if self._devices else None

    def running(self, run: Callable[[], T]) -> T:
        """Run something, and count what it needs on the way and what stays."""
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        before = self._allocated()
        try:
            return run()
        finally:
            highest = sum(torch.cuda.max_memory_allocated(device) for device in self._devices)
            self._peak = max(self._peak, self._held + highest - before)
            self._held += self._allocated() - before

    def _allocated(self) -> int:
        return sum(torch.cuda.memory_allocated(device) for device in self._devices)
