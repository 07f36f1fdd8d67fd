"""The facts about a model that the layers need, read from its ``config.json``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary scaling. ``kind`` is ``linear`` or ``llama3`` (Llama 3.1's frequency bands).

    ``original_context`` in tokens; ``low`` and ``high`` are the band factors of llama3.
    """

    kind: str
    factor: float
    original_context: int = 0
    low: float = 1.0
    high: float = 4.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a decoder-only transformer (llama, mistral, qwen2, qwen3).

    ``windows`` has one entry a layer: the sliding window in tokens, or None for full attention.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rms_eps: float
    rope_theta: float
    context: int
    tied: bool
    windows: tuple[int | None, ...]
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
