"""From checkpoint tensors to the layouts of the lean layers. Reads only what is asked for."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.spec import ModelSpec


class TensorSource(Protocol):
    """Where tensors come from: files (``weights.Checkpoint``), or made at random."""

    def tensor(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The tensor ``name`` as ``dtype``; an error where it has another shape."""
        ...


@dataclass(frozen=True, slots=True)
class Loader:
    """Reads tensors of one checkpoint for one device and number format."""

    checkpoint: TensorSource
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device

    def layer(self, index: int) -> LayerWeights:
        """Weights of layer ``index``, with q, k, v and gate, up joined."""
        spec = self.spec
        at = f"model.layers.{index}."
        n, m = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        h, f = spec.hidden, spec.intermediate
        qkv = [("q", n), ("k", m), ("v", m)]
        gate_up = [("gate", f), ("up", f)]
        attention, mlp = at + "self_attn.", at + "mlp."
        return LayerWeights(
            input_norm=self.vector(at + "input_layernorm.weight", h),
            qkv=self._matrix([(f"{attention}{x}_proj.weight", (o, h)) for x, o in qkv]),
            output=self._matrix([(attention + "o_proj.weight", (h, n))]),
            mlp_norm=self.vector(at + "post_attention_layernorm.weight", h),
            gate_up=self._matrix([(f"{mlp}{x}_proj.weight", (o, h)) for x, o in gate_up]),
            down=self._matrix([(mlp + "down_proj.weight", (h, f))]),
            qkv_bias=self._bias([(f"{attention}{x}_proj.bias", o) for x, o in qkv], spec.qkv_bias),
            output_bias=self._bias([(attention + "o_proj.bias", h)], spec.output_bias),
            gate_up_bias=self._bias(
                [(f"{mlp}{x}_proj.bias", o) for x, o in gate_up], spec.mlp_bias
            ),
            down_bias=self._bias([(mlp + "down_proj.bias", h)], spec.mlp_bias),
            q_norm=self._norm(attention + "q_norm.weight"),
            k_norm=self._norm(attention + "k_norm.weight"),
        )

    def embedding(self) -> Tensor:
        """Token embeddings as [H, V]: the layout of the LM matrix, which may be the same tensor."""
        return self._vocabulary("model.embed_tokens.weight")

    def lm_matrix(self) -> Tensor:
        """The LM matrix [H, V]; for tied models the embeddings."""
        name = "lm_head.weight"
        return self.embedding() if self.spec.tied else self._vocabulary(name)

    def final_norm(self) -> Tensor:
        """Weight [H] of the norm before the LM matrix."""
        return self.vector("model.norm.weight", self.spec.hidden)

    def vector(self, name: str, size: int) -> Tensor:
        """A one-dimensional tensor."""
        return self._read(name, (size,)).to(self.device)

    def _norm(self, name: str) -> Tensor | None:
        return self.vector(name, self.spec.head_dim) if self.spec.qk_norm else None

    def _bias(self, parts: list[tuple[str, int]], present: bool) -> Tensor | None:
        if not present:
            return None
        return torch.cat([self._read(name, (size,)) for name, size in parts]).to(self.device)

    def _vocabulary(self, name: str) -> Tensor:
        return self._matrix([(name, (self.spec.vocabulary, self.spec.hidden))])

    def _matrix(self, parts: list[tuple[str, tuple[int, int]]]) -> Tensor:
        """Checkpoint matrices [out, in], joined along out, as one [in, out] tensor."""
        tensors = [self._read(name, shape) for name, shape in parts]
        return lay_out(torch.cat(tensors) if len(tensors) > 1 else tensors[0], self.device)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.checkpoint.tensor(name, dtype=self.dtype, shape=shape)


def lay_out(weight: Tensor, device: torch.device) -> Tensor:
    """A matrix [out, in] as [in, out], in the memory order that the device reads fastest.

    float32 on a CPU: rows of the result contiguous. Otherwise the original order, seen
    transposed, for which narrow formats and GPUs have faster kernels.
    """
    if device.type == "cpu" and weight.dtype == torch.float32:
        return weight.t().contiguous()
    return weight.to(device).contiguous().t()
