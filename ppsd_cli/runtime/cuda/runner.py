"""The graph runner: answers plans with one graph launch a tick, some ticks ahead of the host.

Prompts run as graphs too (``prompts.py``); from the first token on the device decides
by itself (``control.py``) and the host follows what it logs.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
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
from ppsd_cli.errors import ConfigError, StageError
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.board import Entry
from ppsd_cli.runtime.cuda.burst_log import BurstRecord
from ppsd_cli.runtime.cuda.bursts import MOST_GUESSES, BurstPod
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.lanes import is_cut
from ppsd_cli.runtime.cuda.prefill import Prefill, not_numbers
from ppsd_cli.runtime.cuda.prompts import PromptLane
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Ready, Recorder
from ppsd_cli.runtime.cuda.ticks import Pod, TickKind
from ppsd_cli.runtime.cuda.tiles import stretch_of

_LOOKAHEAD = 3
Recorded = tuple[TickKind, ...] | Burst
"""What a graph holds: a stretch of ticks, or a burst."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A tick that was launched (``row``: its number on the device) or that only the host knows.

    ``burst``: what was launched is a whole burst.
    """

    number: int
    ready: Ready | None
    copies: list[Tensor]
    row: int
    begin: float
    nodes: tuple[Node, ...] = ()
    end: float = 0.0
    burst: bool = False


class GraphRunner:
    """Stages on one device behind the ``Runner`` protocol."""

    def __init__(
        self,
        stages: list[Stage],
        head: DraftHead | None,
        pod: Pod,
        recorder: Recorder | Immediate,
        clock: DeviceClock,
        *,
        chunk: int,
    ) -> None:
        """``chunk``: prompt tokens of a plan, at most."""
        self.stage_list, self._head, self._pod = stages, head, pod
        self._recorder, self._clock = recorder, clock
        self._graphs: dict[tuple[object, ...], Playable] = {}
        self._asked: deque[_Asked] = deque()
        self._request: Request | None = None
        self._stretch: tuple[TickKind, ...] = ()
        self._fetched: tuple[list[Tensor], Ready]
        self._number = 0
        self._serial = 0
        self._row = 0
        self._entries: dict[int, Entry] = {}
        output = stages[-1].output
        assert output is not None
        self._prefill = Prefill(PromptLane(stages, recorder, chunk=chunk), output, head)
        self._bursts: dict[int, BurstPod] = {}
        self._burst: tuple[int, BurstRecord] | None = None
        self._due_back: deque[tuple[int, tuple[Target, ...]]] = deque()
        self._kept: Tensor | None = None
        self._fork = recorder.fork
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
        return self.stages if self._bursting else max(_LOOKAHEAD, 2 * len(self._stretch) - 1)

    @property
    def pending(self) -> int:
        """Plans submitted and not yet collected."""
        return len(self._asked)

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        """Launch one tick; for a prompt chunk, run it through all stages.

        ConfigError for bursts longer than the kernels serve.
        """
        with self._recorder.stream():
            if isinstance(plan, Prompt):
                asked = self._prompt(plan)
            elif isinstance(plan, Burst):
                asked = self._launch_burst(plan)
            elif isinstance(plan, Bubble) and (self._row == 0 or self._bursting):
                asked = self._quiet()
            else:
                asked = self._launch(plan)
        self._asked.append(asked)
        self._number += 1

    @property
    def _bursting(self) -> bool:
        return self._request is not None and self._request.draft_length > 0

    @torch.inference_mode()
    def collect(self) -> TickResult:
        """The oldest tick, when the device has finished it."""
        asked = self._asked.popleft()
        if asked.ready is None:
            return TickResult(self._host_clock(asked), self._arrivals(asked.number), asked.nodes)
        asked.ready.synchronize()
        log, stamps, *logits = asked.copies
        row = asked.row % TICKS
        if asked.burst:
            return self._follow_burst(asked, log[row].tolist(), stamps[row].tolist(), logits)
        entry = Entry.of(log[row].tolist(), stamps[row].tolist())
        assert entry.tick == asked.row, "the device's log is out of step"
        return self._follow(asked, entry, logits)

    def close(self) -> None:
        """Let go of graphs and buffers."""
        self._graphs.clear()
        self._bursts.clear()

    # prompts

    def _prompt(self, plan: Prompt) -> _Asked:
        begin = perf_counter()
        if plan.request is not None:
            self._begin(plan.request)
        assert self._request is not None
        node, target = self._prefill.run(plan, self._request, self._serial)
        self._serial += 1
        self._due_back.append((self._number + self.stages, (target,)))
        return _Asked(self._number, None, [], 0, begin, (node,), perf_counter())

    def _begin(self, request: Request) -> None:
        """A new answer: nothing of the last one comes back."""
        if request.draft_length > MOST_GUESSES:
            raise ConfigError(
                f"--draft-length {request.draft_length}: on a GPU one burst verifies at most "
                f"{MOST_GUESSES} guesses; choose 1 to {MOST_GUESSES}"
            )
        self._request = request
        kinds = [TickKind(tuple(range(self.stages)), drafts=True)]
        if not request.drafting:
            kinds = [TickKind((s,), drafts=False) for s in range(self.stages)]
        ticks = 1 if request.keep_logits else stretch_of(self._weight_bytes)
        self._stretch = (*kinds,) * -(-ticks // len(kinds))
        self._clock.again()
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
        return _Asked(self._number, None, [], 0, now, (), perf_counter())

    # ticks

    def _launch(self, plan: Step | Bubble) -> _Asked:
        """One tick; every ``len(self._stretch)`` ticks a graph of them all is launched."""
        begin = perf_counter()
        request, board, kinds = self._request, self._pod.board, self._stretch
        assert request is not None
        at = self._row % len(kinds)
        assert isinstance(plan, Step) == (0 in kinds[at].active), "plan and graph are out of step"
        if at == 0:
            self._record(kinds, lambda: self._pod.stretch(kinds, request.sampling, self._fork))
            self._replay(kinds)
            kept: list[Tensor] = []
            if request.keep_logits:
                assert self._pod.chooser is not None
                kept.append(self._pod.chooser.logits[0])
                if request.drafting:
                    kept.append(self._pod.head_logits())
            self._fetched = self._recorder.fetch([board.log, board.stamps, *kept])
        self._row += 1
        copies, ready = self._fetched
        return _Asked(self._number, ready, copies, self._row, begin)

    def _launch_burst(self, plan: Burst) -> _Asked:
        begin = perf_counter()
        request = self._request
        assert request is not None
        length = plan.draft_length
        if length not in self._bursts:
            self._bursts[length] = BurstPod(self._pod, length)
        pod = self._bursts[length]
        self._record(plan, lambda: pod.run(request.sampling))
        self._replay(plan)
        kept = [pod.target_logits, pod.draft_logits] if request.keep_logits else []
        copies, ready = self._recorder.fetch([pod.log, self._pod.board.stamps, *kept])
        self._row += 1
        return _Asked(self._number, ready, copies, self._row, begin, burst=True)

    def _record(self, kind: Recorded, launches: Callable[[], None]) -> None:
        """Have a graph of these launches for the request's sampling, while nothing is in flight."""
        key = self._key(kind)
        if key in self._graphs:
            return
        if self._row > 0:  # recording runs the tick once: not in the middle of an answer
            raise AssertionError("a graph is missing in the middle of an answer")
        self._pod.board.idle()
        self._graphs[key] = self._recorder.record(launches)

    def _key(self, kind: Recorded) -> tuple[object, ...]:
        assert self._request is not None
        sampling = self._request.sampling
        cut = (sampling.top_k, sampling.top_p, sampling.min_p) if is_cut(sampling) else ()
        return (kind, sampling.temperature > 0, *cut)

    def _replay(self, kind: Recorded) -> None:
        """Launch; the first time in an answer, tell the device what the answer is to be."""
        graph = self._graphs[self._key(kind)]
        if self._row == 0:
            assert self._request is not None
            assert self._prefill.first is not None, "a step before the prompt's last chunk"
            token, position = self._prefill.first
            self._pod.board.begin(
                self._request, position=position, token=token, serial=self._serial
            )
            if self._pod.head is not None:
                self._pod.head.adopt()
        graph.replay()

    # results

    def _follow(self, asked: _Asked, entry: Entry, logits: list[Tensor]) -> TickResult:
        self._entries[entry.tick] = entry
        self._entries.pop(entry.tick - self.stages - 2, None)
        times = self._clock
        begin = times.host(entry.boundary_time, asked.begin)
        drafted = times.host(entry.entry_time, asked.begin)
        end = times.host(entry.stage_times[0], perf_counter())
        clock = Ticked(asked.number, begin, begin, drafted, max(end, drafted))
        targets = self._arrivals(asked.number)
        if entry.arrived:
            targets = (*targets, self._target(entry))
        self._kept = logits[0] if logits else None  # of the node that arrives at the next tick
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
            spans.append(Span(s, begin, max(begin, self._clock.host(entry.stage_times[s], begin))))
        return tuple(spans)
