"""Which cache slot a node gets: always the lowest that is free."""

from heapq import heappop, heappush, nsmallest


class Slots:
    """Free slots from 0 up, without a limit of their own.

    A committed node keeps its slot for the whole answer. At most ``stages * width`` nodes are in
    flight at once, so no slot beyond the committed ones plus that number is ever given out; the
    free slots below the highest one used are never more than that number either.
    """

    def __init__(self) -> None:
        self._holes: list[int] = []
        self._end = 0

    @property
    def end(self) -> int:
        """One more than the highest slot that was ever given out: the high-water mark."""
        return self._end

    def clear(self) -> None:
        """All slots are free."""
        self._holes, self._end = [], 0

    def lowest(self, count: int) -> tuple[int, ...]:
        """The slots that the next ``count`` nodes get, in order."""
        holes = nsmallest(count, self._holes)
        return (*holes, *range(self._end, self._end + count - len(holes)))

    def take(self, tokens: int = 1) -> int:
        """The first of ``tokens`` slots: the lowest one, or a run of fresh ones for a prompt."""
        if self._holes:
            assert tokens == 1, "a prompt follows nothing that could be void"
            return heappop(self._holes)
        self._end += tokens
        return self._end - tokens

    def free(self, slot: int) -> None:
        """A void node's slot may be taken again, at once: stages write before they attend."""
        heappush(self._holes, slot)
