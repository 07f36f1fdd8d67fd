"""A burst as the host sees it, from the device's log.

Shapes: R rows of a burst, V columns, V' draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ppsd_cli.core.events import Span, Ticked
from ppsd_cli.core.plan import Node, Target
from ppsd_cli.errors import StageError
from ppsd_cli.runtime.cuda.burst_control import ROW_FIELDS
from ppsd_cli.runtime.cuda.clock import DeviceClock
from ppsd_cli.runtime.cuda.prefill import not_numbers


@dataclass(frozen=True, slots=True)
class Row:
    """What the host knows of one row; fields of ``burst_control``, times in device nanoseconds."""

    tick: int
    entered: int
    serial: int
    position: int
    token: int
    target: int
    begin_time: int
    entry_time: int
    done_time: int


@dataclass(frozen=True, slots=True)
class BurstRecord:
    """One finished burst: the rows that entered, and when which stage was done (host seconds).

    ``times``: begin of the burst, then the end of each stage; empty without a device clock.
    ``draft_seconds``: spent on guesses, between the rows' turns in stage 0.
    """

    rows: tuple[Row, ...]
    times: tuple[float, ...]
    draft_seconds: float

    @classmethod
    def of(
        cls, log: Sequence[Sequence[int]], stamps: Sequence[int], clock: DeviceClock
    ) -> "BurstRecord":
        """From the device's log of a burst [R, fields] and its row of stamps [n].

        StageError where the head or the full model made no numbers.
        """
        rows = [Row(**dict(zip(ROW_FIELDS, row, strict=True))) for row in log]
        fed = tuple(row for row in rows if row.entered)
        for row in fed:
            if row.token < 0:
                raise StageError(f"stage 0: draft logits are not numbers at {row.position}")
            if row.target < 0:
                what = "logits are not numbers (NaN)"
                raise StageError(not_numbers(what, row.position + 1))
        began = rows[0].begin_time
        if not began:
            return cls(fed, (), 0.0)
        times = tuple(clock.host(t, 0.0) for t in (began, *stamps))
        turns = zip(rows, rows[1:], strict=False)
        return cls(fed, times, sum(b.entry_time - a.done_time for a, b in turns) * 1e-9)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What entered: the due token, then guesses."""
        return tuple(
            Node(row.serial, row.position, row.token, 1, drafted=index > 0, final=True)
            for index, row in enumerate(self.rows)
        )

    def targets(self, logits: Tensor | None) -> tuple[Target, ...]:
        """The full model's answers; ``logits`` [R, V] where they are kept."""
        ends = zip(self.times, self.times[1:], strict=False)
        spans = tuple(Span(s, begin, max(begin, end)) for s, (begin, end) in enumerate(ends))
        return tuple(
            Target(row.serial, row.target, spans, None if logits is None else logits[index])
            for index, row in enumerate(self.rows)
        )

    def guesses(self, logits: Tensor | None) -> tuple[Tensor, ...]:
        """Draft logits of the guesses that entered, of ``logits`` [R - 1, V'] where kept."""
        return () if logits is None else tuple(logits[: max(len(self.rows) - 1, 0)])

    def clock(self, number: int, asked: float, now: float) -> Ticked:
        """Tick ``number``, in which the burst went through stage 0; ``asked`` and ``now`` are the
        host's times where the device keeps none.
        """
        if not self.times:
            return Ticked(number, asked, asked, asked, now)
        begin, end = self.times[0], max(self.times[:2])
        return Ticked(number, begin, begin, min(begin + self.draft_seconds, end), end)

    def bubble(self, number: int, stage: int) -> Ticked | None:
        """Tick ``number``, in which the burst was in ``stage`` and stage 0 waited."""
        if not 0 < stage < len(self.times) - 1:
            return None
        begin, end = self.times[stage], max(self.times[stage : stage + 2])
        return Ticked(number, begin, end, end, end)
