"""What trees of more than one depth per tick would bring, simulated from measured ranks.

As ``core.tree_simulation``, but a tick takes the best nodes wherever they stand: behind any live
node, and with ``depths`` 2 also behind nodes of the same tick. For these the head would
continue from its own state; it is taken to miss the right token in a given share of the cases in
which it finds it from the real state.

    python docs/benchmarks/tree_depths.py --questions 6 --tokens 64
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from random import Random

from tree_tokens import (
    ARRANGEMENTS,
    Answer,
    Candidates,
    Measured,
    answers_of,
    options_of,
    plan_of,
)

from ppsd_cli.core.plan import Node
from ppsd_cli.core.tree_simulation import TreeSimulation

LOSSES = (0.0, 0.3, 0.5)
STAGES, WIDTHS = (2, 3), (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Depths:
    """How many levels one tick may enter, and what the ones after the first miss."""

    most: int
    loss: float = 0.0


class DeepSimulation(TreeSimulation):
    """Best first over all live nodes; ``depths.most`` 1 only widens the tree."""

    def __init__(self, rows: Candidates, answer: Answer, *, shape: tuple[int, int], depths: Depths):
        stages, width = shape
        super().__init__(rows, answer.tokens, stages=stages, width=width, random=Random(0))
        self._depths, self._luck = depths, Random(1)
        self._offers: dict[tuple[int, bool], list[tuple[int, float]]] = {}
        self._entered: dict[int, set[int]] = {}
        self._order = count()

    def _guesses(self) -> list[Node]:
        heap: list[tuple[float, int, int, Node, int]] = []
        for node in self._tree.live:
            self._push(heap, node, 1)
        found: list[Node] = []
        while heap and len(found) < self._width:
            score, _, depth, parent, token = heappop(heap)
            self._entered[parent.serial].add(token)
            node = self._child(parent, token, -score)
            self._tree.enter(node)
            found.append(node)
            self._push(heap, parent, depth)
            if depth < self._depths.most:
                self._push(heap, node, depth + 1)
        return []  # they have entered already

    def _level(self) -> list[Node]:
        before = self._serial
        entered = super()._level()
        return entered or [n for n in self._tree.live if n.serial >= before]

    def _push(self, heap: list[tuple[float, int, int, Node, int]], node: Node, depth: int) -> None:
        """The best child of ``node`` that has not entered."""
        if node.position + 1 > self._last:
            return
        used = self._entered.setdefault(node.serial, set())
        free = [each for each in self._offer_at(node, depth) if each[0] not in used]
        if free:
            token, share = free[0]
            heappush(heap, (-(node.score + share), next(self._order), depth, node, token))

    def _offer_at(self, node: Node, depth: int) -> list[tuple[int, float]]:
        key = node.serial, depth > 1
        if key not in self._offers:
            row = self._offer(node)
            if depth > 1 and self._luck.random() < self._depths.loss:
                right = self._tokens[node.position]
                row = [(-100 if token == right else token, share) for token, share in row]
            self._offers[key] = row
        return self._offers[key]


def rate(
    lists: Sequence[Candidates], answers: Sequence[Answer], shape: tuple[int, int], depths: Depths
) -> float:
    """Tokens per tick over all answers."""
    pairs = zip(lists, answers, strict=True)
    runs = (DeepSimulation(rows, a, shape=shape, depths=depths).run() for rows, a in pairs)
    ticks = sum(run.ticks for run in runs)
    return round(sum(len(answer.tokens) for answer in answers) / ticks, 3)


def main() -> int:
    """Print a table as JSON."""
    options = options_of(sys.argv[1:])
    answers = answers_of(options)
    report = {}
    for stages in STAGES:
        plan = plan_of(options, replace(ARRANGEMENTS[stages], decoder="ppsd", width=max(WIDTHS)))
        head = Measured(plan)
        lists = [head.candidates(answer, 1.0) for answer in answers]
        kinds = {"one depth, any live node": Depths(1)}
        kinds |= {f"two depths, {loss:.0%} missed": Depths(2, loss) for loss in LOSSES}
        report[stages] = {
            name: {w: rate(lists, answers, (stages, w), depths) for w in WIDTHS}
            for name, depths in kinds.items()
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
