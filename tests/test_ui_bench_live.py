"""Progress of a benchmark on terminals and in logs."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from ppsd_cli.bench_records import Difference, Sample
from ppsd_cli.ui.bench_live import LiveTable, Tally
from tests.ui_bench_report import AR, EESD, PPSD, sample

CONTENDERS = (AR, PPSD, EESD)


class Screen:
    """A console with a memory, and a clock that the test moves."""

    def __init__(self, width: int = 80, *, terminal: bool = False, encoding: str = "utf-8") -> None:
        self.file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        self.console = Console(
            file=self.file,
            width=width,
            height=24,
            force_terminal=terminal,
            legacy_windows=False,
            _environ={"TERM": "xterm-256color"} if terminal else {},
        )
        self.now = 0.0
        self.table = LiveTable(self.console, CONTENDERS, 60, clock=lambda: self.now)

    def measure(self, count: int, *, seconds: float = 5.0) -> None:
        for at in range(count):
            for name, took in (("ar", 4.0), ("ppsd", 3.2), ("eesd-4", 5.0)):
                self.now += seconds
                self.table.update(sample(name, str(at), seconds=took))

    def text(self) -> str:
        assert isinstance(self.file.buffer, io.BytesIO)
        return self.file.buffer.getvalue().decode(self.file.encoding)

    def last_frame(self) -> str:
        """What the last drawing put on the screen."""
        clean = re.sub(r"\x1b\[[0-9;?]*m|\x1b\[\?25[lh]", "", self.text())
        return re.split(r"\x1b\[1A|\x1b\[2K|\r", clean)[-1]


def test_log_has_a_line_a_tenth_without_control_codes() -> None:
    screen = Screen()
    screen.measure(20)
    screen.table.close()
    lines = screen.text().splitlines()
    assert len(lines) == 10
    assert "\x1b" not in screen.text()
    assert lines[4] == (
        "bench: 30/60 answers (50%), 2 min left; tokens/s so far: "
        "ar 32.0, ppsd 40.0 (1.25x), eesd-4 25.6 (0.80x)"
    )
    assert lines[-1].startswith("bench: 60/60 answers (100%); ")


def test_time_left_is_that_of_what_was_measured_here() -> None:
    screen = Screen()
    for at in range(10):
        screen.table.update(sample("ar", str(at)), restored=True)
    assert "left" not in screen.text()
    screen.now += 20.0
    screen.table.update(sample("ar", "10"))
    screen.now += 20.0
    screen.table.update(sample("ar", "11"))
    assert "12/60 answers (20%), 16 min left" in screen.text()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_table_fits_the_terminal(width: int) -> None:
    screen = Screen(width, terminal=True)
    screen.measure(2)
    frame = screen.last_frame()
    assert all(len(line) <= width for line in frame.splitlines())
    assert "eesd-4" in frame
    assert "25.6" in frame
    assert "speed-up" in frame
    assert ("identical" in frame) == (width >= 40)
    assert ("tokens/tick" in frame) == (width >= 80)
    screen.table.close()


def test_table_fills_in() -> None:
    screen = Screen(100, terminal=True)
    screen.table.update(sample("ar"))
    before = screen.last_frame()
    assert re.search(r"ar +1 +32\.0 +- +- +- +-", before)
    assert re.search(r"ppsd +0 +- +- +- +- +-", before)
    screen.table.update(sample("ppsd", seconds=3.2))
    assert re.search(r"ppsd +1 +40\.0 +1\.25 +69\.8% +0\.73 +1/1", screen.last_frame())
    assert "2/60 answers (3%)" in screen.last_frame()
    screen.table.close()


def test_notes_stay_and_are_safe() -> None:
    for terminal in (False, True):
        screen = Screen(terminal=terminal)
        screen.table.note("hf was left out: \x1b]0;bad\x07 [bold]")
        screen.table.close()
        assert "hf was left out: \\x1b]0;bad\\x07 [bold]" in screen.text()


def test_closing_twice_gives_the_cursor_back_once() -> None:
    screen = Screen(terminal=True)
    screen.table.close()
    screen.table.close()
    assert screen.text().count("\x1b[?25h") == 1


def test_ascii_terminal_gets_ascii() -> None:
    screen = Screen(30, terminal=True, encoding="ascii")
    screen.measure(1)
    screen.table.close()
    assert "ppsd" in screen.text()


def test_speedup_pairs_the_same_prompts() -> None:
    """A slow question that only one of the two has answered does not count."""
    tally = Tally(CONTENDERS)
    tally.add(sample("ar", "81", seconds=4.0))
    tally.add(sample("ar", "82", seconds=40.0))
    tally.add(sample("ppsd", "81", seconds=2.0))
    assert tally.speedup("ppsd") == pytest.approx(2.0)
    assert tally.speedup("ar") is None
    assert tally.speedup("eesd-4") is None


def test_differing_answers_are_counted() -> None:
    tally = Tally(CONTENDERS)
    tally.add(sample("ar"))
    tally.add(sample("eesd-4"))
    tally.add(sample("eesd-4", "82", difference=Difference(1, 2, 3, None)))
    assert [each["identical"] for each in tally.rows()] == ["-", "-", "1/2"]


def test_answers_without_speed_do_not_break_the_figures() -> None:
    """One token only: nothing was decoded after the first."""
    one: Sample = replace(sample("ppsd"), token_ids=(1,), decode_seconds=0.0)
    tally = Tally(CONTENDERS)
    tally.add(sample("ar"))
    tally.add(one)
    assert tally.speed("ppsd") is None
    assert tally.speedup("ppsd") is None
