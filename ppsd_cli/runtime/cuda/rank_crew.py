"""One rank's device among those of all ranks: its graphs, and an exchange behind each tick.

Every rank has the crew of its own device, and launches what rank 0 says (``rank_runner.py``). A
device pushes into boxes of its own, an *outbox* for each receiver; behind the tick's graph one
exchange carries the half of that tick to the receivers' boxes, so that the next tick finds there
what it would find beside other GPUs of one process (``relay.py``).

Each rank sends states and place of the node that leaves it to the next rank, and to rank 0 its
tapped states, when its stage was done, and from the last one the target; the logits, too, where
they are kept. With trees it is a level of nodes and its letter (``tree_relay.py``), and a target
for each row: the same boxes with wider halves, so the same exchanges.

Shapes: W rows of a tick (1 in a chain), B states of a box, V vocabulary, H hidden. A box's states
are [2, B * W, H].
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import sleep
from typing import cast

import torch
from torch import Tensor

from ppsd_cli.core.plan import Request, Sampling
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.crew import AnyPod, Crew, Fetched, Member, widened
from ppsd_cli.runtime.cuda.march import TickKind
from ppsd_cli.runtime.cuda.rank_alarm import Watched
from ppsd_cli.runtime.cuda.rank_clock import AwayClock
from ppsd_cli.runtime.cuda.rank_links import Exchange, Letter, Links
from ppsd_cli.runtime.cuda.recorder import Ready
from ppsd_cli.runtime.cuda.relay import Box, Push
from ppsd_cli.runtime.pipeline import PipelineConfig, head_taps

_LOSS_SECONDS = 0.3
"""Until a broken connection is noticed."""


@dataclass(frozen=True, slots=True)
class Route:
    """A tapped state on its way home: which tap, made by which rank, in which row of the box."""

    tap: int
    depth: int
    rank: int
    row: int


def routes_of(config: PipelineConfig) -> tuple[Route, ...]:
    """What other ranks return to rank 0, rank by rank, as the rows of its box."""
    found: list[Route] = []
    for rank in range(1, config.stages):
        part = config.part(rank)
        for tap, depth in enumerate(tap.depth for tap in head_taps(config)):
            if part.first < depth <= part.last:
                found.append(Route(tap, depth, rank, len(found)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Stamps:
    stamps: Tensor


@dataclass(frozen=True, slots=True)
class _Logits:
    logits: Tensor


@dataclass(frozen=True, slots=True)
class AwayPod:
    """What rank 0 has of another rank's pod: its stage, copies of its stamps and logits [W, V]."""

    lanes: tuple[int, ...]
    board: _Stamps
    chooser: _Logits


@dataclass(frozen=True, slots=True)
class Away:
    """Another rank's device, as far as the runner of this one asks for it."""

    pod: AwayPod
    clock: AwayClock


class RankCrew(Crew):
    """The device of this rank. ``members`` has all, of which this one alone is here."""

    def __init__(
        self,
        config: PipelineConfig,
        rank: int,
        member: Member,
        links: Links,
        *,
        vocabulary: int,
        watch: Callable[[], None] | None = None,
    ) -> None:
        """``watch``: called while the host waits for the device; raises where a rank is gone."""
        self.rank, self.links, self._watch = rank, links, watch
        self._config, self._vocabulary = config, vocabulary
        self._last = config.stages - 1
        self._graphs = {}
        self.home, self._width = member, member.pod.states.shape[1]
        away = [self._away(r) for r in range(config.stages)]
        members = [member if r == rank else away[r] for r in range(config.stages)]
        self.members = tuple(cast(Member, each) for each in members)
        self.tail = self.members[-1]
        self._tick, self._keeps = 0, False
        self._exchanges: dict[tuple[int, bool], Exchange] = {}
        self._routes = [r for r in routes_of(config) if rank in (0, r.rank)]
        self._onward: Box | None = None
        self._homeward: Box | None = None
        self._connect()

    def with_trees(self, width: int, depth: int = 1) -> "RankCrew":
        """See ``Crew.with_trees``; with exchanges of its own. Clocks stay with this crew."""
        return RankCrew(
            self._config, self.rank, widened(self.home, width, depth), self.links,
            vocabulary=self._vocabulary,
            watch=self._watch,
        )  # fmt: skip

    def _away(self, rank: int) -> Away:
        device = self.home.pod.device
        stamps = torch.zeros(TICKS, 1, dtype=torch.int64, device=device)
        columns = self._vocabulary if self.rank == 0 and rank == self._last else 0
        logits = torch.zeros(self._width, columns, dtype=torch.float32, device=device)
        pod = AwayPod((rank,), _Stamps(stamps), _Logits(logits))
        return Away(pod, AwayClock(rank if self.rank == 0 else None))

    def _connect(self) -> None:
        """This device's boxes: what comes here, and what goes to each receiver."""
        pod, rows = self.home.pod, len(self._routes)
        if self.rank == 0:
            moves = [(route.row, 1, route.tap, route.rank, 1) for route in self._routes]
            pod.connect(pod.make_box(rows, returns=True), moves)
        else:
            pod.connect(pod.make_box(1), [(0, 0, 0, 0, 1)])
        if self.rank < self._last:
            self._onward = pod.make_box(1)
            end = pod.lanes[-1].stage.part.last
            table = _table([(pod.row[end], 0)], pod)
            pod.pushes.append(Push(self._onward, table, place=True, target=False))
        if self.rank and (rows or self.rank == self._last):
            self._homeward = pod.make_box(rows, returns=True)
            table = _table([(pod.row[r.depth], i) for i, r in enumerate(self._routes)], pod)
            target = self.rank == self._last
            pod.pushes.append(Push(self._homeward, table, place=False, target=target))

    def idle(self) -> None:
        """Nothing is due and nothing in flight."""
        with self.stream():
            self.home.pod.idle()

    def begin(self, request: Request, *, position: int, token: int, serial: int) -> None:
        """A prompt is in all caches, and its first token is due."""
        with self.stream():
            self.home.pod.begin(request, position=position, token=token, serial=serial)
        self._tick, self._keeps = 0, request.keep_logits

    def record(self, key: Hashable, kinds: Sequence[TickKind], sampling: Sampling) -> None:
        """The graph of a stretch of ticks; what it pushes stays here."""
        pod, recorder = self.home.pod, self.home.recorder
        self._graphs[key] = [recorder.record(lambda: pod.stretch(kinds, sampling, recorder.fork))]

    def replay(self, key: Hashable) -> None:
        """Launch a graph of one tick, and the exchange behind it."""
        self._tick += 1
        with self.stream():
            self._graphs[key][0].replay()
            self.links.run(self._exchange(self._tick % TICKS, self._keeps))

    def fetch(self, kept: Sequence[Sequence[Tensor]]) -> Fetched:
        """Copies of this device's tensors, which at rank 0 include what came of the others."""
        flat = [tensor for tensors in kept for tensor in tensors]
        copies, ready = self.home.recorder.fetch(flat)
        rest = iter(copies)
        return Fetched([[next(rest) for _ in tensors] for tensors in kept], [self.watched(ready)])

    def watched(self, ready: Ready) -> Ready:
        """The same, noticing meanwhile that a rank is gone."""
        if self._watch is None or not isinstance(ready, torch.cuda.Event):
            return ready
        return Watched(ready, self._watch)

    def look(self) -> None:
        """``PeerLost`` where a lost rank is behind an error of the links."""
        if self._watch is not None:
            sleep(_LOSS_SECONDS)
            self._watch()

    def meet(self) -> None:
        """Exchanges are all that this device waits for."""

    def _exchange(self, row: int, keeps: bool) -> Exchange:
        """What the tick of this row of the log sends and receives; an even number of rows keeps
        halves and rows in step.
        """
        key = (row, keeps)
        if key not in self._exchanges:
            receives = self._comes_home(row, keeps) if self.rank == 0 else self._comes_on(row % 2)
            sends = tuple(self._goes(row, keeps))
            self._exchanges[key] = Exchange(sends, tuple(receives), lasts=True)
        return self._exchanges[key]

    def _goes(self, row: int, keeps: bool) -> list[Letter]:
        half, letters = row % 2, []
        if self._onward is not None:
            for tensor in (self._onward.states, self._onward.header):
                letters.append((self.rank + 1, tensor[half]))
        if self.rank == 0:
            return letters
        pod, box = self.home.pod, self._homeward
        if box is not None and self._routes:
            letters.append((0, box.states[half]))
        if box is not None and self.rank == self._last:
            letters.append((0, box.header[half]))
        letters.append((0, pod.board.stamps[row]))
        if keeps and self.rank == self._last:
            assert pod.chooser is not None
            letters.append((0, pod.chooser.logits))
        return letters

    def _comes_on(self, half: int) -> list[Letter]:
        box = self.home.pod.box
        return [(self.rank - 1, box.states[half]), (self.rank - 1, box.header[half])]

    def _comes_home(self, row: int, keeps: bool) -> list[Letter]:
        """As ``_goes`` of each other rank sends it."""
        half, box, width, letters = row % 2, self.home.pod.box, self._width, []
        for rank, member in enumerate(self.members[1:], 1):
            rows = [route.row for route in self._routes if route.rank == rank]
            if rows:
                letters.append((rank, box.states[half, rows[0] * width : (rows[-1] + 1) * width]))
            if rank == self._last:
                letters.append((rank, box.header[half]))
            letters.append((rank, member.pod.board.stamps[row]))
            if keeps and rank == self._last:
                assert member.pod.chooser is not None
                letters.append((rank, member.pod.chooser.logits))
        return letters


def _table(rows: Sequence[tuple[int, int]], pod: AnyPod) -> Tensor:
    return torch.tensor(list(rows), dtype=torch.int64, device=pod.device).view(-1, 2)
