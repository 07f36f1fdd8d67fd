"""Signs of life and reports of failure between ranks under ``torchrun``, over its key-value store.

Rank 0 watches all others and they watch rank 0. The store outlives a rank where ``torchrun``
serves it.
"""

import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from time import monotonic

from torch._C._distributed_c10d import TCPStore

from ppsd_cli.errors import PpsdError, StageError
from ppsd_cli.runtime.failures import PeerLost, pack_failure, stage_name, unpack_failure
from ppsd_cli.runtime.heartbeat import BEAT_SECONDS, SILENCE_SECONDS
from ppsd_cli.runtime.pipeline import PipelineConfig

_STORE_TIMEOUT = timedelta(seconds=60)


def leave(message: str) -> None:
    """Say why on stderr and end this process: its main thread waits for a frozen stage."""
    sys.stderr.write(f"ppsd: {message}\n")
    sys.stderr.flush()
    os._exit(StageError.exit_code)


class StoreWatch(threading.Thread):
    """Beats for one rank and watches its peers.

    ``on_frozen`` gets a message when a peer is silent for too long, in this thread; the main
    thread cannot be woken from a receive, so the function should end the process.
    """

    def __init__(
        self, config: PipelineConfig, rank: int, *, on_frozen: Callable[[str], None] = leave
    ) -> None:
        super().__init__(name="store-watch", daemon=True)
        self._config, self._rank, self._on_frozen = config, rank, on_frozen
        self._peers = range(1, config.stages) if rank == 0 else range(1)
        self._done = threading.Event()
        self._beats = self._connect()
        self._reports = self._connect()

    def run(self) -> None:
        """Until ``finish``."""
        count = 0
        seen: dict[int, tuple[bytes, float]] = {p: (b"", monotonic()) for p in self._peers}
        while not self._done.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beats.set(_key("beat", self._rank), str(count))
                values = {p: _read(self._beats, _key("beat", p)) for p in self._peers}
            except RuntimeError as error:
                if not self._done.is_set():
                    self._on_frozen(f"the rendezvous store is gone ({_first_line(error)})")
                return
            now = monotonic()
            for peer, value in values.items():
                if value != seen[peer][0]:
                    seen[peer] = value, now
                elif now - seen[peer][1] > SILENCE_SECONDS and not self._done.is_set():
                    name = stage_name(self._config, peer)
                    self._on_frozen(f"{name} has given no sign of life for {SILENCE_SECONDS:.0f} s")
                    return

    def finish(self) -> None:
        """Stop watching. Safe to call twice."""
        self._done.set()

    @property
    def finished(self) -> bool:
        """Whether nobody needs to be told any more."""
        return self._done.is_set()

    def tell(self, what: str, text: str) -> None:
        """Let the other ranks know something of this one."""
        self._reports.set(_key(what, self._rank), text)

    def ask(self, what: str, rank: int) -> str:
        """What a rank tells, waiting for it."""
        return self._reports.get(_key(what, rank)).decode()

    def report(self, error: BaseException) -> None:
        """Tell rank 0 why this rank ends."""
        try:
            self._reports.set(_key("failed", self._rank), pack_failure(error).decode())
        except RuntimeError:
            return  # the store is gone, so is rank 0

    def cause(self, lost: PeerLost) -> PpsdError:
        """The failure behind a broken connection.

        A rank reports before its connections close, so one that is lost without a report was
        killed. Asks at once: ``torchrun`` ends all ranks a moment after the first one.
        """
        peer, asked = lost.peer, set[int]()
        while peer not in asked:
            asked.add(peer)
            error = self._report_of(peer)
            if error is None:
                break
            if not isinstance(error, PeerLost):
                return error
            peer = error.peer
        return StageError(f"{stage_name(self._config, peer)} died")

    def _report_of(self, peer: int) -> PpsdError | None:
        try:
            data = _read(self._reports, _key("failed", peer))
        except RuntimeError:
            return None  # the store died with its rank
        return unpack_failure(data, stage_name(self._config, peer)) if data else None

    def _connect(self) -> TCPStore:
        """A connection of our own: a thread that waits blocks the store for others."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, timeout=_STORE_TIMEOUT, wait_for_workers=False)


def _key(what: str, rank: int) -> str:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"ppsd/{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{what}/{rank}"


def _read(store: TCPStore, key: str) -> bytes:
    """The value of a key, nothing where it is not set."""
    return store.get(key) if store.check([key]) else b""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
