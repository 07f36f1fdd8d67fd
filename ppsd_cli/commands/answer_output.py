"""What one run gave, and its way to stdout and files."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ppsd_cli.commands.answer_options import AnswerOptions
from ppsd_cli.commands.answer_view import View, answer_view
from ppsd_cli.commands.report import answer_report
from ppsd_cli.commands.session import Plan
from ppsd_cli.commands.signals import Interrupted
from ppsd_cli.core.events import FinishReason
from ppsd_cli.core.stats import StatsBuilder
from ppsd_cli.errors import PpsdError, StageError
from ppsd_cli.files import replace_bytes
from ppsd_cli.runtime.store_watch import leave
from ppsd_cli.ui.summary import final_line
from ppsd_cli.ui.trace import TraceWriter


@dataclass(slots=True)
class Answer:
    """What one run gave; times in seconds of the monotonic clock."""

    prompt_tokens: int
    stats: StatsBuilder
    trace: TraceWriter | None = None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    reason: FinishReason = FinishReason.FAILED
    began: float = 0.0
    first: float | None = None
    last: float | None = None
    error: PpsdError | None = None
    signal: Interrupted | None = None

    def stamp(self, seconds: float) -> None:
        """A token was final at this time: the boundary at which its target arrived."""
        self.last = seconds
        self.first = self.first or seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed: tokens after the first, over the time since it."""
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return (len(self.token_ids) - 1) / (self.last - self.first)


class AnswerOutput:
    """Shows an answer and writes its trace, file, JSON and closing line, once.

    That is the main thread's work. Only where a rank of ``torchrun`` freezes, another thread does
    it (``frozen``), because nothing wakes the main thread from its receive.
    """

    def __init__(self, plan: Plan, options: AnswerOptions, say: Callable[[str], None]) -> None:
        self._plan, self._options, self._say = plan, options, say
        self._answer: Answer | None = None
        self._shown = contextlib.ExitStack()
        self._turn, self._written = threading.Lock(), False

    @contextlib.contextmanager
    def showing(self, answer: Answer) -> Iterator[View]:
        """The view of an answer that begins."""
        with self._shown:
            self._answer = answer
            yield self._shown.enter_context(answer_view(self._plan, self._options))

    def write(self, answer: Answer) -> None:
        """All that is left of an answer when it has ended, however it did."""
        with self._turn:
            self._written = True
            self._write(answer)

    def frozen(self, message: str) -> None:
        """In place of the main thread: write what there is of the answer, and end the process."""
        with self._turn:
            if self._written:
                return
            self._written = True
            try:
                if self._answer is not None:
                    self._answer.error = StageError(message)
                    self._shown.close()
                    self._write(self._answer)
            finally:
                leave(message)

    def _write(self, answer: Answer) -> None:
        options, text = self._options, "".join(answer.text)
        if answer.trace is not None and options.trace is not None:
            answer.trace.write(options.trace)
        if options.output is not None:
            replace_bytes(options.output, text.encode())
        stats = answer.stats.snapshot()
        if options.json:
            report = answer_report(answer, stats, self._plan, text, seed=options.seed)
            sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        elif answer.error is None:
            speed, width = answer.tokens_per_second, self._plan.config.width
            decoder = self._plan.decoder
            self._say(final_line(stats, decoder=decoder, tokens_per_second=speed, width=width))
