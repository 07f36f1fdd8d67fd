"""Who sees whom in a tree: each stage's own account of slots, parents and positions.

A node sees what its parent sees, and itself. Later stages know nothing of what was accepted or
void: nodes reach every stage in the order of their entry, and a slot is taken again only when
nobody who may see its old content is still to come.

Shapes: W rows, S slots, L lags.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ppsd_cli.model.cache import Rows

_NONE = -1


class Branches:
    """Views of the newest nodes of one answer, by slot.

    ``keep``: levels whose nodes may still become parents; one more than the stages, because a
    correction stands on a node that entered that many levels ago.
    """

    def __init__(self, slots: int, *, keep: int, device: torch.device | str = "cpu") -> None:
        self._keep, self._device = keep, device
        self._positions = torch.zeros(slots, dtype=torch.int64, device=device)
        self._parents = torch.full((slots,), _NONE, dtype=torch.int64)
        self._views: dict[int, tuple[Tensor, int]] = {}
        self._levels: deque[tuple[int, ...]] = deque()

    def chain(self, start: int, count: int) -> None:
        """Tokens whose slots are their positions: a prompt chunk, or a token of a chain."""
        end = start + count
        self._positions[start:end] = torch.arange(start, end, device=self._device)
        self._parents[start:end] = torch.arange(start - 1, end - 1)
        seen = torch.zeros(len(self._positions), dtype=torch.bool, device=self._device)
        seen[:end] = True
        self._add_level({end - 1: (seen, end)})

    def enter(self, slots: Sequence[int], parents: Sequence[int]) -> Rows:
        """A level of nodes, each in its slot behind the node in its place of ``parents``.

        A parent may be of the same level; it comes before its children.
        """
        level: dict[int, tuple[Tensor, int]] = {}
        for slot, parent in zip(slots, parents, strict=True):
            view = level.get(parent) or self._views.get(parent)
            assert view is not None, "a node stands on one that is long void"
            seen, end = view
            seen = seen.clone()
            seen[slot] = True
            level[slot] = seen, max(end, slot + 1)
            self._parents[slot] = parent
            self._positions[slot] = self._positions[parent] + 1
        self._add_level(level)
        return self.rows(slots)

    def rows(self, slots: Sequence[int]) -> Rows:
        """Nodes that have entered, as rows of one call, in this order."""
        views = [self._views[slot] for slot in slots]
        length = max(end for _, end in views)
        where = torch.tensor(slots, device=self._device)
        mask = torch.stack([seen[:length] for seen, _ in views])
        return Rows(self._positions[where], where, length, mask, self._positions[:length])

    def ancestors(self, slots: Sequence[int], lags: int) -> Tensor:
        """Slots [W, L] of each node's ancestors from itself (lag 0) to lag L - 1; -1 for none."""
        found = [torch.tensor(slots)]
        for _ in range(1, lags):
            last = found[-1]
            found.append(torch.where(last == _NONE, _NONE, self._parents[last]))
        return torch.stack(found, dim=1).to(self._device)

    def _add_level(self, level: dict[int, tuple[Tensor, int]]) -> None:
        for slot in level:  # dropped and added again, so that the newest keeps its own
            self._views.pop(slot, None)
        self._views |= level
        self._levels.append(tuple(level))
        if len(self._levels) > self._keep:
            newer = {slot for each in list(self._levels)[1:] for slot in each}
            for slot in self._levels.popleft():
                if slot not in newer:
                    del self._views[slot]
