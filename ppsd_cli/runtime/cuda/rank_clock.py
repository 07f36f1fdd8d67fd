"""Clocks of other ranks' devices in seconds of rank 0's host.

A rank compares its device's clock with its host's before an answer (``clock.DeviceClock``) and
tells rank 0, which knows how far the clocks of the two hosts are apart.
"""

import math
from time import perf_counter

import torch
import torch.distributed as dist

from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.failures import PeerLost

_TAG = 2
_TRIES = 5


class AwayClock:
    """The clock of another rank's device (``rank`` None: nobody asks for it here)."""

    def __init__(self, rank: int | None) -> None:
        self._rank, self._offset, self._apart = rank, math.nan, 0.0

    def meet(self) -> None:
        """Rank 0: find how far the hosts' clocks are apart; see ``ToldClock.meet``."""
        assert self._rank is not None
        readings = []
        for _ in range(_TRIES):
            before = perf_counter()
            _send(0.0, self._rank)
            theirs = _receive(self._rank)
            after = perf_counter()
            readings.append((after - before, (before + after) / 2 - theirs))
        self._apart = min(readings)[1]

    def again(self) -> None:
        """Hear how that rank's device and host compare now."""
        if self._rank is not None:
            self._offset = _receive(self._rank) + self._apart

    def host(self, nanoseconds: int, otherwise: float) -> float:
        """Seconds of this host's clock; ``otherwise`` where that device keeps no time."""
        return otherwise if math.isnan(self._offset) else self._offset + nanoseconds * 1e-9


class ToldClock:
    """The clock of this rank's device, which rank 0 is told of."""

    def __init__(self, clock: DeviceClock) -> None:
        self._clock = clock

    def meet(self) -> None:
        """The other end of ``AwayClock.meet``."""
        for _ in range(_TRIES):
            _receive(0)
            _send(perf_counter(), 0)

    def again(self) -> None:
        """Compare device and host, and tell."""
        self._clock.again()
        _send(self._clock.host(0, math.nan), 0)


def _send(seconds: float, rank: int) -> None:
    try:
        dist.send(torch.tensor([seconds], dtype=torch.float64), rank, tag=_TAG)
    except RuntimeError as error:
        raise PeerLost(rank) from error


def _receive(rank: int) -> float:
    number = torch.zeros(1, dtype=torch.float64)
    try:
        dist.recv(number, rank, tag=_TAG)
    except RuntimeError as error:
        raise PeerLost(rank) from error
    return float(number)
