"""Lines that sum a run up: the footer, the legend and the closing statement."""

from dataclasses import replace

from rich.text import Text

from ppsd_cli.core.events import Outcome
from ppsd_cli.core.occupancy import Cell
from ppsd_cli.core.stats import Progress, RunStats
from ppsd_cli.ui.answer import STYLES
from ppsd_cli.ui.grid import Glyphs, cell_text

_WIDE = 60


def footer(
    progress: Progress | RunStats,
    *,
    tokens_per_second: float | None,
    busy: float | None,
    width: int,
) -> Text:
    """Speed, acceptance, tokens per tick and busy share, in one line; unknown figures are left out.

    ``busy`` is the useful share of the stages' ticks.
    """
    wide = width >= _WIDE
    parts = []
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:.1f} {'tokens/s' if wide else 'tok/s'}")
    if progress.acceptance_rate is not None:
        parts.append(f"{progress.acceptance_rate:.0%} {'accepted' if wide else 'acc'}")
    if progress.tokens_per_tick is not None:
        parts.append(f"{progress.tokens_per_tick:.2f}{' tokens per tick' if wide else '/tick'}")
    if busy is not None:
        parts.append(f"{busy:.0%} {'of the stages busy' if wide else 'busy'}")
    return Text(("   " if wide else " ").join(parts), style="bold", no_wrap=True, overflow="crop")


def legend(glyphs: Glyphs, *, width: int, drafting: bool = True) -> list[Text]:
    """What the glyphs and colours mean, in as many lines as ``width`` columns need."""
    names = {
        Cell.USEFUL: "useful",
        Cell.VOID: "later void",
        Cell.BUBBLE: "bubble",
        Cell.PROMPT: "prompt",
    }
    shown = [Text.assemble(cell_text(cell, glyphs), f" {name}") for cell, name in names.items()]
    if drafting:
        shown += [
            Text("accepted", style=STYLES[Outcome.ACCEPTED]),
            Text(f"{glyphs.corrected}corrected", style=STYLES[Outcome.CORRECTED]),
            Text(f"{glyphs.undrafted}not drafted", style=STYLES[Outcome.UNDRAFTED]),
        ]
    lines = [shown[0]]
    for item in shown[1:]:
        if lines[-1].cell_len + 2 + item.cell_len <= width:
            lines[-1] = Text("  ").join([lines[-1], item])
        else:
            lines.append(item)
    return lines


def final_line(
    stats: RunStats,
    *,
    decoder: str,
    tokens_per_second: float | None,
    ar_seconds_per_token: float | None = None,
    width: int = 1,
) -> str:
    """Say in one line what the speculation of this run brought, also when it brought nothing.

    ``tokens_per_second`` is that of decoding. ``ar_seconds_per_token`` is plain decoding over the
    same stages, where it was measured; otherwise it is estimated as the sum of the stages' median
    times for one token, and the line says so; bursts (EESD) and trees (``width`` above 1) allow no
    such estimate.
    """
    rate = "" if tokens_per_second is None else f"{tokens_per_second:.1f} tokens/s"
    if decoder == "ar":
        return f"plain decoding, no speculation{': ' if rate else ''}{rate}"
    if stats.acceptance_rate is None:
        return f"speculation: no guess was verified in {stats.tokens} tokens"
    burst = decoder == "eesd"
    name = "draft, then verify (EESD)" if burst else "speculation"
    parts = [f"{name}: {stats.acceptance_rate:.0%} of guesses right"]
    if width > 1:
        parts = [f"tree of width {width}: {stats.acceptance_rate:.0%} of tokens among the guesses"]
    if burst and stats.tokens_per_feed is not None:
        parts.append(f"{stats.tokens_per_feed:.2f} tokens per burst")
    elif stats.tokens_per_tick is not None:
        parts.append(f"{stats.tokens_per_tick:.2f} tokens per tick")
    if rate:
        parts.append(rate)
    if burst or width > 1:
        stats = replace(stats, stage_seconds=())
    return ", ".join(parts) + _against_ar(stats, tokens_per_second, ar_seconds_per_token)


def _against_ar(
    stats: RunStats, tokens_per_second: float | None, ar_seconds_per_token: float | None
) -> str:
    """Compare with plain decoding; empty where there is nothing to compare."""
    measured = ar_seconds_per_token is not None
    estimate = sum(each.median for each in stats.stage_seconds)
    seconds = ar_seconds_per_token if ar_seconds_per_token is not None else estimate
    if not seconds or not tokens_per_second:
        return ""
    ratio = seconds * tokens_per_second
    how = "measured" if measured else "estimated from stage times of this run"
    if ratio < 0.995:
        return f"; slower than plain decoding over the same stages ({ratio:.2f}x, {how})"
    return f"; {ratio:.2f}x the same stages one at a time ({how})"
