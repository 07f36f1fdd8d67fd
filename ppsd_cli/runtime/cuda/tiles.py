"""Tile sizes of the skinny products: a pure function of the shapes, so every stage has the same.

The same choice for plain decoding and for every stage is what makes their logits bit-equal, so
nothing here may depend on how the layers are split or on a measurement of this run. The figures
were found with ``docs/benchmarks/gpu_tiles.py`` on H100 and H200.
"""

from dataclasses import dataclass, replace

ROWS = 16
"""Rows that a tensor-core product is padded to; the widest call."""

MOST_GUESSES = ROWS - 1
"""Guesses of one burst at most: all its rows share a tensor-core product."""

SPLIT = 512
"""Slots that one program of attention reads, where that takes at most ``ATTENTION`` programs."""

ATTENTION = 32
"""Programs of one key/value head in attention, at most; longer caches get longer splits."""


FEWEST_ROWS = 16
"""Query rows of one program of attention, at least: what tensor cores multiply."""

_FEW_PROGRAMS = 64

HOPPER_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on the GPUs that the tiles were chosen for."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut: BN weight rows a program, BK columns a step, warps, and the way.

    ``slices`` of K are multiplied side by side, where a whole row is at most four steps long.
    """

    rows: int
    columns: int
    warps: int = 4
    dot: bool = False
    stages: int = 3
    slices: int = 0

    def padded(self, width: int) -> int:
        """Rows of x that are multiplied for ``width``."""
        if not self.dot:
            return 1
        return 8 if self.slices and width <= 8 else ROWS

    def within(self, shared: int, *, paired: bool, size: int = 2) -> "Tile":
        """The same for a GPU whose programs have at most ``shared`` bytes: fewer steps on their
        way, then fewer weight rows. Neither changes a sum, but for products with norms of single
        heads, whose rows are fixed. ``size``: bytes of a weight.
        """
        tile = self
        while tile.dot and not tile.slices and tile._bytes(paired=paired) * size > shared:
            if tile.stages > 2:
                tile = replace(tile, stages=tile.stages - 1)
            elif tile.rows > 16:
                tile = replace(tile, rows=tile.rows // 2)
            else:
                break
        return tile

    def _bytes(self, *, paired: bool) -> int:
        """Of steps on their way, where a number takes one byte."""
        return (self.rows * (2 if paired else 1) + ROWS) * self.columns * self.stages


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def choose_tile(
    inner: int, outer: int, *, width: int, paired: bool, narrow: bool, members: int = 1
) -> Tile:
    """The tile of a product [W, K = ``inner``] by [O = ``outer``, K].

    ``paired``: two weight rows at once (gated MLP, rotary pairs). ``narrow``: 16-bit weights.
    ``members``: stages that share the launch. They may change BN only: each row is summed by one
    warp, so the sums stay the same bit by bit.
    """
    if width > 1:
        if narrow:
            return _wide_tile(inner, outer, paired=paired)
        return Tile(16 if outer < 8192 else 32, 64 if inner < 2048 else 128, 4, True, 4)
    if not narrow:
        return Tile(16, min(power_of_two(inner), 256), 4)
    if inner <= 1024:
        return _short_tile(inner, outer, paired=paired, members=members)
    if inner <= 2048:
        return Tile(8, 512, 8)
    if paired:
        return Tile(4, 512, 8) if outer >= 8192 else Tile(2, 512, 4)
    if outer >= 65536:
        return Tile(8, 1024, 4)
    return Tile(4, 512, 4) if inner > 8192 else Tile(4, 2048, 8)


def _short_tile(inner: int, outer: int, *, paired: bool, members: int) -> Tile:
    """Of one row with K up to 1,024: every weight is asked for at once, so registers decide.

    A quarter or half of a warp sums a row in each, whatever BN and the number of warps.
    """
    if outer >= 8192:
        return Tile(8, 256, 4)
    if not paired:
        return Tile(16, min(64, power_of_two(inner)), 4)
    columns = min(128, power_of_two(inner))
    if outer < 1024 or members == 2:
        return Tile(16, columns, 8)
    return Tile(32, columns, 8) if members == 1 else Tile(8, columns, 4)


def _wide_tile(inner: int, outer: int, *, paired: bool) -> Tile:
    """Of several rows. Where a norm is applied (all paired products, LM heads), it is applied again
    by every program, so programs are large where there are many. K above 2,048: as found in a chain
    of layers of one stage (``docs/benchmarks/gpu_layers.py``).
    """
    if inner <= 2048 and outer >= 8192:
        return Tile(128, 64, 4, True, 4)
    if inner <= 2048:
        return Tile(16, 256 if inner <= 1024 else 512, 4, True, slices=4)
    if paired:
        return Tile(128, 128, 8, True, 3) if outer >= 8192 else Tile(64, 256, 4, True, 3)
    if outer >= 16384:
        return Tile(128, 128, 8, True, 3)
    return Tile(64 if inner <= 8192 <= 2 * outer else 32, 256, 4, True, 5)


def attention_tile(head_dim: int) -> Tile:
    """Slots a step, warps and pipelining of attention."""
    return Tile(0, 128 if head_dim <= 64 else 64, 4, True, 2)


def attention_block(rows: int, *, heads: int) -> int:
    """Query rows of one program: all of them, so that keys are read once, unless ``heads`` leave
    most of a GPU idle.
    """
    return FEWEST_ROWS if heads * (rows // FEWEST_ROWS) <= _FEW_PROGRAMS else rows


def stretch_of(weight_bytes: int) -> int:
    """Ticks of one graph. Between graphs a GPU rests for some microseconds, and a graph that has
    been launched runs to its end, also when the answer is over.
    """
    return 2 if weight_bytes < 2**30 else 1
