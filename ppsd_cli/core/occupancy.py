"""Which node was in which stage in which tick, and whether its work counted. Pure."""

from collections.abc import Sequence
from enum import Enum

from ppsd_cli.core.events import (
    Committed,
    Entered,
    Event,
    Finished,
    Flushed,
    Pruned,
    Ticked,
    Verified,
)


class Cell(Enum):
    """What a stage did in a tick."""

    USEFUL = "useful"
    VOID = "void"
    BUBBLE = "bubble"
    PROMPT = "prompt"


class Occupancy:
    """Which nodes were in which stage in which tick, and whether their work counted.

    A node is useful until something says otherwise: a flush, a result that is not live, or the end
    of the answer while its own result is still outstanding.
    """

    def __init__(self) -> None:
        self.first_tick: int | None = None
        self.last_tick = -1
        """The latest tick known to have begun."""
        self._serials: dict[int, list[int]] = {}
        self._state: dict[int, Cell] = {}
        self._pending: set[int] = set()
        self._finished = False

    def add(self, event: Event) -> None:
        """Take one event; leftovers of an earlier answer and what follows the end do not count."""
        if self._finished:
            return
        match event:
            case Entered():
                self._enter(event)
            case Verified():
                self._reach(event.tick - 1)
                self._pending.discard(event.serial)
                if not event.live:
                    self._make_void((event.serial,))
            case Flushed() | Pruned():
                self._reach(event.tick - 1)
                self._make_void(event.void)
            case Committed():
                self._reach(event.tick - 1)
            case Finished():
                self._reach(event.tick - 1)
                self._make_void(tuple(self._pending))
                self._pending.clear()
                self._finished = True
            case Ticked():
                self._reach(event.tick)

    def cell(self, stage: int, tick: int) -> Cell:
        """State of one cell: the best of its nodes, as a tree has several in a tick."""
        states = [self._state[serial] for serial in self._serials.get(tick - stage, ())]
        for state in (Cell.PROMPT, Cell.USEFUL, Cell.VOID):
            if state in states:
                return state
        return Cell.BUBBLE

    def branch(self, place: int, tick: int) -> Cell:
        """State of the node that entered in ``tick`` as number ``place`` of its level."""
        level = self._serials.get(tick, [])
        return self._state[level[place]] if place < len(level) else Cell.BUBBLE

    def forget(self, before: int) -> None:
        """Drop the nodes that entered before this tick."""
        for tick in [tick for tick in self._serials if tick < before]:
            for serial in self._serials.pop(tick):
                del self._state[serial]
                self._pending.discard(serial)

    def _enter(self, event: Entered) -> None:
        if self.first_tick is None:
            self.first_tick = event.tick
        self._reach(event.tick)
        self._serials.setdefault(event.tick, []).append(event.serial)
        self._state[event.serial] = Cell.PROMPT if event.token_id is None else Cell.USEFUL
        self._pending.add(event.serial)

    def _reach(self, tick: int) -> None:
        self.last_tick = max(self.last_tick, tick)

    def _make_void(self, serials: Sequence[int]) -> None:
        for serial in serials:
            if self._state.get(serial) is Cell.USEFUL:
                self._state[serial] = Cell.VOID
