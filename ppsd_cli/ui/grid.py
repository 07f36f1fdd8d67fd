"""The grid of stages by ticks: which work was useful, void, or not there."""

from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from ppsd_cli.core.events import Event
from ppsd_cli.core.occupancy import Cell, Occupancy

_STYLES = {Cell.USEFUL: "green", Cell.VOID: "red", Cell.BUBBLE: "dim", Cell.PROMPT: "cyan"}
_MAX_TICKS = 512
_MAX_BRANCHES = 8
_WIDE = 60


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters of the grid and the marks before tokens; each tells its state without colour."""

    useful: str
    void: str
    bubble: str
    prompt: str
    corrected: str
    undrafted: str

    def of(self, cell: Cell) -> str:
        """Return the character of a cell."""
        by_cell = {
            Cell.USEFUL: self.useful,
            Cell.VOID: self.void,
            Cell.BUBBLE: self.bubble,
            Cell.PROMPT: self.prompt,
        }
        return by_cell[cell]


UNICODE = Glyphs(useful="█", void="░", bubble="·", prompt="▒", corrected="~", undrafted="°")
ASCII = Glyphs(useful="#", void="x", bubble=".", prompt="=", corrected="~", undrafted="^")


def cell_text(cell: Cell, glyphs: Glyphs) -> Text:
    """One cell, as the grid draws it."""
    return Text(glyphs.of(cell), style=_STYLES[cell])


class Grid:
    """Last ticks of all stages; ``layers`` is ``(first, end)`` of each stage, ``end`` excluded.

    With ``width`` above 1 a line for each branch follows: what became of the node that entered in
    that tick as the best of its level, as the second best, and so on.
    """

    def __init__(self, layers: tuple[tuple[int, int], ...], *, width: int = 1) -> None:
        self._layers = layers
        self._branches = min(width, _MAX_BRANCHES) if width > 1 else 0
        self._occupancy = Occupancy()

    def add(self, event: Event) -> None:
        """Take one event."""
        self._occupancy.add(event)
        last = self._occupancy.last_tick
        if last % _MAX_TICKS == 0:
            self._occupancy.forget(before=last - _MAX_TICKS - len(self._layers))

    def rows(self, width: int, glyphs: Glyphs = UNICODE) -> list[Text]:
        """One line a stage with the last ticks that fit in ``width`` columns, newest at the right.

        Empty before the first event, and where not even the labels fit.
        """
        labels = self._labels(width)
        ticks = self.window(width)
        if not ticks:
            return []
        stages = range(len(self._layers))
        cells = [[self._occupancy.cell(stage, tick) for tick in ticks] for stage in stages]
        for place in range(self._branches):
            cells.append([self._occupancy.branch(place, tick) for tick in ticks])
        return [_row(label, states, glyphs) for label, states in zip(labels, cells, strict=True)]

    def window(self, width: int) -> range:
        """Return the ticks that ``rows`` shows."""
        first, end = self._occupancy.first_tick, self._occupancy.last_tick + 1
        room = min(width - len(self._labels(width)[0]), _MAX_TICKS)
        if first is None or room < 1:
            return range(0)
        return range(max(first, end - room), end)

    def busy_share(self, width: int) -> float | None:
        """Useful share of the cells that ``rows`` shows."""
        ticks = self.window(width)
        stages = range(len(self._layers))
        cells = [self._occupancy.cell(stage, tick) for stage in stages for tick in ticks]
        useful = sum(cell in (Cell.USEFUL, Cell.PROMPT) for cell in cells)
        return useful / len(cells) if cells else None

    def _labels(self, width: int) -> list[str]:
        form = "stage {0}  layers {1}-{2} " if width >= _WIDE else "{0}: {1}-{2} "
        labels = [
            form.format(stage, first, end - 1) for stage, (first, end) in enumerate(self._layers)
        ]
        short = "branch {0} " if width >= _WIDE else "b{0} "
        labels += [short.format(place + 1) for place in range(self._branches)]
        return [label.ljust(max(map(len, labels))) for label in labels]


def _row(label: str, cells: list[Cell], glyphs: Glyphs) -> Text:
    row = Text(label, no_wrap=True, overflow="crop")
    for cell, same in groupby(cells):
        row.append(glyphs.of(cell) * len(list(same)), style=_STYLES[cell])
    return row
