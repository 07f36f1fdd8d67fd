"""Signs of life of a stage process, and its end when the driver is gone.

Both live in one thread, so neither compiling nor a long prefill looks like a frozen stage.
Loaded before torch.
"""

import ctypes
import os
import select
import signal
import sys
import threading

from ppsd_cli.runtime.control import Channel

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0
"""A stage that has given no sign of life for so long counts as frozen."""

_PR_SET_PDEATHSIG = 1


class Pulse(threading.Thread):
    """Beats on the channel; ends the process as soon as the other end is closed."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(name="pulse", daemon=True)
        self._channel = channel

    def run(self) -> None:
        """Until the driver closes its end, however it does so."""
        poller = select.poll()
        poller.register(self._channel.fileno(), 0)  # hang-up only; data is for the main thread
        while not poller.poll(BEAT_SECONDS * 1000):
            try:
                self._channel.beat()
            except OSError:
                break
        os._exit(0)


def die_with(launcher: int) -> None:
    """Linux: have the kernel kill this process when ``launcher`` dies, even while stopped."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != launcher:
        os._exit(0)
