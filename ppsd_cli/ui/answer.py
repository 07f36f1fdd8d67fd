"""The answer as lines for a terminal, each token marked by how it came about."""

from collections.abc import Callable
from itertools import groupby

from rich.cells import cell_len
from rich.text import Text

from ppsd_cli.core.events import Outcome
from ppsd_cli.ui.grid import Glyphs
from ppsd_cli.ui.text import escape_controls

STYLES = {Outcome.ACCEPTED: "green", Outcome.CORRECTED: "bold red", Outcome.UNDRAFTED: ""}
_SEVERITY = [Outcome.ACCEPTED, Outcome.UNDRAFTED, Outcome.CORRECTED]
_TAB = "    "


class AnswerLines:
    """Breaks text into lines of ``width()`` columns as it arrives; a finished line stays as it is.

    A token that was not accepted has its glyph before its first visible character, so outcomes
    can be told without colour. With ``drafting`` false nothing is marked: there were no guesses.
    """

    def __init__(self, width: Callable[[], int], glyphs: Glyphs, *, drafting: bool = True) -> None:
        self._width = width
        self._marks = {
            Outcome.CORRECTED: glyphs.corrected if drafting else "",
            Outcome.UNDRAFTED: glyphs.undrafted if drafting else "",
            Outcome.ACCEPTED: "",
        }
        self._line: list[tuple[str, str]] = []  # (character, style)
        self._columns = 0
        self._waiting: Outcome | None = None

    def add(self, text: str, outcome: Outcome | None = None) -> list[Text]:
        """Append the text of a token; return the lines that this finished.

        A token without text of its own yet (part of a character) lends its outcome to the next
        text. ``outcome`` None is text held back until the end of the answer.
        """
        known = [each for each in (self._waiting, outcome) if each is not None]
        worst = max(known, key=_SEVERITY.index, default=Outcome.ACCEPTED)
        if not text:
            self._waiting = worst if known else None
            return []
        self._waiting = None
        text = escape_controls(text).replace("\t", _TAB)
        blank = len(text) - len(text.lstrip(" \n"))
        if blank == len(text):
            blank = 0
        marked = text[:blank] + self._marks[worst] + text[blank:]
        return [line for char in marked for line in self._put(char, STYLES[worst])]

    @property
    def tail(self) -> Text:
        """The line that is not finished yet."""
        return _styled(self._line)

    def _put(self, char: str, style: str) -> list[Text]:
        if char == "\n":
            return [self._break(len(self._line))]
        finished = []
        columns = cell_len(char)
        if self._line and self._columns + columns > self._width():
            spaces = [at for at, (each, _) in enumerate(self._line) if each == " "]
            word_wrap = spaces and char != " "
            finished.append(self._break(spaces[-1] + 1 if word_wrap else len(self._line)))
            if char == " ":
                return finished
        self._line.append((char, style))
        self._columns += columns
        return finished

    def _break(self, at: int) -> Text:
        line, self._line = self._line[:at], self._line[at:]
        self._columns = sum(cell_len(char) for char, _ in self._line)
        return _styled(line)


def _styled(line: list[tuple[str, str]]) -> Text:
    same_style = groupby(line, key=lambda part: part[1])
    parts = [("".join(char for char, _ in chars), style) for style, chars in same_style]
    return Text.assemble(*parts, no_wrap=True, overflow="crop")
