"""How rank 0 learns that another rank is gone, while its own device waits for that rank's.

A host that waits for a device is not told by NCCL. So a thread for each other rank waits for its
farewell over gloo: a connection that breaks before it has come says that the rank has died. A rank
that can still speak says that it fails, and ends only when rank 0 had time to say why. Links for
which the host waits need none of this.
"""

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist

from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.links import Inbox
from ppsd_cli.runtime.orders import Broken, Order
from ppsd_cli.runtime.pipeline import PipelineConfig
from ppsd_cli.runtime.store_watch import StoreWatch

_TAG = 4
_WELL, _FAILING = 0, 1
"""What a farewell says."""
_FAREWELL_SECONDS = 5.0
_STUCK_SECONDS = 2.0
"""Until the main thread must have seen that a rank is lost; else it waits for its device."""
_LOOK_SECONDS = 2e-5
"""Between two looks at an event; the host is some ticks behind anyway."""
_KNOWN_SECONDS = 3.0
"""Until rank 0 must have given up after a rank has said that it fails: longer than until its main
thread counts as stuck.
"""
_SAYING_SECONDS = 1.0
"""For rank 0 to say why it has given up."""


class Alarm:
    """Listens to all other ranks. Rank 0 only."""

    def __init__(
        self,
        config: PipelineConfig,
        watch: StoreWatch,
        give_up: Callable[[], None],
        on_stuck: Callable[[str], None],
    ) -> None:
        """``give_up``: has the other ranks, and this device, wait no longer. ``on_stuck``: gets a
        message, in another thread, where the main thread does not see that a rank is lost.
        """
        self._watch, self._give_up, self._on_stuck = watch, give_up, on_stuck
        self._lost: list[int] = []
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._listen, args=(rank,), name="rank-alarm", daemon=True)
            for rank in range(1, config.stages)
        ]
        for thread in self._threads:
            thread.start()
        # A thread that came out of gloo while the interpreter ends would take the process down.
        atexit.register(self.join)

    def check(self) -> None:
        """``PeerLost`` where a rank is gone; what devices wait for is given up."""
        if self._lost:
            self._give_up()
            raise PeerLost(self._lost[0])

    def join(self) -> None:
        """Wait for all farewells, or for the ends of ranks that have been given up."""
        self._ending.set()
        for thread in self._threads:
            thread.join(_FAREWELL_SECONDS)
        atexit.unregister(self.join)

    def _listen(self, rank: int) -> None:
        word = _word(_WELL)
        try:
            dist.recv(word, rank, tag=_TAG)
        except RuntimeError:
            word = _word(_FAILING)
        if word.item() == _WELL:
            return
        self._lost.append(rank)
        if not self._ending.wait(_STUCK_SECONDS) and not self._watch.finished:
            self._on_stuck(str(self._watch.cause(PeerLost(self._lost[0]))))


class Watched:
    """An event of the device for which the host waits with an eye on the other ranks."""

    def __init__(self, event: torch.cuda.Event, watch: Callable[[], None]) -> None:
        self._event, self._watch = event, watch

    def synchronize(self) -> None:
        """Wait; ``PeerLost`` where a rank is gone, for which the device would wait for ever."""
        self._watch()
        while not self._event.query():
            sleep(_LOOK_SECONDS)
            self._watch()


def farewell() -> None:
    """Tell rank 0 that this rank ends in good order."""
    try:
        dist.send(_word(_WELL), 0, tag=_TAG)
    except RuntimeError as error:
        raise PeerLost(0) from error


class Failing:
    """A rank after 0 that fails, and has reported why, tells rank 0 and lets it speak first.

    ``torchrun`` ends all ranks a moment after the first one. A rank 0 that waited for its device
    would be gone before it had noticed a broken connection and given up.
    """

    def __init__(self, orders: Inbox[Order]) -> None:
        """Tell, without waiting. ``orders``: from rank 0."""
        self._orders, self._word = orders, _word(_FAILING)
        self._sending: Any = None  # kept, because gloo drops what nobody holds
        with suppress(RuntimeError):  # rank 0 is gone, which ``wait`` notices as well
            self._sending = dist.isend(self._word, 0, tag=_TAG)

    def wait(self) -> None:
        """Until rank 0 has given up and said why, or is gone, or does not give up in time."""
        end = monotonic() + _KNOWN_SECONDS
        order: Order | None = None
        try:
            while not isinstance(order, Broken):
                order = self._orders.receive(within=_left(end))
                if order is None:
                    return  # rank 0 has ended in good order
        except PeerLost:
            return
        sleep(_SAYING_SECONDS)


def _word(says: int) -> torch.Tensor:
    return torch.tensor([says], dtype=torch.uint8)


def _left(end: float) -> timedelta:
    """Time until then; gloo takes none that is over."""
    return timedelta(seconds=max(end - monotonic(), 0.001))
