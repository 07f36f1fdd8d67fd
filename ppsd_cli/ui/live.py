"""Timeline on a screen: redrawn in place on a terminal, finished lines elsewhere.

Both views are context managers with ``handle(event, text)``; ``text`` is what the event made
certain (from ``TextStream.push`` or ``finish``), or None.
"""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ppsd_cli.core.events import Event
from ppsd_cli.ui.timeline import Layers, Timeline

_REFRESH_SECONDS = 1 / 8


class LiveView:
    """Live view of one run on a terminal.

    Finished lines of the answer are printed for good; below them the unfinished line, the grid and
    the footer are redrawn eight times a second, in the caller's thread, because a drawing thread
    would take time from the model. On leaving, also by an exception, all that was committed stays.
    """

    def __init__(
        self,
        console: Console,
        *,
        layers: Layers,
        clock: Callable[[], float],
        drafting: bool = True,
        width: int = 1,
    ) -> None:
        self._console = console
        self._clock = clock
        self._timeline = Timeline(
            console, layers=layers, clock=clock, drafting=drafting, width=width
        )
        self._drawn = float("-inf")
        self._live = Live(
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.update(Group(*self._timeline.final()))
        self._live.stop()

    def handle(self, event: Event, text: str | None = None) -> None:
        """Take an event and the text that it made certain; draw when it is time to."""
        finished = self._timeline.add(event, text)
        now = self._clock()
        due = now - self._drawn >= _REFRESH_SECONDS
        if not finished and not due:
            return
        self._live.update(Group(*self._timeline.frame()))
        self._drawn = now
        if finished:
            _print_lines(self._console, finished)  # draws the live region too
        else:
            self._live.refresh()


class PlainLines:
    """Timeline for a log: finished lines of the answer as they come, the rest at the end."""

    def __init__(
        self,
        console: Console,
        *,
        layers: Layers,
        clock: Callable[[], float],
        drafting: bool = True,
        width: int = 1,
    ) -> None:
        self._console = console
        self._timeline = Timeline(
            console, layers=layers, clock=clock, drafting=drafting, width=width
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _print_lines(self._console, self._timeline.final())

    def handle(self, event: Event, text: str | None = None) -> None:
        """Take an event and the text that it made certain; print the lines this finished."""
        _print_lines(self._console, self._timeline.add(event, text))


def _print_lines(console: Console, lines: list[Text]) -> None:
    if lines:
        console.print(Group(*lines))
