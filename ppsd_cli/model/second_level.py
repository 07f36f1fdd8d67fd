"""How a draft head goes on from its own state, so that one tick enters guesses of two depths.

For the token x behind position p - 1 it gets the head's state there (before the output norm) and
x's embedding, and guesses the token behind x. What joins both is a product of their norms, added
to the state; then follows one decoder layer at position p, whose query sees the keys of the
head's last block up to p - 1 and its own. So a pipeline needs no further cache. (EAGLE, arXiv
2401.15077, feeds states and tokens to a drafter in this manner.)

Shapes: H hidden, R rows, N query heads, M key/value heads, D head dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ppsd_cli.model.layers import LayerWeights, rms_norm


@dataclass(frozen=True, slots=True)
class SecondLevel:
    """Tensors of the second level: ``state_norm``, ``token_norm`` and ``norm`` [H] (the last one
    before the head's LM matrix), ``fuse`` [2 * H, H] (state first), and one decoder layer."""

    state_norm: Tensor
    token_norm: Tensor
    fuse: Tensor
    layer: LayerWeights
    norm: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "SecondLevel":
        """From tensors by the names that ``tensors`` gives."""
        names = [f.name for f in fields(LayerWeights) if f"layer.{f.name}" in tensors]
        layer = LayerWeights(**{name: tensors[f"layer.{name}"] for name in names})
        return cls(
            state_norm=tensors["state_norm"],
            token_norm=tensors["token_norm"],
            fuse=tensors["fuse"],
            layer=layer,
            norm=tensors["norm"],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those of the layer as ``layer.NAME``."""
        own = {n: getattr(self, n) for n in ("state_norm", "token_norm", "fuse", "norm")}
        return own | {f"layer.{name}": t for name, t in self.layer.tensors().items()}

    def join(self, state: Tensor, token: Tensor, eps: float) -> Tensor:
        """The layer's input [..., H] from the state before a token and its embedding [..., H]."""
        parts = rms_norm(state, self.state_norm, eps), rms_norm(token, self.token_norm, eps)
        return state + torch.cat(parts, dim=-1) @ self.fuse
