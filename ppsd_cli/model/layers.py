"""The lean decoder layer: pieces that decoding and training share.

Shapes: W rows (tokens of this call), H hidden, N query heads, M key/value heads, G = N / M,
D head dimension, F intermediate. A leading batch dimension is allowed in ``project`` and
``finish``. Every matrix has the shape [in, out]; ``load.lay_out`` decides its order in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from ppsd_cli.model.rope import rotate
from ppsd_cli.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors of one decoder layer; None where the architecture has no such tensor."""

    input_norm: Tensor
    """[H]"""
    qkv: Tensor
    """[H, (N + 2M) * D]"""
    output: Tensor
    """[N * D, H]"""
    mlp_norm: Tensor
    """[H]"""
    gate_up: Tensor
    """[H, 2F], gate first"""
    down: Tensor
    """[F, H]"""
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerWeights":
        """The same layer with ``function`` applied to every tensor."""
        return LayerWeights(**{name: function(t) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by field name, without those that are absent."""
        pairs = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in pairs.items() if v is not None}


@dataclass(frozen=True, slots=True)
class Shape:
    """What the layer functions need to know of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float

    @classmethod
    def of(cls, spec: ModelSpec) -> "Shape":
        """The layer shape of a model."""
        return cls(spec.heads, spec.kv_heads, spec.head_dim, spec.rms_eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 for narrower types."""
    if x.dtype == torch.float32:
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return functional.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [in, out], plus bias."""
    y = x @ weight
    return y if bias is None else y + bias


def project(
    x: Tensor, w: LayerWeights, shape: Shape, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [..., N, D], keys and values [..., M, D] of x [..., H]; rotary tables [..., 1, D]."""
    qkv = linear(rms_norm(x, w.input_norm, shape.rms_eps), w.qkv, w.qkv_bias)
    return split_heads(qkv, w, shape, cos, sin)


def split_heads(
    qkv: Tensor, w: LayerWeights, shape: Shape, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut [..., (N + 2M) * D] into normalised, rotated queries and keys, and values."""
    n, m = shape.heads, shape.kv_heads
    qkv = qkv.view(*qkv.shape[:-1], n + 2 * m, shape.head_dim)
    if w.q_norm is None or w.k_norm is None:
        rotated = rotate(qkv[..., : n + m, :], cos, sin)
        return rotated[..., :n, :], rotated[..., n:, :], qkv[..., n + m :, :]
    q = rotate(rms_norm(qkv[..., :n, :], w.q_norm, shape.rms_eps), cos, sin)
    k = rotate(rms_norm(qkv[..., n : n + m, :], w.k_norm, shape.rms_eps), cos, sin)
    return q, k, qkv[..., n + m :, :]


def finish(x: Tensor, attended: Tensor, w: LayerWeights, shape: Shape) -> Tensor:
    """The rest of the layer: output projection, residuals and the gated MLP.

    ``x`` [..., H] is the layer's input, ``attended`` [..., N * D] what attention gave.
    """
    x = x + linear(attended, w.output, w.output_bias)
    gate, up = linear(rms_norm(x, w.mlp_norm, shape.rms_eps), w.gate_up, w.gate_up_bias).chunk(
        2, dim=-1
    )
    return x + linear(functional.silu(gate) * up, w.down, w.down_bias)
