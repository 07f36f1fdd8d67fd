"""What trees of more than one depth per tick would bring, simulated from measured ranks.

As ``core.tree_simulation``, but a tick takes the best nodes wherever they stand: behind any live
node, and with ``depths`` 2 also behind nodes of the same tick. For these the head continues from
its own state. What it then guesses was measured by ``second_level.py``:

    python docs/benchmarks/tree_depths.py --ranks FOLDER/ranks.npz --kind reuse

or, without such a continuation, it is taken to miss the right token in a given share of the
cases in which it finds it from the real state:

    python docs/benchmarks/tree_depths.py --questions 6 --tokens 64
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
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


@dataclass(frozen=True, slots=True)
class Text:
    """An answer with what the head guesses for each of its tokens but the first.

    ``second``: what it guesses from its own state, the token before being given.
    """

    answer: Answer
    rows: Candidates
    second: Candidates | None = None


class DeepSimulation(TreeSimulation):
    """Best first over all live nodes; ``depths.most`` 1 only widens the tree."""

    def __init__(self, text: Text, *, shape: tuple[int, int], depths: Depths):
        stages, width = shape
        super().__init__(
            text.rows, text.answer.tokens, stages=stages, width=width, random=Random(0)
        )
        self._second = text.second
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
            second = self._second if depth > 1 and self._true[node.serial] else None
            row = self._offer(node) if second is None else second[node.position - 1]
            if depth > 1 and self._luck.random() < self._depths.loss:
                right = self._tokens[node.position]
                row = [(-100 if token == right else token, share) for token, share in row]
            self._offers[key] = row
        return self._offers[key]


def rate(texts: Sequence[Text], shape: tuple[int, int], depths: Depths) -> float:
    """Tokens per tick over all answers."""
    ticks = sum(DeepSimulation(text, shape=shape, depths=depths).run().ticks for text in texts)
    return round(sum(len(text.answer.tokens) for text in texts) / ticks, 3)


def read_ranks(path: Path, stages: int, kind: str) -> list[Text]:
    """What ``second_level.py`` measured."""
    with np.load(path) as file:
        arrays = dict(file)
    head = ARRANGEMENTS[stages].head
    edges = np.cumsum(arrays["lengths"])[:-1]
    levels = []
    for name in (f"{head}", f"{head} {kind}"):
        tables = arrays[f"{name}: tokens"].tolist(), arrays[f"{name}: shares"].tolist()
        rows = [list(zip(*row, strict=True)) for row in zip(*tables, strict=True)]
        levels.append([rows[a:b] for a, b in zip([0, *edges], [*edges, None], strict=True)])
    tokens = [tuple(part.tolist()) for part in np.split(arrays["tokens"], edges)]
    return [
        Text(Answer((), answer), first[1:], second[1:])
        for answer, first, second in zip(tokens, *levels, strict=True)
    ]


def measured(stages: int, options: argparse.Namespace) -> list[Text]:
    """The ranks of the shipped head on plain decoding's answers."""
    answers = answers_of(options)
    plan = plan_of(options, replace(ARRANGEMENTS[stages], decoder="ppsd", width=max(WIDTHS)))
    head = Measured(plan)
    return [Text(answer, head.candidates(answer, 1.0)) for answer in answers]


def main() -> int:
    """Print a table as JSON."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ranks", type=Path)
    parser.add_argument("--kind", default="reuse")
    own, others = parser.parse_known_args()
    options = options_of(others)
    report: dict[int, Any] = {}
    for stages in STAGES:
        if own.ranks is None:
            texts = measured(stages, options)
            kinds = {f"two depths, {loss:.0%} missed": Depths(2, loss) for loss in LOSSES}
        else:
            texts = read_ranks(own.ranks, stages, own.kind)
            kinds = {f"two depths, {own.kind}": Depths(2)}
        kinds = {"one depth, any live node": Depths(1), **kinds}
        report[stages] = {
            name: {w: rate(texts, (stages, w), depths) for w in WIDTHS}
            for name, depths in kinds.items()
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
