"""The slot-indexed key/value cache and attention over it.

Shapes: W rows, N query heads, M key/value heads, G = N / M, D head dimension, S slots,
T = length, the slots that this call may see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the W rows of one call belong.

    ``positions`` [W] for the rotary embedding, ``slots`` [W] for the cache, ``length``: slots
    that may be seen. Without ``tree_mask`` the rows are a chain: slot = position, consecutive,
    and row i sees the slots up to its own. ``tree_mask`` [W, length] says otherwise; then
    ``slot_positions`` [length] are the positions of what lies in the slots, for sliding windows,
    and ``ancestors`` [W, L] the slots of the rows behind each, from itself on, for draft heads.
    """

    positions: Tensor
    slots: Tensor
    length: int
    tree_mask: Tensor | None = None
    slot_positions: Tensor | None = None
    ancestors: Tensor | None = None

    @classmethod
    def chain(cls, start: int, count: int, device: torch.device | str = "cpu") -> "Rows":
        """``count`` consecutive tokens from position ``start`` on."""
        positions = torch.arange(start, start + count, device=device)
        return cls(positions, positions, start + count)

    def behind(self, lag: int) -> Tensor:
        """Slots [W] of the tokens ``lag`` positions before each row; negative before the start."""
        return self.positions - lag if self.ancestors is None else self.ancestors[:, lag]


class LayerCache:
    """Keys and values [M, S, D] of one layer, indexed by slot.

    A row is never cleared: rows travel in order, and whoever may see a slot comes after the
    right token was written there.
    """

    def __init__(
        self, *, kv_heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store keys and values [W, M, D] at ``slots`` [W]."""
        self.keys.index_copy_(1, slots, keys.transpose(0, 1))
        self.values.index_copy_(1, slots, values.transpose(0, 1))

    def nbytes(self) -> int:
        """Size in bytes."""
        return self.keys.nbytes + self.values.nbytes


def visible(rows: Rows, window: int | None) -> tuple[int, Tensor | None]:
    """First slot worth reading, and the mask [W, length - first] (None: all are visible).

    ``window`` is the sliding window in tokens: a row sees itself and window - 1 before it.
    """
    count = rows.positions.shape[0]
    if rows.tree_mask is not None:
        if window is None or rows.slot_positions is None:
            return 0, rows.tree_mask
        near = rows.positions[:, None] - rows.slot_positions[None, :] < window
        return 0, rows.tree_mask & near
    first = 0 if window is None else max(0, rows.length - count - window + 1)
    if count == 1:
        return first, None
    slots = torch.arange(first, rows.length, device=rows.slots.device)
    behind = rows.slots[:, None] - slots[None, :]
    mask = behind >= 0
    if window is not None:
        mask &= behind < window
    return first, mask


def attend(q: Tensor, cache: LayerCache, rows: Rows, view: tuple[int, Tensor | None]) -> Tensor:
    """Attention of q [W, N, D] over the visible slots of the cache: [W, N * D].

    The G query heads of a group become G * W query rows, so that grouped queries with a mask
    stay on the fast paths; ``view`` comes from ``visible``.
    """
    first, mask = view
    w, n, d = q.shape
    m = cache.keys.shape[0]
    keys, values = cache.keys[:, first : rows.length], cache.values[:, first : rows.length]
    grouped = q.reshape(w, m, n // m, d).permute(1, 2, 0, 3).reshape(m, -1, d)  # [M, G * W, D]
    if mask is not None:
        mask = mask.repeat(n // m, 1)  # [G * W, T]
    out = functional.scaled_dot_product_attention(
        grouped[None], keys[None], values[None], attn_mask=mask
    )[0]
    return out.reshape(m, n // m, w, d).permute(2, 0, 1, 3).reshape(w, n * d)
