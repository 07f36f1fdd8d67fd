"""The graph runner: answers plans with one graph launch a tick, some ticks ahead of the host.

Prompts run eagerly through the same weights and caches; from the first token on the device decides
by itself (``control.py``) and the host follows what it logs.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from ppsd_cli.core.choose import choose
from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import Bubble, Node, Plan, Prompt, Request, Sampling, Step, Target, TickResult
from ppsd_cli.errors import ConfigError, StageError
from ppsd_cli.model.cache import Rows
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Stage
from ppsd_cli.runtime.cuda.board import Entry
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.control import TICKS
from ppsd_cli.runtime.cuda.lanes import is_cut
from ppsd_cli.runtime.cuda.recorder import Immediate, Playable, Ready, Recorder
from ppsd_cli.runtime.cuda.ticks import Pod, TickKind

_LOOKAHEAD = 3


@dataclass(frozen=True, slots=True)
class _Asked:
    """A tick that was launched (``row``: its number on the device) or that only the host knows."""

    number: int
    ready: Ready | None
    copies: list[Tensor]
    row: int
    begin: float
    nodes: tuple[Node, ...] = ()
    targets: tuple[Target, ...] = ()
    end: float = 0.0


class GraphRunner:
    """Stages on one device behind the ``Runner`` protocol."""

    def __init__(
        self,
        stages: list[Stage],
        head: DraftHead | None,
        pod: Pod,
        recorder: Recorder | Immediate,
        clock: DeviceClock,
    ) -> None:
        self.stage_list, self._head, self._pod = stages, head, pod
        self._recorder, self._clock = recorder, clock
        self._graphs: dict[tuple[object, ...], Playable] = {}
        self._asked: deque[_Asked] = deque()
        self._request: Request | None = None
        self._number = 0
        self._serial = 0
        self._row = 0
        self._phase = 0
        self._entries: dict[int, Entry] = {}
        self._first: tuple[Tensor, int] | None = None
        self._due_back: deque[tuple[int, Target]] = deque()
        self._kept: Tensor | None = None

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.stage_list)

    @property
    def lookahead(self) -> int:
        """Ticks that run ahead of the host; none where every tick's logits are wanted."""
        keeps = self._request is not None and self._request.keep_logits
        return 0 if keeps else _LOOKAHEAD

    @property
    def pending(self) -> int:
        """Plans submitted and not yet collected."""
        return len(self._asked)

    @torch.inference_mode()
    def submit(self, plan: Plan) -> None:
        """Launch one tick; for a prompt chunk, run it through all stages.

        ConfigError for EESD, whose bursts this runner does not know.
        """
        if isinstance(plan, Prompt) and plan.request is not None and plan.request.draft_length:
            raise ConfigError("EESD does not run on the CUDA engine yet; use --devices cpu")
        with self._recorder.stream():
            if isinstance(plan, Prompt):
                self._asked.append(self._prompt(plan))
            elif self._row == 0 and isinstance(plan, Bubble):
                self._asked.append(self._quiet())
            else:
                assert isinstance(plan, Step | Bubble)
                self._asked.append(self._launch(plan))
        self._number += 1

    @torch.inference_mode()
    def collect(self) -> TickResult:
        """The oldest tick, when the device has finished it."""
        asked = self._asked.popleft()
        if asked.ready is None:
            clock = Ticked(asked.number, asked.begin, asked.begin, asked.begin, asked.end)
            return TickResult(clock, asked.targets, asked.nodes)
        asked.ready.synchronize()
        log, stamps, *logits = asked.copies
        entry = Entry.of(log.tolist(), stamps.tolist())
        assert entry.tick == asked.row, "the device's log is out of step"
        return self._follow(asked, entry, logits)

    def close(self) -> None:
        """Let go of graphs and buffers."""
        self._graphs.clear()

    # prompts

    def _prompt(self, plan: Prompt) -> _Asked:
        begin = perf_counter()
        if plan.request is not None:
            self._request = plan.request
            self._row = 0
            self._phase = 0
            self._due_back.clear()
            self._entries.clear()
        count = len(plan.token_ids)
        node = Node(self._serial, plan.start, None, count, drafted=False, final=plan.last)
        self._serial += 1
        first = self.stage_list[0]
        hidden = first.embed(torch.tensor(plan.token_ids, device=first.device))
        spans: list[Span] = []
        for index, stage in enumerate(self.stage_list):
            since = perf_counter()
            hidden, taps = stage.forward(hidden, Rows.chain(plan.start, count, stage.device))
            for depth, states in taps.items():
                if self._head is not None:
                    self._head.observe(depth, plan.start, states)
            spans.append(Span(index, since, perf_counter()))
        if self._head is not None:
            self._head.prefill(plan.start, count)
        target = self._first_target(node, hidden[-1:], tuple(spans))
        self._due_back.append((self._number + self.stages, target))
        back = self._arrivals()
        return _Asked(self._number, None, [], 0, begin, (node,), back, perf_counter())

    def _first_target(self, node: Node, hidden: Tensor, spans: tuple[Span, ...]) -> Target:
        if not node.final:
            return Target(node.serial, None, spans)
        output, request = self.stage_list[-1].output, self._request
        assert output is not None
        assert request is not None
        position = node.position + node.tokens
        logits = output.logits(hidden)
        try:
            token = choose(
                logits, request.sampling, torch.tensor([position], device=logits.device)
            )
        except ValueError as error:
            raise StageError(_not_numbers(str(error), position)) from error
        self._first = (token, position)
        kept = logits[0].float().cpu() if request.keep_logits else None
        return Target(node.serial, int(token[0]), spans, kept)

    def _arrivals(self) -> tuple[Target, ...]:
        back = []
        while self._due_back and self._due_back[0][0] <= self._number:
            back.append(self._due_back.popleft()[1])
        return tuple(back)

    def _quiet(self) -> _Asked:
        now = perf_counter()
        back = self._arrivals()
        return _Asked(self._number, None, [], 0, now, (), back, perf_counter())

    # ticks

    def _launch(self, plan: Step | Bubble) -> _Asked:
        begin = perf_counter()
        request, board = self._request, self._pod.board
        assert request is not None
        back: tuple[Target, ...] = ()
        self._phase = 0 if isinstance(plan, Step) else self._phase + 1
        graph = self._graph(request)
        if self._row == 0:
            assert self._first is not None, "a step before the prompt's last chunk"
            token, position = self._first
            board.begin(request, position=position, token=token, serial=self._serial)
            if self._pod.head is not None:
                self._pod.head.adopt()
            back = self._arrivals()
        graph.replay()
        self._row += 1
        at = self._row % TICKS
        wanted = [board.log[at], board.stamps[at]]
        if request.keep_logits:
            assert self._pod.chooser is not None
            wanted.append(self._pod.chooser.logits[0])
            if request.drafting:
                wanted.append(self._pod.head_logits())
        copies, ready = self._recorder.fetch(wanted)
        return _Asked(self._number, ready, copies, self._row, begin, (), back)

    def _graph(self, request: Request) -> Playable:
        if request.drafting:
            kind = TickKind(tuple(range(self.stages)), drafts=True)
        else:
            kind = TickKind((self._phase % self.stages,), drafts=False)
        sampling = request.sampling
        key: tuple[object, ...] = (kind, sampling.temperature > 0)
        if is_cut(sampling):
            key += (sampling.top_k, sampling.top_p, sampling.min_p)
        if key not in self._graphs:
            if self._row > 0:  # recording runs the tick once: not in the middle of an answer
                raise AssertionError("a graph is missing in the middle of an answer")
            self._record_all(request)
        return self._graphs[key]

    def _record_all(self, request: Request) -> None:
        """Record every kind of tick that this request may need, while nothing is in flight."""
        sampling = request.sampling
        kinds = [TickKind(tuple(range(self.stages)), drafts=True)]
        if not request.drafting:
            kinds = [TickKind((s,), drafts=False) for s in range(self.stages)]
        cut = (sampling.top_k, sampling.top_p, sampling.min_p) if is_cut(sampling) else ()
        self._pod.board.idle()
        for kind in kinds:
            key = (kind, sampling.temperature > 0, *cut)
            self._graphs[key] = self._recorder.record(self._tick(kind, sampling))

    def _tick(self, kind: TickKind, sampling: Sampling) -> Callable[[], None]:
        return lambda: self._pod.tick(kind, sampling, self._recorder.fork)

    # results

    def _follow(self, asked: _Asked, entry: Entry, logits: list[Tensor]) -> TickResult:
        self._entries[entry.tick] = entry
        self._entries.pop(entry.tick - self.stages - 2, None)
        times = self._clock
        begin = times.host(entry.boundary_time, asked.begin)
        drafted = times.host(entry.entry_time, asked.begin)
        end = times.host(entry.stage_times[0], perf_counter())
        clock = Ticked(asked.number, begin, begin, drafted, max(end, drafted))
        targets = asked.targets
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

    def _target(self, entry: Entry) -> Target:
        if entry.target < 0:
            raise StageError(_not_numbers("logits are not numbers (NaN)", None))
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


def _not_numbers(what: str, position: int | None) -> str:
    where = "" if position is None else f" at position {position}"
    return f"{what}{where}; the weights or the number format (--dtype float32) are at fault"
