"""The device's clock in seconds of the host's monotonic clock."""

from time import perf_counter

import torch
import triton
import triton.language as tl

_FRESH = 1.0
"""Seconds that a comparison of clocks serves."""


@triton.jit
def _now_kernel(out_ptr):
    tl.store(out_ptr, tl.extra.cuda.globaltimer().to(tl.int64))


class DeviceClock:
    """Converts nanoseconds of ``globaltimer`` into the host's seconds.

    The two run apart slowly, so ``again`` compares them before an answer, if the last comparison
    is older than a second; one is good to some ten microseconds. Without a device there is no such
    clock.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._offset, self._compared = 0.0, -_FRESH
        if device is not None:
            self._out = torch.zeros(1, dtype=torch.int64, device=device)
            self.again()

    def again(self, tries: int = 5) -> None:
        """Compare both clocks a few times and keep the closest reading; wait for the device."""
        if self._device is None:
            return
        torch.cuda.synchronize(self._device)
        if perf_counter() - self._compared < _FRESH:
            return
        readings = []
        with torch.cuda.device(self._device):  # Triton launches on the current device
            for _ in range(tries):
                torch.cuda.synchronize(self._device)
                before = perf_counter()
                _now_kernel[(1,)](self._out)
                torch.cuda.synchronize(self._device)
                after = perf_counter()
                readings.append((after - before, (before + after) / 2 - int(self._out[0]) * 1e-9))
        self._offset, self._compared = min(readings)[1], perf_counter()

    def host(self, nanoseconds: int, otherwise: float) -> float:
        """Seconds of the host's clock; ``otherwise`` where the device keeps no time."""
        return otherwise if self._device is None else self._offset + nanoseconds * 1e-9
