"""The timeline on terminals of all kinds, against golden files.

``PPSD_UPDATE_GOLDEN=1 pytest tests/test_ui_timeline.py`` writes them anew; look at the difference.
"""

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console
from ui_chain import ANSWER, LAYERS, TICK, WORDS, Chain, with_text

from ppsd_cli.core.events import Committed, Event, Finished, FinishReason, Outcome, Ticked, Verified
from ppsd_cli.ui.grid import ASCII, Grid
from ppsd_cli.ui.live import LiveView, PlainLines
from ppsd_cli.ui.picture import timeline_svg
from ppsd_cli.ui.timeline import Layers

GOLDEN = Path(__file__).parent / "golden"
CJK = ["法国", "的", "首都", "是", "巴黎", "，", "它", "位于", "塞纳", "河畔", "。"] * 2 + [""]
EVERY_STYLE = "\x1b\\[[0-9;]*m"


class Screen(io.TextIOWrapper):
    """A terminal that remembers what was written to it."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


class Run:
    """A view that takes paired events; the clock stands at the latest tick."""

    def __init__(self, pairs: Iterable[tuple[Event, str | None]]) -> None:
        self.pairs = pairs
        self.now = 0.0

    def show(self, view: LiveView | PlainLines) -> None:
        with view:
            for event, text in self.pairs:
                if isinstance(event, Ticked):
                    self.now = event.end
                view.handle(event, text)

    def clock(self) -> float:
        return self.now


def plain(width: int, *, words: list[str] = WORDS, encoding: str = "utf-8") -> str:
    screen = Screen(encoding)
    console = Console(file=screen, width=width, height=24, legacy_windows=False, _environ={})
    run = Run(with_text(Chain().events(), words))
    run.show(PlainLines(console, layers=LAYERS, clock=run.clock))
    return screen.text()


def live(width: int, height: int = 24, **environ: str) -> str:
    screen = Screen()
    console = Console(
        file=screen,
        width=width,
        height=height,
        force_terminal=True,
        legacy_windows=False,
        _environ={"TERM": "xterm-256color", **environ},
    )
    run = Run(with_text(Chain().events(), WORDS))
    run.show(LiveView(console, layers=LAYERS, clock=run.clock))
    return screen.text()


def left_on_screen(output: str) -> str:
    """Play the cursor movements that Rich uses; return what stays."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def check(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("PPSD_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_golden(width: int) -> None:
    check(f"timeline_{width}", plain(width))


def test_golden_ascii() -> None:
    check("timeline_ascii", plain(80, encoding="ascii"))


def test_golden_wide_characters() -> None:
    check("timeline_cjk", plain(40, words=CJK))


def test_ascii_terminal_gets_escapes() -> None:
    assert "\\u6cd5\\u56fd" in plain(80, words=CJK, encoding="ascii")


@pytest.mark.parametrize("width", [1, 8, 12, 13, 20])
def test_no_width_is_too_small(width: int) -> None:
    letters = re.sub(r"\s", "", plain(width))
    assert "".join(WORDS).replace(" ", "")[-6:] in letters


def test_terminal_ends_with_the_same_as_a_log() -> None:
    for width in (40, 80):
        assert left_on_screen(live(width, NO_COLOR="1")) == left_on_screen(plain(width))


def test_short_terminal_loses_nothing() -> None:
    assert left_on_screen(live(40, height=6, NO_COLOR="1")) == left_on_screen(plain(40))


def test_no_color() -> None:
    styles = set(re.findall(EVERY_STYLE, live(80, NO_COLOR="1")))
    assert styles <= {"\x1b[0m", "\x1b[1m", "\x1b[2m"}
    coloured = live(80)
    assert {"\x1b[32m", "\x1b[1;31m"} <= set(re.findall(EVERY_STYLE, coloured))


def test_dumb_terminal_gets_no_movements() -> None:
    output = live(80, TERM="dumb")
    assert "\x1b" not in output
    assert output.replace(" ", "") == plain(80).replace(" ", "")


def test_redraws_are_modest() -> None:
    output = live(80)
    ticks = sum(isinstance(event, Ticked) for event in Chain().events())
    assert output.count("stage 0") <= ticks + 8


def test_exception_leaves_what_was_committed() -> None:
    screen = Screen()
    console = Console(file=screen, width=80, force_terminal=True, _environ={"NO_COLOR": "1"})
    pairs = list(with_text(Chain().events(), WORDS))
    view = LiveView(console, layers=LAYERS, clock=lambda: 0.0)

    def interrupted() -> None:
        with view:
            for event, text in pairs[: len(pairs) // 2]:
                view.handle(event, text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown = left_on_screen(screen.text())
    assert "°The capital of ~France is ~Paris" in shown
    assert "\x1b[?25h" in screen.text()  # the cursor is back


def test_model_cannot_steer_the_terminal() -> None:
    words = ["\x1b[2J", "\x9b31m", "\u202eevil", "\x07"] + ["a"] * 18 + [""]
    output = plain(80, words=words)
    assert not re.search("[\x1b\x9b\x07\u202e]", output)
    assert "\\x1b[2J" in output


def test_characters_in_parts_keep_the_worst_outcome() -> None:
    words = WORDS.copy()
    words[5], words[6] = "", " 巴."
    assert " ~巴." in plain(80, words=words)


def test_plain_decoding_marks_nothing() -> None:
    screen = Screen()
    console = Console(file=screen, width=80, _environ={})
    run = Run(with_text(Chain(drafting=False).events(), WORDS))
    run.show(PlainLines(console, layers=LAYERS, clock=run.clock, drafting=False))
    assert "".join(WORDS[:10]) in screen.text()
    assert "drafted" not in screen.text()
    assert "°" not in screen.text()


def test_useful_turns_void() -> None:
    grid = Grid(LAYERS)
    before = ""
    for event in Chain().events():
        if type(event).__name__ == "Flushed":
            before = grid.rows(80, ASCII)[0].plain
        grid.add(event)
        if before:
            break
    after = grid.rows(80, ASCII)[0].plain
    assert len(before) == len(after)
    assert before.count("x") == 0
    assert after.count("x") == 2


def test_leftovers_and_the_time_after_the_end_are_not_drawn() -> None:
    clean, noisy = Grid(LAYERS), Grid(LAYERS)
    events = list(Chain().events())
    last = events[-1].tick
    noisy.add(Verified(0, 900, 1, False, ()))
    for event in events:
        clean.add(event)
        noisy.add(event)
    noisy.add(Ticked(last, 0.0, 0.0, 0.0, 0.0))
    assert noisy.rows(80) == clean.rows(80)


def test_window_scrolls_and_memory_stays_bounded() -> None:
    answer = tuple(range(3000))
    grid = Grid(LAYERS)
    for event in Chain(answer=answer, wrong=frozenset(range(0, 3000, 7))).events():
        grid.add(event)
    rows = grid.rows(80)
    assert {len(row.plain) for row in rows} == {80}
    assert len(grid._occupancy._state) < 3000


def test_stage_labels_end_inclusive() -> None:
    grid = Grid(LAYERS)
    assert grid.rows(80) == []
    for event in Chain().events():
        grid.add(event)
    assert [row.plain[:21] for row in grid.rows(80)] == [
        "stage 0  layers 0-9  ",
        "stage 1  layers 10-19",
        "stage 2  layers 20-29",
    ]


def test_rate_counts_from_the_first_token() -> None:
    screen = Screen()
    console = Console(file=screen, width=80, _environ={})
    now = 0.0
    layers: Layers = ((0, 4),)
    with PlainLines(console, layers=layers, clock=lambda: now) as view:
        for index in range(5):
            now = 10.0 + index / 2
            view.handle(Committed(index + 1, index, 1, Outcome.UNDRAFTED), "a")
        now = 99.0
        view.handle(Finished(6, FinishReason.LENGTH), "")
    assert "2.0 tokens/s" in screen.text()


def test_picture_is_repeatable_and_stands_alone() -> None:
    def draw() -> str:
        return timeline_svg(with_text(Chain().events(), WORDS), layers=LAYERS, width=90)

    svg = draw()
    assert svg == draw()
    assert svg.startswith("<svg")
    assert "@font-face" not in svg
    assert "France" in svg
    assert len(ANSWER) / 2 > TICK
