"""Progress of long work on stderr."""

import sys
from typing import Any

from tqdm import tqdm

from ppsd_cli.tasks.train import Report

_PARTS = 1000


class Bars:
    """One bar at a time: text written, then training done; silent when ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._name = ""

    def say(self, line: str) -> None:
        """One line on stderr."""
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)

    def text(self, there: int, wanted: int) -> None:
        """Tokens of text written so far."""
        self._move("text", there, wanted, unit="tok")

    def training(self, report: Report) -> None:
        """Loss and acceptance beside the share of the schedule that is done."""
        self._move("train", round(report.progress * _PARTS), _PARTS, unit="‰")
        loss = "/".join(f"{value:.3f}" for value in report.losses)
        accepted = "/".join(f"{value:.3f}" for value in report.acceptance)
        rate = f"{report.tokens_per_second / 1000:.0f}k tok/s"
        self._bar.set_postfix_str(f"step {report.step} loss {loss} acc {accepted} {rate}")
        if report.scores is not None:
            held = "/".join(f"{score.whole.top[0]:.3f}" for score in report.scores)
            self.say(f"step {report.step}: held-out acceptance {held}")

    def close(self) -> None:
        """Finish the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._name = None, ""

    def _move(self, name: str, there: int, total: int, *, unit: str) -> None:
        if name != self._name:
            self.close()
            scale = unit == "tok"
            self._bar = tqdm(
                total=total, desc=name, unit=unit, unit_scale=scale, disable=self._quiet
            )
            self._name = name
        self._bar.update(there - self._bar.n)


class Steps:
    """One bar at a time for the named parts of a task; silent when ``quiet``."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def say(self, line: str) -> None:
        """One line on stderr."""
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)

    def begin(self, name: str, total: int) -> None:
        """A new part of so many steps; the last one is over."""
        self.close()
        self._bar = tqdm(total=total, desc=name, disable=self._quiet)

    def step(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """Finish the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
