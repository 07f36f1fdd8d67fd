"""What is counted and drawn of a tree: figures, the grid's branches, the trace."""

from dataclasses import replace

from fake_pipeline import VOCABULARY
from fake_tree import FakeTree
from test_schedule_tree import RANKS, run

from ppsd_cli.core.events import Committed, Entered, Flushed, Outcome, Pruned, Span, Verified
from ppsd_cli.core.occupancy import Cell, Occupancy
from ppsd_cli.core.schedule import Limits
from ppsd_cli.core.stats import StatsBuilder
from ppsd_cli.ui.grid import ASCII, Grid
from ppsd_cli.ui.summary import final_line
from ppsd_cli.ui.trace import TraceWriter

STAGES, WIDTH = 3, 3


def events_of(rank=RANKS["mixed"], width=WIDTH, count=12):
    return run(FakeTree(STAGES, rank=rank), limits=Limits(count, 64), width=width)


def stats_of(events):
    builder = StatsBuilder(STAGES)
    for event in events:
        builder.add(event)
    return builder.snapshot()


def test_figures_of_a_tree_count_every_node_once():
    events = events_of()
    stats = stats_of(events)
    entered = [e for e in events if isinstance(e, Entered) and e.token_id is not None]
    commits = [e for e in events if isinstance(e, Committed)]
    assert stats.nodes == len(entered)
    assert stats.feeds == len({e.tick for e in entered})
    assert stats.nodes_per_feed == len(entered) / stats.feeds > 1
    assert stats.accepted == sum(e.outcome is Outcome.ACCEPTED for e in commits)
    void = {s for e in events if isinstance(e, Flushed | Pruned) for s in e.void}
    assert stats.void_drafts == len(void)
    assert stats.flushes == sum(isinstance(e, Flushed) for e in events)
    assert stats_of(events_of(width=1)).nodes_per_feed == 1


def test_a_branch_is_void_as_soon_as_another_is_right():
    """Over three stages the second guess is right: number 1 of the level stays, 0 is void."""
    events = events_of(rank=lambda i: 1 if i == 1 else 0, width=2)
    occupancy = Occupancy()
    at = next(i for i, e in enumerate(events) if isinstance(e, Pruned))
    level = next(e.tick for e in events if isinstance(e, Entered) and e.drafted)
    for event in events[:at]:
        occupancy.add(event)
    assert [occupancy.branch(place, level) for place in range(3)] == [
        Cell.USEFUL, Cell.USEFUL, Cell.BUBBLE,
    ]  # fmt: skip
    occupancy.add(events[at])
    assert [occupancy.branch(place, level) for place in range(2)] == [Cell.VOID, Cell.USEFUL]
    assert occupancy.cell(0, level) is Cell.USEFUL, "a stage's cell is the best of its nodes"


def test_the_grid_has_a_line_for_each_branch():
    grid = Grid(((0, 2), (2, 4), (4, 6)), width=2)
    for event in events_of(rank=lambda i: {1: 1, 4: VOCABULARY}.get(i, 0), width=2, count=6):
        grid.add(event)
    assert [row.plain for row in grid.rows(30, ASCII)] == GRID
    wide = Grid(((0, 2), (2, 4)), width=16)
    wide.add(events_of()[0])
    assert len(wide.rows(80)) == 2 + 8, "no more lines than a person can tell apart"
    assert len(Grid(((0, 2), (2, 4))).rows(80)) == 0


GRID = [
    "0: 0-1 ==..##x##x.#..",
    "1: 2-3 .==..##x##x.#.",
    "2: 4-5 ..==..##x##x.#",
    "b1     ==..#xx##x.#..",
    "b2     .....#xxxx....",
]


def test_the_trace_has_all_nodes_of_a_level():
    trace = TraceWriter(STAGES)
    entered = {}
    for event in events_of():
        if isinstance(event, Entered):
            entered[event.serial] = event
        if isinstance(event, Verified):
            tick = entered[event.serial].tick
            spans = tuple(Span(s, tick + s, tick + s + 0.5) for s in range(STAGES))
            event = replace(event, spans=spans)
        trace.add(event)
    events = trace.events()
    levels = [e["args"]["branches"] for e in events if "branches" in e.get("args", {})]
    assert max(len(level) for level in levels) == WIDTH
    for serial, parent, token, state in (node for level in levels for node in level):
        assert (entered[serial].parent, entered[serial].token_id) == (parent, token)
        assert state in ("live", "void")
    assert {e["name"] for e in events if e["ph"] == "i"} == {"commit", "flush", "prune"}


def test_the_closing_line_of_a_tree_promises_no_estimate():
    stats = stats_of(events_of())
    line = final_line(stats, decoder="ppsd", tokens_per_second=10.0, width=3)
    assert line.startswith("tree of width 3: ")
    assert "tokens among the guesses" in line
    assert "estimated" not in line
