"""Sizes that follow from how many nodes a tick of a tree carries."""

from dataclasses import dataclass

from ppsd_cli.core.tree import CONTINUED
from ppsd_cli.runtime.cuda.tiles import power_of_two
from ppsd_cli.runtime.cuda.tree_control import NO_SLOT


@dataclass(frozen=True, slots=True)
class LevelShape:
    """``stages``: n. ``width``: W. ``depth``: depths of guesses that enter in one tick."""

    stages: int
    width: int
    depth: int = 1

    @property
    def padded(self) -> int:
        """WP."""
        return power_of_two(self.width)

    @property
    def path(self) -> int:
        """P: nodes of a path that may be unverified."""
        return self.stages * self.depth

    @property
    def freed(self) -> int:
        """F * WP: room for nodes that die in one tick, of n - 1 levels; with two depths also of the
        level that is verified.
        """
        return (self.stages + self.depth - 2) * self.padded

    @property
    def continued(self) -> int:
        """R: guesses behind which a second depth is drafted."""
        return min(CONTINUED, self.width) if self.depth > 1 else 0

    @property
    def letter(self) -> int:
        """E."""
        return 2 + self.width * (2 + self.path) + self.freed

    def empty_letter(self, trash: int) -> list[int]:
        """The letter of a level without nodes, before an answer."""
        paths = [0] * (self.width * self.path)
        return [0, -1, *([0, trash] * self.width), *paths, *([NO_SLOT] * self.freed)]
