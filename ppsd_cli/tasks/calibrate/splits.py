"""The best partition of the layers behind an exit over stages of unequal speed. Pure."""

from collections import deque
from collections.abc import Callable

Cost = Callable[[tuple[int, ...]], float]
_LEVEL = 500


def best_split(
    layers: int, *, stages: int, exit_layer: int, taps: tuple[int, ...], cost: Cost
) -> tuple[int, ...] | None:
    """The split with that exit and the least cost; None where there is none.

    ``taps``: depths that the head reads at the lags 0, 1, ...; each must lie in a stage not later
    than its lag. Layers move between stages as long as the cost falls. Where it stays level because
    several stages are the busiest, up to ``_LEVEL`` splits of the same cost are walked through.
    """
    split = _first(layers, stages, exit_layer, taps)
    while split is not None:
        better = _improved(split, taps, cost)
        if better is None:
            return split
        split = better
    return None


def _improved(split: tuple[int, ...], taps: tuple[int, ...], cost: Cost) -> tuple[int, ...] | None:
    """A split of less cost that moves of layers reach without raising it; None: there is none."""
    level, known, waiting = cost(split), {split}, deque([split])
    while waiting and len(known) < _LEVEL:
        reached = [each for each in _moved(waiting.popleft(), taps) if each not in known]
        costs = [cost(each) for each in reached]
        if costs and min(costs) < level:
            return reached[costs.index(min(costs))]
        known.update(reached)
        waiting += [each for each, own in zip(reached, costs, strict=True) if own == level]
    return None


def _first(
    layers: int, stages: int, exit_layer: int, taps: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Any split that fits: even where that is in time for the head, else as early as it asks."""
    rest = layers - exit_layer
    if stages < 2 or rest < stages - 1:
        return None
    ends = [exit_layer]
    for stage in range(1, stages):
        even = exit_layer + rest * stage // (stages - 1)
        earliest = taps[stage] if stage < len(taps) else 0
        latest = layers - (stages - 1 - stage)
        ends.append(min(latest, max(even, earliest, ends[-1] + 1)))
    ends[-1] = layers
    split = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    return split if in_time(split, taps) and min(split) > 0 else None


def _moved(split: tuple[int, ...], taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All splits with one layer moved from one stage behind the exit to another."""
    found = []
    for source in range(1, len(split)):
        for target in range(1, len(split)):
            if source == target or split[source] < 2:
                continue
            moved = list(split)
            moved[source] -= 1
            moved[target] += 1
            if in_time(tuple(moved), taps):
                found.append(tuple(moved))
    return found


def by_stage(taps: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The deepest layer that a head reads of each stage, where ``depth`` lags share a stage."""
    return tuple(max(taps[lag : lag + depth]) for lag in range(0, len(taps), depth))


def in_time(split: tuple[int, ...], taps: tuple[int, ...]) -> bool:
    """Whether every depth that the head reads has been run by its lag."""
    return all(depth <= sum(split[: lag + 1]) for lag, depth in enumerate(taps))
