"""The graph runner: answers plans with one graph launch a tick, some ticks ahead of the host.

Prompts run as graphs too (``prefill.py``); from the first token on the device decides
by itself (``control.py``) and the host follows what it logs.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import (
    Bubble,
    Burst,
    Node,
    Plan,
    Prompt,
    Request,
    Step,
    Target,
    TickResult,
)
from ppsd_cli.errors import StageError
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.board import Entry
from ppsd_cli.runtime.cuda.burst_log import BurstRecord
from ppsd_cli.runtime.cuda.bursts import BurstPod
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.crew import Crew, Fetched
from ppsd_cli.runtime.cuda.lanes import is_cut
from ppsd_cli.runtime.cuda.march import TickKind
from ppsd_cli.runtime.cuda.prefill import Prefill, not_numbers
from ppsd_cli.runtime.cuda.ticks import Pod
from ppsd_cli.runtime.cuda.tiles import stretch_of
from ppsd_cli.runtime.cuda.tree_board import Level
from ppsd_cli.runtime.cuda.tree_follower import TreeFollower

_LOOKAHEAD = 3
Recorded = tuple[TickKind, ...] | Burst
"""What a graph holds: a stretch of ticks, or a burst."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A tick that was launched (``row``: its number on the device) or that only the host knows.

    ``fetched``: stamps of each device, and behind the first one's the log. ``logits``: of the
    target and the draft, where they are kept. ``burst``: what was launched is a whole burst.
    """

    number: int
    fetched: Fetched | None
    row: int
    begin: float
    nodes: tuple[Node, ...] = ()
    end: float = 0.0
    burst: bool = False
    logits: tuple[Tensor, ...] = ()


class GraphRunner:
    """Stages on one device or several behind the ``Runner`` protocol."""

    def __init__(
        self,
        stages: list[Stage],
        head: DraftHead | None,
        crew: Crew,
        *,
        chunk: int,
        prefill: Prefill | None = None,
    ) -> None:
        """``chunk``: prompt tokens of a plan, at most. ``prefill``: what runs them, if it is not
        the crew here.
        """
        self.stage_list, self._head, self._crew = stages, head, crew
        pod = crew.home.pod
        assert isinstance(pod, Pod), "a crew of chains"
        self._pod, self._clock = pod, crew.home.clock
        self._clocks = [m.clock for m in crew.members for _ in m.pod.lanes]
        self._asked: deque[_Asked] = deque()
        self._request: Request | None = None
        self._cycle: tuple[TickKind, ...] = ()
        self._unit = 1
        self._fetched: tuple[Fetched, tuple[Tensor, ...]]
        self._number = 0
        self._serial = 0
        self._row = 0
        self._entries: dict[int, Entry | Level] = {}
        self._prefill = prefill or Prefill(crew, head, chunk=chunk)
        self._bursts: dict[int, BurstPod] = {}
        self._burst: tuple[int, BurstRecord] | None = None
        self._trees: dict[tuple[int, int], Crew] = {}
        self._due_back: deque[tuple[int, tuple[Target, ...]]] = deque()
        self._kept: Tensor | None = None
        self._weight_bytes = sum(stage.weight_bytes() for stage in stages)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.stage_list)

    @property
    def lookahead(self) -> int:
        """Ticks that run ahead of the host: one graph runs while the next one is due. Or the next
        burst. None where logits are wanted.
        """
        if self._request is not None and self._request.keep_logits:
            return 0
        return self.stages if self._bursting else max(_LOOKAHEAD, 2 * self._unit - 1)

    @property
    def pending(self) -> int:
        """Plans submitted and not yet collected."""
        return len(self._asked)

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        """Launch one tick; for a prompt chunk, run it through all stages."""
        if isinstance(plan, Prompt):
            with self._crew.stream():
                asked = self._prompt(plan)
        elif isinstance(plan, Burst):
            with self._crew.stream():
                asked = self._launch_burst(plan)
        elif isinstance(plan, Bubble) and (self._row == 0 or self._bursting):
            asked = self._quiet()
        else:
            asked = self._launch(plan)  # its parts choose their streams
        self._asked.append(asked)
        self._number += 1

    @property
    def _tree(self) -> Crew | None:
        """What carries this answer's trees; None in a chain."""
        request = self._request
        return None if request is None else self._trees.get((request.width, request.depth))

    @property
    def _line(self) -> Crew:
        """The devices as this answer uses them."""
        return self._tree or self._crew

    @property
    def _bursting(self) -> bool:
        return self._request is not None and self._request.draft_length > 0

    @torch.inference_mode()
    def collect(self) -> TickResult:
        """The oldest tick, when the device has finished it."""
        asked = self._asked.popleft()
        if asked.fetched is None:
            return TickResult(self._host_clock(asked), self._arrivals(asked.number), asked.nodes)
        asked.fetched.synchronize()
        copies, row = asked.fetched.copies, asked.row % TICKS
        log = copies[0][1][row].tolist()
        stamps = [time for stamped, *_ in copies for time in stamped[row].tolist()]
        logits = list(asked.logits)
        if asked.burst:
            return self._follow_burst(asked, log, stamps, logits)
        entry = Entry.of(log, stamps) if self._tree is None else Level.of(log, stamps)
        assert entry.tick == asked.row, "the device's log is out of step"
        if isinstance(entry, Level):
            return self._follow_level(asked, entry, logits)
        return self._follow(asked, entry, logits)

    def close(self) -> None:
        """Let go of graphs and buffers."""
        for crew in (self._crew, *self._trees.values()):
            crew.forget()
        self._bursts.clear()
        self._trees.clear()

    # prompts

    def _prompt(self, plan: Prompt) -> _Asked:
        begin = perf_counter()
        if plan.request is not None:
            self._begin(plan.request)
        assert self._request is not None
        node, target = self._prefill.run(plan, self._request, self._serial)
        self._serial += 1
        self._due_back.append((self._number + self.stages, (target,)))
        return _Asked(self._number, None, 0, begin, (node,), perf_counter())

    def _begin(self, request: Request) -> None:
        """A new answer: nothing of the last one comes back."""
        alone = len(self._crew.members) == 1
        assert alone or not request.draft_length, "bursts run on one GPU"
        self._request = request
        shape = request.width, request.depth
        if request.width > 1 and shape not in self._trees:
            self._trees[shape] = self._crew.with_trees(*shape)
        kinds = [TickKind(tuple(range(self.stages)), drafts=True)]
        if not request.drafting:
            kinds = [TickKind((s,), drafts=False) for s in range(self.stages)]
        ticks = stretch_of(self._weight_bytes) if alone and not request.keep_logits else 1
        self._cycle = (*kinds,) * -(-ticks // len(kinds))
        self._unit = len(self._cycle) if alone else 1
        for member in self._crew.members:
            member.clock.again()
        self._row = 0
        self._due_back.clear()
        self._entries.clear()
        self._burst = None

    def _arrivals(self, number: int) -> tuple[Target, ...]:
        """What is due back by tick ``number``."""
        back: list[Target] = []
        while self._due_back and self._due_back[0][0] <= number:
            back.extend(self._due_back.popleft()[1])
        return tuple(back)

    def _quiet(self) -> _Asked:
        now = perf_counter()
        return _Asked(self._number, None, 0, now, (), perf_counter())

    # ticks

    def _launch(self, plan: Step | Bubble) -> _Asked:
        """One tick; every ``self._unit`` ticks a graph of them all is launched."""
        begin = perf_counter()
        request, crew, unit = self._request, self._line, self._unit
        assert request is not None
        at = self._row % len(self._cycle)
        drafts = 0 in self._cycle[at].active
        assert isinstance(plan, Step) == drafts, "plan and graph are out of step"
        if self._row == 0:
            for first in range(0, len(self._cycle), unit):
                self._prepare_stretch(self._cycle[first : first + unit])
            self._tell()
        if at % unit == 0:
            crew.replay(self._key(self._cycle[at : at + unit]))
            self._fetched = self._fetch(request)
        self._row += 1
        fetched, logits = self._fetched
        return _Asked(self._number, fetched, self._row, begin, logits=logits)

    def _prepare_stretch(self, kinds: tuple[TickKind, ...]) -> None:
        assert self._request is not None
        sampling = self._request.sampling
        self._prepare(kinds, partial(self._line.record, kinds=kinds, sampling=sampling))

    def _launch_burst(self, plan: Burst) -> _Asked:
        begin = perf_counter()
        request, crew = self._request, self._crew
        assert request is not None
        length = plan.draft_length
        if length not in self._bursts:
            self._bursts[length] = BurstPod(self._pod, length)
        pod = self._bursts[length]
        if self._row == 0:
            run = partial(pod.run, request.sampling)
            self._prepare(plan, partial(crew.record_alone, launches=run))
            self._tell()
        crew.replay(self._key(plan))
        kept = [pod.target_logits, pod.draft_logits] if request.keep_logits else []
        fetched = crew.fetch([[self._pod.board.stamps, pod.log, *kept]])
        self._row += 1
        logits = tuple(fetched.copies[0][2:])
        return _Asked(self._number, fetched, self._row, begin, burst=True, logits=logits)

    def _fetch(self, request: Request) -> tuple[Fetched, tuple[Tensor, ...]]:
        """Stamps and log after a tick, and the logits that are kept."""
        crew = self._line
        home, tail = crew.home.pod, crew.tail.pod
        wanted = [[member.pod.board.stamps] for member in crew.members]
        wanted[0].append(home.board.log)
        if request.keep_logits:
            assert tail.chooser is not None
            logits = tail.chooser.logits
            wanted[-1].append(logits[0] if request.width == 1 else logits)
            if request.drafting:
                assert not isinstance(home, TreeFollower)
                wanted[0].append(home.head_logits())
        fetched = crew.fetch(wanted)
        if not request.keep_logits:
            return fetched, ()
        first, last = fetched.copies[0], fetched.copies[-1]
        if not request.drafting:
            return fetched, (last[-1],)
        return fetched, (last[-2 if last is first else -1], first[-1])

    def _prepare(self, kind: Recorded, record: Callable[[tuple[object, ...]], None]) -> None:
        """Have the graph. Recording runs it once, so nothing may be in flight."""
        key = self._key(kind)
        if not self._line.knows(key):
            self._line.idle()
            record(key)

    def _tell(self) -> None:
        """Tell the devices what the answer is to be."""
        assert self._request is not None
        assert self._prefill.first is not None, "a step before the prompt's last chunk"
        token, position = self._prefill.first
        self._line.begin(self._request, position=position, token=token, serial=self._serial)

    def _key(self, kind: Recorded) -> tuple[object, ...]:
        assert self._request is not None
        sampling = self._request.sampling
        cut = (sampling.top_k, sampling.top_p, sampling.min_p) if is_cut(sampling) else ()
        request = self._request
        return (kind, request.width, request.depth, sampling.temperature > 0, *cut)

    # results

    def _follow(self, asked: _Asked, entry: Entry, logits: list[Tensor]) -> TickResult:
        self._entries[entry.tick] = entry
        self._entries.pop(entry.tick - self.stages - 2, None)
        clock = self._clock_of(asked, entry)
        targets = self._arrivals(asked.number)
        late, new = self._pod.late, logits[0] if logits else None
        if late:
            self._kept = new  # of the node that arrives at this tick
        if entry.arrived:
            targets = (*targets, self._target(entry))
        if not late:
            self._kept = new  # at the next one
        if not entry.entered:
            return TickResult(clock, targets, ())
        if entry.token < 0:
            raise StageError(f"stage 0: draft logits are not numbers at {entry.position}")
        node = Node(
            entry.entered_serial,
            entry.position,
            entry.token,
            1,
            drafted=bool(entry.drafted),
            final=True,
        )
        self._serial = entry.entered_serial + 1
        kept = (logits[1],) if len(logits) > 1 and entry.drafted else ()
        return TickResult(clock, targets, (node,), kept)

    def _follow_level(self, asked: _Asked, level: Level, logits: list[Tensor]) -> TickResult:
        """What of a tree left the last stage in this tick, and what entered."""
        self._entries[level.tick] = level
        self._entries.pop(level.tick - self.stages - 2, None)
        before = self._entries.get(level.tick - self.stages)
        targets = self._arrivals(asked.number)
        if isinstance(before, Level) and before.nodes:
            spans = self._spans(before.tick)
            targets = (*targets, *level.answers(before.nodes, spans, self._kept))
        self._kept = logits[0] if logits else None  # of the level that arrives at the next tick
        if level.nodes:
            self._serial = level.nodes[-1].serial + 1
        drafts = level.draft_logits(logits[1] if logits else None)
        return TickResult(self._clock_of(asked, level), targets, level.nodes, drafts)

    def _clock_of(self, asked: _Asked, entry: Entry | Level) -> Ticked:
        times = self._clock
        begin = times.host(entry.boundary_time, asked.begin)
        drafting = self._request is not None and self._request.drafting
        drafted = times.host(entry.entry_time, asked.begin) if drafting else begin
        end = times.host(entry.stage_times[0], perf_counter())
        return Ticked(asked.number, begin, begin, drafted, max(end, drafted))

    def _follow_burst(
        self, asked: _Asked, log: list[list[int]], stamps: list[int], logits: list[Tensor]
    ) -> TickResult:
        """Its rows entered in this tick; what the model says of them arrives n ticks later."""
        assert log[0][0] == asked.row, "the device's log is out of step"
        record = BurstRecord.of(log, stamps, self._clock)
        targets, drafts = logits or (None, None)
        back = self._arrivals(asked.number)
        if record.rows:
            self._serial = record.rows[-1].serial + 1
            self._due_back.append((asked.number + self.stages, record.targets(targets)))
        self._burst = (asked.number, record)
        clock = record.clock(asked.number, asked.begin, perf_counter())
        return TickResult(clock, back, record.nodes, record.guesses(drafts))

    def _host_clock(self, asked: _Asked) -> Ticked:
        """Times of a tick without a launch: of a prompt chunk, or while a burst is verified."""
        if self._burst is not None:
            number, record = self._burst
            clock = record.bubble(asked.number, asked.number - number)
            if clock is not None:
                return clock
        return Ticked(asked.number, asked.begin, asked.begin, asked.begin, asked.end)

    def _target(self, entry: Entry) -> Target:
        if entry.target < 0:
            raise StageError(not_numbers("logits are not numbers (NaN)", None))
        fed = entry.tick - self.stages
        return Target(entry.serial, entry.target, self._spans(fed), self._kept)

    def _spans(self, fed: int) -> tuple[Span, ...]:
        """When each stage worked on the node that entered in tick ``fed`` of the device."""
        spans = []
        for s in range(self.stages):
            entry = self._entries.get(fed + s)
            if entry is None or not entry.stage_times[s]:
                return ()
            since = entry.boundary_time if s else entry.entry_time
            begin = self._clock.host(since, 0.0)
            end = self._clocks[s].host(entry.stage_times[s], begin)
            spans.append(Span(s, begin, max(begin, end)))
        return tuple(spans)
