"""What two depths per tick bring, simulated from ranks that ``second_level.py`` measured.

python docs/benchmarks/tree_depths.py FOLDER/ranks.npz --kind reuse
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from ppsd_cli.core.tree_simulation import Guesses, TreeSimulation

HEADS = {2: "smollm2-135m-2stage", 3: "smollm2-135m-3stage"}
WIDTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Text:
    """An answer with what the head guesses for each of its tokens but the first.

    ``second``: what it guesses from its own state, the token before being given.
    """

    tokens: tuple[int, ...]
    rows: Guesses
    second: Guesses


def rate(texts: Sequence[Text], shape: tuple[int, int], *, depth: int) -> float:
    """Tokens per tick over all answers, by (stages, width)."""
    stages, width = shape
    random, ticks = Random(0), 0
    for text in texts:
        second = text.second if depth > 1 else None
        simulation = TreeSimulation(
            text.rows, text.tokens, stages=stages, width=width, random=random, second=second
        )
        ticks += simulation.run().ticks
    return round(sum(len(text.tokens) for text in texts) / ticks, 3)


def read_ranks(path: Path, head: str, kind: str) -> list[Text]:
    """What ``second_level.py`` measured for this head."""
    with np.load(path) as file:
        arrays = dict(file)
    edges = np.cumsum(arrays["lengths"])[:-1]
    levels = []
    for name in (head, f"{head} {kind}"):
        tables = arrays[f"{name}: tokens"].tolist(), arrays[f"{name}: shares"].tolist()
        rows = [list(zip(*row, strict=True)) for row in zip(*tables, strict=True)]
        levels.append([rows[a:b] for a, b in zip([0, *edges], [*edges, None], strict=True)])
    answers = [tuple(part.tolist()) for part in np.split(arrays["tokens"], edges)]
    return [
        Text(answer, first[1:], second[1:])
        for answer, first, second in zip(answers, *levels, strict=True)
    ]


def main() -> int:
    """Print tokens per tick by stages, depth and width as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ranks", type=Path)
    parser.add_argument("--kind", default="reuse", help="mlp, block or reuse")
    options = parser.parse_args()
    report = {}
    for stages, head in HEADS.items():
        texts = read_ranks(options.ranks, head, options.kind)
        report[stages] = {
            depth: {w: rate(texts, (stages, w), depth=depth) for w in WIDTHS} for depth in (1, 2)
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
