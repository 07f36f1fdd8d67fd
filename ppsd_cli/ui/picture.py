"""A picture of the timeline, as it looks on a terminal at the end of a run."""

import io
import re
from collections.abc import Iterable

from rich.console import Console

from ppsd_cli.core.events import Event, Ticked
from ppsd_cli.ui.live import PlainLines
from ppsd_cli.ui.timeline import Layers

_WEB_FONT = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def timeline_svg(
    events: Iterable[tuple[Event, str | None]],
    *,
    layers: Layers,
    width: int = 100,
    title: str = "ppsd generate",
    tree_width: int = 1,
) -> str:
    """Draw a run from its ``(event, text)`` pairs; return SVG that refers to no other file.

    ``tree_width``: guesses per tick, a line each. Time is that of the ``Ticked`` events, so the
    same events give the same picture.
    """
    console = Console(
        record=True,
        width=width,
        file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
        legacy_windows=False,
    )
    now = 0.0
    with PlainLines(console, layers=layers, clock=lambda: now, width=tree_width) as view:
        for event, text in events:
            if isinstance(event, Ticked):
                now = event.end
            view.handle(event, text)
    return _WEB_FONT.sub("", console.export_svg(title=title))
