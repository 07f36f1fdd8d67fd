"""Footer and closing statement."""

from dataclasses import replace

import pytest
from ui_chain import TICK, Chain

from ppsd_cli.core.stats import RunStats, StatsBuilder
from ppsd_cli.ui.summary import final_line, footer


@pytest.fixture
def stats() -> RunStats:
    builder = StatsBuilder(3)
    for event in Chain().events():
        builder.add(event)
    return builder.snapshot()


def test_faster(stats: RunStats) -> None:
    line = final_line(stats, decoder="ppsd", tokens_per_second=6.0)
    assert line == (
        "speculation: 86% of guesses right, 0.70 tokens per tick, 6.0 tokens/s; "
        "2.25x the same stages one at a time (estimated from stage times of this run)"
    )


def test_slower_says_so(stats: RunStats) -> None:
    line = final_line(stats, decoder="ppsd", tokens_per_second=0.93 / (3 * TICK))
    assert "slower than plain decoding over the same stages (0.93x, estimated" in line


def test_measured_beats_estimated(stats: RunStats) -> None:
    line = final_line(stats, decoder="ppsd", tokens_per_second=6.0, ar_seconds_per_token=0.25)
    assert line.endswith("1.50x the same stages one at a time (measured)")


def test_no_comparison_without_times(stats: RunStats) -> None:
    line = final_line(replace(stats, stage_seconds=()), decoder="ppsd", tokens_per_second=6.0)
    assert line == "speculation: 86% of guesses right, 0.70 tokens per tick, 6.0 tokens/s"


def test_bursts_are_compared_with_what_was_measured_only(stats: RunStats) -> None:
    """A stage's time for a burst says nothing about its time for a token."""
    burst = replace(stats, feeds=11)
    line = final_line(burst, decoder="eesd", tokens_per_second=6.0)
    assert line == (
        "draft, then verify (EESD): 86% of guesses right, 2.00 tokens per burst, 6.0 tokens/s"
    )
    line = final_line(burst, decoder="eesd", tokens_per_second=6.0, ar_seconds_per_token=0.25)
    assert line.endswith("6.0 tokens/s; 1.50x the same stages one at a time (measured)")


def test_nothing_verified(stats: RunStats) -> None:
    none = replace(stats, tokens=1, verified=0, acceptance_rate=None)
    line = final_line(none, decoder="ppsd", tokens_per_second=None)
    assert line == "speculation: no guess was verified in 1 tokens"


def test_plain_decoding(stats: RunStats) -> None:
    line = final_line(stats, decoder="ar", tokens_per_second=12.34)
    assert line == "plain decoding, no speculation: 12.3 tokens/s"


def test_footer_leaves_unknown_figures_out() -> None:
    empty = StatsBuilder(2).progress()
    assert footer(empty, tokens_per_second=None, busy=None, width=80).plain == ""


def test_footer_fits_narrow_terminals(stats: RunStats) -> None:
    assert len(footer(stats, tokens_per_second=1234.5, busy=1.0, width=40).plain) <= 40
