"""Progress of a benchmark while it runs: a bar, and a table that fills in."""

import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table

from ppsd_cli.bench_records import Contender, Key, Sample
from ppsd_cli.ui.bench_table import Line, safe_text
from ppsd_cli.ui.bench_words import NOTHING, PLAIN, duration, number, percent

_BAR_COLUMNS = 40
_DROP_FIRST = ("tokens/tick", "acceptance", "answers", "identical")
_COLUMNS = ("answers", "tokens/s", "speed-up", "acceptance", "tokens/tick", "identical")


class Tally:
    """Figures so far of each contender. Pure: no clock, no console."""

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self._contenders = tuple(contenders)
        self._samples: dict[str, dict[Key, Sample]] = {each.name: {} for each in contenders}
        self._plain = next((each.name for each in contenders if each.decoder == PLAIN), None)

    def add(self, sample: Sample) -> None:
        """Take one answer; the same key again replaces the earlier answer."""
        self._samples[sample.contender][sample.key] = sample

    @property
    def answers(self) -> int:
        """Answers of all contenders."""
        return sum(map(len, self._samples.values()))

    def speed(self, name: str) -> float | None:
        """Median tokens/s of the answers so far."""
        speeds = [each.tokens_per_second for each in self._samples[name].values()]
        return median(known) if (known := [each for each in speeds if each]) else None

    def speedup(self, name: str) -> float | None:
        """Median over the prompts that plain decoding has answered too; None for itself."""
        if self._plain is None or name == self._plain:
            return None
        plain = self._samples[self._plain]
        pairs = [
            (sample.tokens_per_second, plain[key].tokens_per_second)
            for key, sample in self._samples[name].items()
            if key in plain
        ]
        return median(known) if (known := [a / b for a, b in pairs if a and b]) else None

    def rows(self) -> list[dict[str, str]]:
        """One row a contender, by name of column."""
        return [self._row(each.name) for each in self._contenders]

    def _row(self, name: str) -> dict[str, str]:
        samples = list(self._samples[name].values())
        counts = [(sample.counts, len(sample.token_ids)) for sample in samples if sample.counts]
        verified = sum(each.verified for each, _ in counts)
        accepted = sum(each.accepted for each, _ in counts)
        ticks = sum(each.ticks for each, _ in counts)
        tokens = sum(length for _, length in counts)
        same = sum(sample.difference is None for sample in samples)
        compared = samples and self._plain is not None and name != self._plain
        return {
            "contender": name,
            "answers": str(len(samples)),
            "tokens/s": number(self.speed(name)),
            "speed-up": number(self.speedup(name), 2),
            "acceptance": percent(accepted / verified if verified else None),
            "tokens/tick": number(tokens / ticks if ticks else None, 2),
            "identical": f"{same}/{len(samples)}" if compared else NOTHING,
        }


class LiveTable:
    """Live progress of ``total`` answers on a console, usually that of stderr.

    Drawn only when an answer arrives, in the caller's thread: a drawing thread would take time
    from what is being measured. Off a terminal it prints a plain line at every tenth instead.
    """

    def __init__(
        self,
        console: Console,
        contenders: Sequence[Contender],
        total: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._total = total
        self._clock = clock
        self._tally = Tally(contenders)
        self._contenders = tuple(contenders)
        self._begin = clock()
        self._restored = 0
        self._tenths = 0
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                self._frame(),
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start(refresh=True)

    def update(self, sample: Sample, *, restored: bool = False) -> None:
        """Take an answer; one ``restored`` from an earlier run says nothing about the pace."""
        self._tally.add(sample)
        self._restored += restored
        if self._live:
            self._live.update(self._frame(), refresh=True)
        else:
            self._print_tenth()

    def note(self, text: str) -> None:
        """Say something above the table."""
        self._console.print(Line(text))

    def close(self) -> None:
        """Take the table away; what was noted stays. Safe to call twice."""
        if self._live:
            self._live.stop()
            self._live = None

    def _left(self) -> float | None:
        """Seconds left, if the rest goes as what was measured here."""
        measured = self._tally.answers - self._restored
        if measured < 1:
            return None
        per_answer = (self._clock() - self._begin) / measured
        return per_answer * max(self._total - self._tally.answers, 0)

    def _status(self) -> str:
        done, left = self._tally.answers, self._left()
        share = done / self._total if self._total else 1.0
        text = f"{done}/{self._total} answers ({share:.0%})"
        return text if left is None or done >= self._total else f"{text}, {duration(left)} left"

    def _frame(self) -> RenderableType:
        status = self._status()
        room = self._console.width - len(status) - 1
        bar = ProgressBar(
            total=max(self._total, 1),
            completed=self._tally.answers,
            width=min(room, _BAR_COLUMNS),
            complete_style="cyan",
            finished_style="green",
        )
        line = Table.grid(padding=(0, 1))
        if room >= _BAR_COLUMNS // 4:
            line.add_row(bar, status)
        else:
            line.add_row(status)
        return Group(fitting_table(self._tally.rows(), self._console), line)

    def _print_tenth(self) -> None:
        tenths = 10 * self._tally.answers // max(self._total, 1)
        if tenths == self._tenths:
            return
        self._tenths = tenths
        speeds = []
        for each in self._contenders:
            speedup = self._tally.speedup(each.name)
            times = f" ({speedup:.2f}x)" if speedup else ""
            speeds.append(f"{each.name} {number(self._tally.speed(each.name))}{times}")
        text = f"bench: {self._status()}; tokens/s so far: {', '.join(speeds)}"
        self._console.print(Line(text), soft_wrap=True)


def fitting_table(rows: Sequence[dict[str, str]], console: Console) -> Table:
    """A table of the columns that fit in the console's width, the most telling kept longest."""
    shown = list(_COLUMNS)
    unlimited = console.options.update(max_width=100_000)
    for name in _DROP_FIRST:
        table = _table(rows, shown, console)
        if Measurement.get(console, unlimited, table).maximum <= console.width:
            return table
        shown.remove(name)
    return _table(rows, shown, console)


def _table(rows: Sequence[dict[str, str]], shown: Sequence[str], console: Console) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("contender", overflow="crop", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(safe_text(row[each], console) for each in ("contender", *shown)))
    return table
