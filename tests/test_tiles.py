"""Tiles of other GPUs than those they were chosen for."""

import pytest

from ppsd_cli.runtime.cuda.tiles import HOPPER_SHARED, Tile, choose_tile

SHAPES = [(4096, 3072, True), (4096, 14336, True), (14336, 4096, False), (4096, 128256, False)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", [163 * 1024, 99 * 1024])
def test_smaller_shared_memory_changes_no_sums(shape, shared):
    """An A100's and a consumer card's: K is walked in the same steps."""
    inner, outer, paired = shape
    chosen = choose_tile(inner, outer, width=4, paired=paired, narrow=True)
    assert chosen.within(HOPPER_SHARED, paired=paired) == chosen
    tile = chosen.within(shared, paired=paired)
    assert (tile.columns, tile.dot, tile.warps) == (chosen.columns, chosen.dot, chosen.warps)
    assert 16 <= tile.rows <= chosen.rows
    assert (tile.rows * (2 if paired else 1) + 16) * tile.columns * 2 * tile.stages <= shared


def test_tiles_that_fit_anywhere_stay():
    row = choose_tile(4096, 4096, width=1, paired=False, narrow=True)
    short = choose_tile(576, 576, width=4, paired=False, narrow=True)
    assert row.within(1, paired=False) == row, "registers decide there"
    assert short.within(1, paired=False) == short
    assert Tile(16, 256, 4, True, 2).within(1, paired=False).rows == 16, "the least there is"
