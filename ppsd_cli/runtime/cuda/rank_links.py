"""How tensors get from one rank's device to another's: NCCL, or gloo by way of the host.

An exchange is a group of sends and receives of static tensors, in the order of the current stream.
Between two ranks they match in their order.
"""

import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ppsd_cli.errors import ConfigError, ResourceError, StageError
from ppsd_cli.runtime.failures import PeerLost
from ppsd_cli.runtime.group import FOREVER

LINK = "PPSD_LINK"
"""Environment variable that says which link to take: ``nccl`` or ``gloo``."""

_TAG = 1
"""Of messages between devices; orders have 0."""

_HUNG_SECONDS = 15.0

Letter = tuple[int, Tensor]
"""A rank, and what goes there or comes from there; a dense tensor."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Sends and receives of one boundary. ``lasts``: it is to be carried out again and again."""

    sends: tuple[Letter, ...]
    receives: tuple[Letter, ...]
    lasts: bool = False


class Links(Protocol):
    """The way between the devices of all ranks."""

    waits: bool
    """Whether the host waits in ``run``, and so learns there that a rank is gone."""

    def run(self, exchange: Exchange) -> None:
        """Carry out an exchange, behind what was launched on the current stream so far."""

    def close(self) -> None:
        """Leave in good order: nothing is on its way."""

    def abort(self) -> None:
        """Leave although something may wait for a rank that is gone."""


class GroupedLinks:
    """NCCL: the group is one kernel behind the tick's graph, for which no host waits."""

    waits = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device | None = None) -> None:
        """``group``: of all ranks; one of gloo does as well, for tensors on CPUs."""
        self._group, self._device, self._aborted = group, device, False
        self._prepared: dict[int, tuple[Exchange, list[dist.P2POp]]] = {}

    @classmethod
    def connect(cls, device: torch.device) -> "GroupedLinks":
        """A group over NCCL, in which this rank has ``device``. ResourceError if it fails."""
        # A lost rank is noticed by its connection to rank 0 (``Alarm``); NCCL's own watchdog would
        # end this process by a signal before it could say why.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        torch.cuda.set_device(device)
        try:
            group = dist.new_group(backend="nccl", timeout=FOREVER, device_id=device)
            come = _greet(group, device)
        except RuntimeError as error:
            raise ResourceError(
                f"NCCL cannot connect the ranks ({_first_line(error)}); {LINK}=gloo goes without it"
            ) from error
        if come != list(range(len(come))):
            raise ResourceError(
                f"NCCL loses what these GPUs send each other; {LINK}=gloo goes without it"
            )
        return cls(group, device)

    def run(self, exchange: Exchange) -> None:
        """Carry out an exchange, behind what was launched on the current stream so far."""
        try:
            for work in dist.batch_isend_irecv(self._operations(exchange)):
                work.wait()  # the stream waits, not the host
        except RuntimeError as error:
            raise StageError(
                f"NCCL failed between the ranks ({_first_line(error)}); {LINK}=gloo goes without it"
            ) from error

    def close(self) -> None:
        """Leave in good order: nothing is on its way."""
        torch.cuda.synchronize(self._device)
        dist.destroy_process_group(self._group)

    def abort(self) -> None:
        """Leave although something may wait for a rank that is gone. Safe to call twice.

        If the device stays busy even so, the process is ended by an alarm signal.
        """
        if self._aborted:
            return
        self._aborted = True
        signal.setitimer(signal.ITIMER_REAL, _HUNG_SECONDS)
        dist.distributed_c10d._abort_process_group(self._group)

    def _operations(self, exchange: Exchange) -> list[dist.P2POp]:
        """Kept where the exchange lasts; its key is good as long as it is kept beside them."""
        if id(exchange) in self._prepared:
            return self._prepared[id(exchange)][1]
        operations = [
            dist.P2POp(way, tensor, peer, self._group)
            for way, letters in ((dist.isend, exchange.sends), (dist.irecv, exchange.receives))
            for peer, tensor in letters
        ]
        if exchange.lasts:
            self._prepared[id(exchange)] = exchange, operations
        return operations


def _greet(group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """What each rank sends this one: its number.

    All connect at once here. Left to the first exchanges, which are not the same on all ranks,
    three could wait for each other in a circle.
    """
    sent = torch.full((group.size(),), group.rank(), device=device)
    come = torch.full_like(sent, -1)
    dist.all_to_all_single(come, sent, group=group)
    return come.tolist()


class HostLinks:
    """gloo: through pinned memory of the host, which waits for the device and for the other rank.

    For ranks that share a GPU, hosts without NCCL, and tensors on CPUs, which need no copies.
    """

    waits = True

    def run(self, exchange: Exchange) -> None:
        """Carry out an exchange; when it returns, what came is on the current stream."""
        sent = [(peer, _outgoing(tensor)) for peer, tensor in exchange.sends]
        come = [(peer, tensor, _incoming(tensor)) for peer, tensor in exchange.receives]
        # Copies out have been made, and those of the last exchange in, whose memory is free now.
        for tensor in {t.device: t for _, t in (*exchange.sends, *exchange.receives)}.values():
            if tensor.is_cuda:
                torch.cuda.current_stream(tensor.device).synchronize()
        flying = []
        for peer, data in sent:
            flying.append((peer, _begun(dist.isend, data, peer)))
        for peer, _, data in come:
            flying.append((peer, _begun(dist.irecv, data, peer)))
        for peer, work in flying:
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerLost(peer) from error
        for _, tensor, data in come:
            if tensor.is_cuda:
                tensor.view(-1).view(torch.uint8).copy_(data, non_blocking=True)

    def close(self) -> None:
        """Nothing is held."""

    def abort(self) -> None:
        """Nothing is held."""


def _begun(way, data: Tensor, peer: int):
    try:
        return way(data, peer, tag=_TAG)
    except RuntimeError as error:
        raise PeerLost(peer) from error


def _outgoing(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in memory of the host; a device's arrive with its stream."""
    data = tensor.view(-1).view(torch.uint8)
    if not data.is_cuda:
        return data
    room = torch.empty(data.shape, dtype=torch.uint8, pin_memory=True)
    return room.copy_(data, non_blocking=True)


def _incoming(tensor: Tensor) -> Tensor:
    """Room for the bytes of a tensor in memory of the host: its own, where it lies there."""
    data = tensor.view(-1).view(torch.uint8)
    return torch.empty(data.shape, dtype=torch.uint8, pin_memory=True) if data.is_cuda else data


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's device as all ranks must know it. ``wish``: the user's word on the link."""

    gpu: str | None
    nccl: bool
    wish: str | None

    @classmethod
    def of(cls, device: torch.device) -> "Place":
        """This rank's."""
        gpu = None
        if device.type == "cuda":
            gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        return cls(gpu, dist.is_nccl_available(), os.environ.get(LINK))

    def to_json(self) -> str:
        """For other ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Place":
        """The inverse of ``to_json``."""
        return cls(**json.loads(text))


def link_of(places: Sequence[Place]) -> str:
    """``nccl`` where it can be and nobody wants otherwise, else ``gloo``; the same on all ranks."""
    wishes = {place.wish for place in places} - {None, ""}
    for wish in wishes - {"nccl", "gloo"}:
        raise ConfigError(f"{LINK}={wish}: choose nccl or gloo")
    if "gloo" in wishes:
        return "gloo"
    gpus = [place.gpu for place in places]
    obstacle = None
    if None in gpus:
        obstacle = "a rank is not on a GPU"
    elif len(set(gpus)) < len(gpus):
        obstacle = "two ranks share a GPU"
    elif not all(place.nccl for place in places):
        obstacle = "torch was built without it on one of the hosts"
    if obstacle is None:
        return "nccl"
    if "nccl" in wishes:
        raise ConfigError(f"{LINK}=nccl: {obstacle}; use {LINK}=gloo")
    return "gloo"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
