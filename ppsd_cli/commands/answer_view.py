"""Where an answer is shown while it is made: plain text on stdout, the timeline, or nowhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, Protocol

from rich.console import Console

from ppsd_cli.commands.answer_options import AnswerOptions
from ppsd_cli.commands.session import Plan
from ppsd_cli.core.events import Event
from ppsd_cli.ui.live import LiveView, PlainLines
from ppsd_cli.ui.text import escape_controls


class View(Protocol):
    """Something that shows events and the text that they made certain."""

    def handle(self, event: Event, text: str | None = None) -> None:
        """Take one event."""


class PlainView:
    """The answer as plain text on stdout, and nothing else."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def handle(self, event: Event, text: str | None = None) -> None:
        """Write the text."""
        del event
        if text:
            self._write(text)


@contextlib.contextmanager
def answer_view(plan: Plan, options: AnswerOptions) -> Iterator[View]:
    """The view that flags and streams ask for."""
    terminal = sys.stdout.isatty()
    drawn = options.timeline if options.timeline is not None else terminal and not options.quiet
    if options.json or options.output is not None:
        drawn = bool(options.timeline)
        terminal = False
    parts = [plan.config.part(s) for s in range(plan.config.stages)]
    layers = tuple((part.first, part.last) for part in parts)
    shown: dict[str, Any] = {
        "layers": layers,
        "drafting": plan.decoder != "ar",
        "width": plan.config.width,
    }
    if drawn and terminal:
        with LiveView(Console(), clock=perf_counter, **shown) as live:
            yield live
        return
    plain = PlainView(_writer(options, terminal=terminal))
    if drawn:
        console = Console(stderr=True)
        with PlainLines(console, clock=perf_counter, **shown) as lines:
            yield _Both(plain, lines)
    else:
        yield plain
    if not options.json and options.output is None:
        _writer(options, terminal=terminal)("\n")


class _Both:
    """Two views at once."""

    def __init__(self, *views: View) -> None:
        self._views = views

    def handle(self, event: Event, text: str | None = None) -> None:
        """Take one event to each."""
        for view in self._views:
            view.handle(event, text)


def _writer(options: AnswerOptions, *, terminal: bool) -> Callable[[str], None]:
    """How text gets to stdout; nowhere where a file or JSON takes it."""
    if options.json or options.output is not None:
        return lambda _: None
    escape = escape_controls if terminal and not options.raw else str

    def write(text: str) -> None:
        sys.stdout.write(escape(text))
        sys.stdout.flush()

    return write
