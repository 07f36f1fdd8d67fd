"""Chrome trace of a run: opens in Perfetto and in ``chrome://tracing``."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppsd_cli.core.events import Committed, Entered, Event, Flushed, Pruned, Ticked, Verified
from ppsd_cli.files import replace_bytes

_PID = 1
TraceEvent = dict[str, Any]


class TraceWriter:
    """Collects the events of a run and writes them as a JSON array of trace events.

    One thread a stage with what it did in each tick (``guesses``: those that entered behind the
    node in the same tick; ``branches``: in a tree all of them, with serial, parent, token and
    state), and one for what stage 0 does around its layers (waiting, drafting).
    Times are microseconds since the first of the run.
    """

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._entered: dict[int, Entered] = {}
        self._first_of_tick: dict[int, int] = {}
        self._guesses: Counter[int] = Counter()
        self._levels: dict[int, list[Entered]] = {}
        self._verified: list[Verified] = []
        self._committed: list[Committed] = []
        self._flushed: list[Flushed | Pruned] = []
        self._ticked: dict[int, Ticked] = {}
        self._void: set[int] = set()

    def add(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Entered():
                self._entered[event.serial] = event
                first = self._first_of_tick.setdefault(event.tick, event.serial)
                self._guesses[event.tick] += first != event.serial
                if event.parent is not None:
                    self._levels.setdefault(event.tick, []).append(event)
            case Verified():
                self._verified.append(event)
                if not event.live:
                    self._void.add(event.serial)
            case Flushed() | Pruned():
                self._flushed.append(event)
                self._void.update(event.void)
            case Committed():
                self._committed.append(event)
            case Ticked():
                self._ticked[event.tick] = event

    def events(self) -> list[TraceEvent]:
        """Return the trace events so far, names of threads first, then in order of time."""
        timed = [*self._nodes(), *self._parts(), *self._instants()]
        zero = min((each["ts"] for each in timed), default=0.0)
        for each in timed:
            each["ts"] = round(each["ts"] - zero, 3)
        return [*self._names(), *sorted(timed, key=lambda each: each["ts"])]

    def write(self, path: Path) -> None:
        """Write the trace; the file is complete or, after an error, as it was before."""
        text = json.dumps(self.events(), separators=(",", ":")) + "\n"
        replace_bytes(path, text.encode())

    def _names(self) -> Iterator[TraceEvent]:
        yield {"ph": "M", "pid": _PID, "name": "process_name", "args": {"name": "ppsd"}}
        names = [f"stage {stage}" for stage in range(self._stages)] + ["stage 0: wait and draft"]
        for tid, name in enumerate(names):
            at = {"ph": "M", "pid": _PID, "tid": tid}
            yield {**at, "name": "thread_name", "args": {"name": name}}
            yield {**at, "name": "thread_sort_index", "args": {"sort_index": tid}}

    def _nodes(self) -> Iterator[TraceEvent]:
        for verified in self._verified:
            node = self._entered.get(verified.serial)
            if node is None or self._first_of_tick[node.tick] != node.serial:
                continue
            args: TraceEvent = {
                "serial": node.serial,
                "position": node.position,
                "token": node.token_id,
                "tokens": node.tokens,
                "drafted": node.drafted,
                "state": self._state(node),
                "guesses": self._guesses[node.tick],
            }
            level = self._levels.get(node.tick, [])
            if level:
                args["branches"] = [[e.serial, e.parent, e.token_id, self._state(e)] for e in level]
            dead = all(each.serial in self._void for each in level or [node])
            prompt = node.token_id is None
            name = f"prompt {node.position}" if prompt else f"position {node.position}"
            for span in verified.spans:
                color = "terrible" if dead else "good"
                yield _slice(name, span.stage, (span.begin, span.end)) | {
                    "cname": color,
                    "args": args,
                }

    def _state(self, node: Entered) -> str:
        return "void" if node.serial in self._void else "live"

    def _parts(self) -> Iterator[TraceEvent]:
        for tick in self._ticked.values():
            args = {"args": {"tick": tick.tick}}
            yield _slice("wait", self._stages, (tick.begin, tick.received)) | args
            yield _slice("draft", self._stages, (tick.received, tick.drafted)) | args

    def _instants(self) -> Iterator[TraceEvent]:
        for commit in self._committed:
            args: TraceEvent = {
                "position": commit.position,
                "token": commit.token_id,
                "outcome": commit.outcome.value,
                "draft": commit.draft_id,
            }
            yield from self._instant("commit", commit.tick, args)
        for flush in self._flushed:
            args = {"position": flush.position, "void": list(flush.void)}
            name = "flush" if isinstance(flush, Flushed) else "prune"
            yield from self._instant(name, flush.tick, args)

    def _instant(self, name: str, boundary: int, args: TraceEvent) -> Iterator[TraceEvent]:
        """Mark a boundary, at the time when stage 0 had its results; nothing if that is unknown."""
        after, before = self._ticked.get(boundary), self._ticked.get(boundary - 1)
        if after is None and before is None:
            return
        seconds = after.received if after is not None else before.end if before else 0.0
        scope = "p" if name == "flush" else "t"
        at = {"ph": "i", "s": scope, "pid": _PID, "tid": 0, "ts": seconds * 1e6}
        yield {"name": name, **at, "args": {"tick": boundary, **args}}


def _slice(name: str, tid: int, seconds: tuple[float, float]) -> TraceEvent:
    begin, end = seconds
    duration = round(max(end - begin, 0.0) * 1e6, 3)
    return {"name": name, "ph": "X", "pid": _PID, "tid": tid, "ts": begin * 1e6, "dur": duration}
