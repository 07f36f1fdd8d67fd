"""State of the timeline: answer, grid and figures, kept from events and drawn as Rich text."""

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from ppsd_cli.core.events import Committed, Event
from ppsd_cli.core.stats import StatsBuilder
from ppsd_cli.ui.answer import AnswerLines
from ppsd_cli.ui.grid import ASCII, UNICODE, Grid
from ppsd_cli.ui.summary import footer, legend

Layers = tuple[tuple[int, int], ...]
"""``(first, end)`` of each stage, ``end`` excluded."""


class Timeline:
    """What a person sees of one run, apart from how it gets onto the screen.

    ``clock`` gives seconds; it is read at commits only. ``drafting`` says that the decoder guesses
    at all, so that plain decoding does not mark every token as not drafted. ``width``: guesses per
    tick, of which the grid shows each where there are several.
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
        self._drafting = drafting
        self._glyphs = ASCII if console.options.ascii_only else UNICODE
        self._answer = AnswerLines(lambda: console.width, self._glyphs, drafting=drafting)
        self._grid = Grid(layers, width=width)
        self._stats = StatsBuilder(len(layers))
        self._first_commit: float | None = None
        self._last_commit = 0.0

    def add(self, event: Event, text: str | None = None) -> list[Text]:
        """Take an event and the text that it made certain; return the finished lines."""
        self._grid.add(event)
        self._stats.add(event)
        outcome = None
        if isinstance(event, Committed):
            outcome = event.outcome
            self._last_commit = self._clock()
            if self._first_commit is None:
                self._first_commit = self._last_commit
        if text is None and outcome is None:
            return []
        return self._answer.add(self._encodable(text or ""), outcome)

    def frame(self) -> list[Text]:
        """Lines of the moment: the unfinished line, the grid, the footer."""
        width = self._console.width
        rows = self._grid.rows(width, self._glyphs)
        busy = self._grid.busy_share(width)
        figures = footer(
            self._stats.progress(), tokens_per_second=self._rate(), busy=busy, width=width
        )
        return [self._answer.tail, Text(""), *rows, figures]

    def final(self) -> list[Text]:
        """Lines that stay: as ``frame``, with the figures of the whole run and the legend."""
        width = self._console.width
        stats = self._stats.snapshot()
        figures = footer(
            stats, tokens_per_second=self._rate(), busy=stats.stage_busy_fraction, width=width
        )
        rows = self._grid.rows(width, self._glyphs)
        closing = legend(self._glyphs, width=width, drafting=self._drafting)
        return [self._answer.tail, Text(""), *rows, figures, *closing]

    def _rate(self) -> float | None:
        """Tokens per second since the first token."""
        seconds = self._last_commit - (self._first_commit or 0.0)
        tokens = self._stats.progress().tokens - 1
        return tokens / seconds if self._first_commit is not None and seconds > 0 else None

    def _encodable(self, text: str) -> str:
        """Make what the terminal's encoding lacks visible as escapes."""
        encoding = self._console.encoding
        return escape_unencodable(text, encoding)


def escape_unencodable(text: str, encoding: str) -> str:
    r"""Return ``text`` with characters that ``encoding`` lacks as escapes such as ``\u4e2d``."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
