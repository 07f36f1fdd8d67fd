"""Links between stage processes over ``torch.distributed``, and the loop of stages after 0.

The next small message of every link is awaited from the moment the last one was taken in, so
that gloo delivers it at once. Sends never block: two stages may send big messages to each other.
"""

from collections import deque
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.frames import Frame, Return
from ppsd_cli.runtime.group import FOREVER
from ppsd_cli.runtime.pipeline import PipelineConfig, returning_stages, tap_depths
from ppsd_cli.runtime.wire import FrameCodec, ReturnCodec, RowFormat
from ppsd_cli.runtime.worker import StageWorker

T = TypeVar("T")


class Codec(Protocol[T]):
    """Messages of one kind of node; None means that the sender has ended."""

    small_bytes: int

    def pack(self, item: T | None) -> list[Tensor]:
        """The messages of one item, the small one first."""

    def following(self, small: Tensor) -> list[int]:
        """Sizes of the messages that follow a small one."""

    def unpack(self, small: Tensor, following: list[Tensor]) -> T | None:
        """The inverse of ``pack``."""


class Outbox(Generic[T]):
    """Sends items to one peer without waiting, in order."""

    def __init__(self, peer: int, codec: Codec[T], *, window: int) -> None:
        """``window``: items after which the peer must have taken in an earlier one.

        Number of stages + 1, because a node that has gone around has been received everywhere.
        """
        self._peer, self._codec, self._window = peer, codec, window
        self._flying: deque[list[tuple[Any, Tensor]]] = deque()

    def send(self, item: T | None) -> None:
        """Queue an item. PeerLost when the connection is broken."""
        try:
            messages = self._codec.pack(item)
            self._flying.append([(dist.isend(m, self._peer), m) for m in messages])
            if len(self._flying) > self._window:
                self._wait_oldest()
        except RuntimeError as error:
            raise PeerLost(self._peer) from error

    def flush(self) -> None:
        """Wait until the peer has everything."""
        try:
            while self._flying:
                self._wait_oldest()
        except RuntimeError as error:
            raise PeerLost(self._peer) from error

    def _wait_oldest(self) -> None:
        for work, _ in self._flying[0]:
            work.wait()
        self._flying.popleft()


class Inbox(Generic[T]):
    """Receives items from one peer, in order."""

    def __init__(self, peer: int, codec: Codec[T]) -> None:
        self._peer, self._codec = peer, codec
        self._small = torch.empty(codec.small_bytes, dtype=torch.uint8)
        self._work: Any = dist.irecv(self._small, peer)

    def receive(self, *, within: timedelta = FOREVER) -> T | None:
        """The next item, waiting for it; None: the peer has ended and nothing else will come.

        PeerLost when the connection is broken, as it is too where nothing comes ``within`` a time.
        """
        try:
            self._work.wait(within)
            following = [
                torch.empty(size, dtype=torch.uint8) for size in self._codec.following(self._small)
            ]
            for message in following:
                dist.recv(message, self._peer)
            item = self._codec.unpack(self._small, following)
            if item is not None:
                self._work = dist.irecv(self._small, self._peer)
        except RuntimeError as error:
            raise PeerLost(self._peer) from error
        return item


class FrontLink:
    """Stage 0's links (``runtime.front.Link``): frames to stage 1, returns of later stages."""

    def __init__(self, config: PipelineConfig, worker: StageWorker) -> None:
        rows = _row_format(config, worker)
        self._down = Outbox(1, FrameCodec(rows), window=config.stages + 1)
        self._returns = {
            stage: Inbox(stage, ReturnCodec(rows, stage, tap_depths(config, stage)))
            for stage in returning_stages(config)
        }

    def send(self, frame: Frame) -> None:
        """Hand a frame to stage 1."""
        self._down.send(frame)

    def receive(self, stage: int) -> Return:
        """The next return of ``stage``, waiting for it."""
        back = self._returns[stage].receive()
        assert back is not None, "a stage ended by itself"
        return back

    def advance(self) -> None:
        """Other stages run by themselves."""

    def stop(self) -> None:
        """End the loops of all stages and wait until each that returns has ended."""
        self._down.send(None)
        for inbox in self._returns.values():
            while inbox.receive() is not None:
                pass
        self._down.flush()


def serve(config: PipelineConfig, worker: StageWorker) -> None:
    """The loop of a stage after 0: take a frame, run it, pass it on, until told to stop."""
    index, last = worker.index, config.stages - 1
    rows = _row_format(config, worker)
    inbox = Inbox(index - 1, FrameCodec(rows))
    ahead, back = None, None
    if index < last:
        ahead = Outbox(index + 1, FrameCodec(rows), window=config.stages + 1)
    if index in returning_stages(config):
        codec = ReturnCodec(rows, index, tap_depths(config, index))
        back = Outbox(0, codec, window=config.stages + 1)
    while (frame := inbox.receive()) is not None:
        onward, returned = worker.process(frame)
        if ahead is not None:
            ahead.send(onward)
        if back is not None:
            back.send(returned)
    for outbox in (ahead, back):
        if outbox is not None:
            outbox.send(None)
            outbox.flush()


def _row_format(config: PipelineConfig, worker: StageWorker) -> RowFormat:
    hidden, dtype = worker.stage.spec.hidden, worker.stage.dtype
    return RowFormat(hidden, dtype, config.stages, most=config.width)
