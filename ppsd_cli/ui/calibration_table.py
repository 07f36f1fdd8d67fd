"""A calibration on a terminal: tables, the curve over exit layers, and the verdict."""

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from ppsd_cli.calibration_records import Calibration
from ppsd_cli.ui.bench_table import Fitted, Line
from ppsd_cli.ui.bench_words import number, percent
from ppsd_cli.ui.calibration_data import (
    ExitPoint,
    Mark,
    candidate_table,
    exit_points,
    head_table,
    marks,
    remarks,
    times_table,
    whole_table,
)

_BAR = 24


def calibration_view(calibration: Calibration) -> RenderableType:
    """Everything that a person wants to know, the verdict last."""
    machine = ", ".join(
        f"{value} cores" if name == "cores" else value for name, value in calibration.machine
    )
    title = f"{calibration.model} on {machine}, {calibration.dtype}, {calibration.date[:10]}"
    parts: list[RenderableType] = [Line(title, "bold"), Text("")]
    tables = (times_table, head_table, candidate_table, whole_table)
    for table in (make(calibration) for make in tables):
        if table is not None:
            parts += [Fitted(table), Text("")]
    parts += [Curve(calibration), Text("")]
    parts += [Line(text, "dim") for text in remarks(calibration)]
    parts.append(Line(f"decoder {calibration.chosen.decoder}: {calibration.reason}", "bold"))
    return Group(*parts)


class Curve:
    """Acceptance and predicted speed-up by exit layer; what was run is marked."""

    def __init__(self, calibration: Calibration) -> None:
        self._points = exit_points(calibration)
        self._marks = marks(calibration)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("Exit layers", style="bold")
        yield Line(
            "exit   right  raw exit                   agree  speed-up (raw, predicted)", "dim"
        )
        full, mark = _glyphs(console)
        top = max([1.0, *(p.speedup or 0.0 for p in self._points)])
        for point in self._points:
            yield Line(_point(point, full, top))
            for each in self._marks:
                if each.layer == point.layer:
                    yield Line(_mark(each, mark), "cyan")


def _point(point: ExitPoint, full: str, top: float) -> str:
    """One exit layer in a line of fixed width."""
    accepted = full * round(point.acceptance * _BAR)
    speedup = point.speedup or 0.0
    gained = full * round(speedup / top * _BAR)
    return (
        f"{point.layer:4d}  {percent(point.acceptance):>6}  {accepted:<{_BAR}}  "
        f"{percent(point.agreement):>6}  {number(point.speedup, 2):>5} {gained}"
    ).rstrip()


def _mark(mark: Mark, sign: str) -> str:
    measured = "not run" if mark.measured is None else f"measured {mark.measured:.2f}"
    return (
        f"      {percent(mark.acceptance):>6}  {sign} {mark.label}: "
        f"speed-up predicted {mark.predicted:.2f}, {measured}"
    )


def _glyphs(console: Console) -> tuple[str, str]:
    """A bar and a mark that the console can write."""
    try:
        "█●".encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return "#", "*"
    return "█", "●"
