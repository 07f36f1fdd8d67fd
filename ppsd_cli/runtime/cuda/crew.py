"""The devices of a pipeline at work together: one graph a tick on each, and what they wait for.

A device starts tick t + 1 when those that fill its box, and those whose boxes it fills, have ended
tick t: then its box is full, and the half that it will fill has been read. Waiting is between
devices (events); the host only launches.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.march import TickKind, inside
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Ready, Recorder
from ppsd_cli.runtime.cuda.relay import Push, poke
from ppsd_cli.runtime.cuda.ticks import Pod
from ppsd_cli.runtime.cuda.tree_follower import TreeFollower
from ppsd_cli.runtime.cuda.trees import TreePod

AnyPod = Pod | TreePod | TreeFollower


@dataclass(frozen=True, slots=True)
class Member:
    """A device with its stages, its streams and its clock."""

    pod: AnyPod
    recorder: Recorder | Immediate
    clock: DeviceClock


@dataclass(frozen=True, slots=True)
class Fetched:
    """Copies on their way to the host, of each member in turn."""

    copies: list[list[Tensor]]
    ready: list[Ready]

    def synchronize(self) -> None:
        """Wait until they are there."""
        for each in self.ready:
            each.synchronize()


class Crew:
    """All devices of one pipeline. The first decides."""

    def __init__(self, members: Sequence[Member], *, through_host: bool = False) -> None:
        """``through_host``: boxes lie in pinned host memory."""
        self.members = tuple(members)
        self.home, self.tail = members[0], members[-1]
        self._through_host = through_host
        self._graphs: dict[Hashable, list[Playable]] = {}
        self._near: list[list[int]] = [[] for _ in members]
        if len(members) > 1:
            self._connect()
            self._near = [self._neighbours(i) for i in range(len(members))]

    def _connect(self) -> None:
        """Boxes for all: states of the stage before, and at home what the others return."""
        home = self.home.pod
        returned: list[tuple[int, int, int, int, int]] = []
        sent: dict[int, list[tuple[int, int]]] = {}
        for tap, depth in enumerate(home.tap_depths):
            for number, member in enumerate(self.members[1:], 1):
                stages = [lane.stage for lane in member.pod.lanes]
                owner = next((s for s, stage in enumerate(stages) if inside(stage, depth)), None)
                if owner is not None:
                    row = len(returned)
                    returned.append((row, 1, tap, member.pod.first + owner, 1))
                    sent.setdefault(number, []).append((member.pod.row[depth], row))
        box = home.make_box(len(returned), through_host=self._through_host, returns=True)
        home.connect(box, returned)
        last = len(self.members) - 1
        for number, member in enumerate(self.members):
            pod = member.pod
            if number < last:
                follower = self.members[number + 1].pod
                letters = follower.make_box(1, through_host=self._through_host)
                follower.connect(letters, [(0, 0, 0, 0, 1)])
                end = pod.lanes[-1].stage.part.last
                pod.pushes.append(
                    Push(follower.box, _table([(pod.row[end], 0)], pod), place=True, target=False)
                )
            if number and (number == last or number in sent):
                rows = _table(sent.get(number, []), pod)
                pod.pushes.append(Push(box, rows, place=False, target=number == last))

    def _neighbours(self, index: int) -> list[int]:
        """The members whose boxes this one fills, or that fill its box."""
        mine = self.members[index].pod
        return [
            i
            for i, other in enumerate(self.members)
            if i != index
            and (
                any(push.box is other.pod.box for push in mine.pushes)
                or any(push.box is mine.box for push in other.pod.pushes)
            )
        ]

    def stream(self) -> AbstractContextManager[object]:
        """Work in this context goes to the first device's main stream."""
        return self.home.recorder.stream()

    def idle(self) -> None:
        """Nothing is due and nothing in flight, on any device."""
        self._together(lambda member: member.pod.idle())

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """A prompt is in all caches, and its first token is due."""
        self._together(
            lambda member: member.pod.begin(request, position=position, token=token, serial=serial)
        )

    def knows(self, key: Hashable) -> bool:
        """Whether there is a graph for it."""
        return key in self._graphs

    def record(self, key: Hashable, kinds: Sequence[TickKind], sampling: Sampling) -> None:
        """Graphs of a stretch of ticks, one on each device. All must be idle."""
        self._graphs[key] = [
            member.recorder.record(
                lambda member=member: member.pod.stretch(kinds, sampling, member.recorder.fork)  # type: ignore[misc]
            )
            for member in self.members
        ]

    def with_trees(self, width: int, depth: int = 1) -> "Crew":
        """The same devices for levels of ``width`` nodes, with boxes of their own.

        ``depth``: depths of guesses that enter in one tick.
        """
        members = [widened(member, width, depth) for member in self.members]
        return Crew(members, through_host=self._through_host)

    def record_alone(self, key: Hashable, launches: Callable[[], None]) -> None:
        """A graph of the first device, where it is the only one."""
        assert len(self.members) == 1
        self._graphs[key] = [self.home.recorder.record(launches)]

    def forget(self) -> None:
        """Let go of the graphs."""
        self._graphs.clear()

    def replay(self, key: Hashable) -> None:
        """Launch the graphs of ``key`` on all devices."""
        self._wait()
        for member, graph in zip(self.members, self._graphs[key], strict=True):
            with member.recorder.stream():
                graph.replay()
        self._mark()

    def fetch(self, kept: Sequence[Sequence[Tensor]]) -> Fetched:
        """Copies of tensors of each member, as they are after what was launched so far."""
        both = zip(self.members, kept, strict=True)
        pairs = [member.recorder.fetch(tensors) for member, tensors in both]
        return Fetched([copies for copies, _ in pairs], [ready for _, ready in pairs])

    def hand_over(self, tensor: Tensor, giver: int, taker: int) -> Tensor:
        """``tensor`` of one member's main stream for another's, on its device."""
        source, target = self.members[giver], self.members[taker]
        if source is target:
            return tensor
        with source.recorder.stream():
            if self._through_host:
                tensor = tensor.cpu()
            source.recorder.mark()
        target.recorder.after([source.recorder])
        with target.recorder.stream():
            return tensor.to(target.pod.device, copy=True)

    def meet(self) -> None:
        """Every device waits for every other one's work so far."""
        self._mark()
        for member in self.members:
            member.recorder.after([m.recorder for m in self.members if m is not member])

    def _together(self, work: Callable[[Member], None]) -> None:
        """Do something on each device, after everything before and before everything after."""
        self.meet()
        for member in self.members:
            with member.recorder.stream():
                work(member)
        self.meet()

    def _wait(self) -> None:
        for member, near in zip(self.members, self._near, strict=True):
            member.recorder.after([self.members[i].recorder for i in near])

    def _mark(self) -> None:
        if len(self.members) > 1:
            for member in self.members:
                member.recorder.mark()


def widened(member: Member, width: int, depth: int) -> Member:
    """The same device for levels of ``width`` nodes, without boxes."""
    pod = member.pod
    assert isinstance(pod, Pod), "a crew of trees"
    kind = TreeFollower if pod.first else TreePod
    return Member(kind(pod, width, depth), member.recorder, member.clock)


def devices_reach(devices: Sequence[torch.device]) -> bool:
    """Whether each device can write to the memory of every other one, by copies and by kernels.

    Some systems take such writes and drop them, so it is tried.
    """
    for target in devices:
        for source in devices:
            if source == target:
                continue
            if not torch.cuda.can_device_access_peer(source, target):
                return False
            sent = torch.arange(1, 1025, device=source)
            with torch.cuda.device(source):
                came = sent.to(target)
                torch.cuda.synchronize(source)
                poke(came, 4321)
                torch.cuda.synchronize(source)
            torch.cuda.synchronize(target)
            found = came.tolist()
            if found != [4321, *range(2, 1025)]:
                return False
    return True


def _table(rows: Sequence[tuple[int, int]], pod: AnyPod) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64, device=pod.device).view(-1, 2)
