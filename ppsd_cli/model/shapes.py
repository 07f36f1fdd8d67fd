"""Named shapes of public models, for measuring without their weights.

Sizes are those of the published configurations; rotary scaling is left out, which costs no time.
"""

import math
from collections.abc import Mapping

from ppsd_cli.model.spec import ModelSpec


def _llama(
    layers: int,
    sizes: tuple[int, int],
    heads: tuple[int, int, int],
    *,
    tied: bool,
    vocabulary: int = 128256,
    theta: float = 500000.0,
) -> ModelSpec:
    """``sizes``: hidden, intermediate. ``heads``: query heads, key/value heads, their dimension."""
    return ModelSpec(
        architecture="llama",
        layers=layers,
        hidden=sizes[0],
        intermediate=sizes[1],
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=heads[2],
        vocabulary=vocabulary,
        rms_eps=1e-5,
        rope_theta=theta,
        context=8192 if vocabulary < 128256 else 131072,
        tied=tied,
        windows=(None,) * layers,
    )


_QWEN3_4B = ModelSpec(
    architecture="qwen3",
    layers=36,
    hidden=2560,
    intermediate=9728,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151936,
    rms_eps=1e-6,
    rope_theta=1e6,
    context=40960,
    tied=True,
    windows=(None,) * 36,
    qk_norm=True,
)
SHAPES: Mapping[str, ModelSpec] = {
    "llama-1b": _llama(16, (2048, 8192), (32, 8, 64), tied=True),
    "llama-3b": _llama(28, (3072, 8192), (24, 8, 128), tied=True),
    "llama-8b": _llama(32, (4096, 14336), (32, 8, 128), tied=False),
    "llama-70b": _llama(80, (8192, 28672), (64, 8, 128), tied=False),
    "qwen3-4b": _QWEN3_4B,
    "smollm2-135m": _llama(
        30, (576, 1536), (9, 3, 64), tied=True, vocabulary=49152, theta=100000.0
    ),
    "tiny": _llama(6, (64, 128), (4, 2, 16), tied=False, vocabulary=512, theta=10000.0),
}


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape ([out, in] for matrices) of every tensor in a checkpoint of that model."""
    h, d, f = spec.hidden, spec.head_dim, spec.intermediate
    n, m = spec.heads * d, spec.kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocabulary, h),
        "model.norm.weight": (h,),
    }
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocabulary, h)
    matrices = {"q": (n, h), "k": (m, h), "v": (m, h), "o": (h, n)}
    mlp = {"gate": (f, h), "up": (f, h), "down": (h, f)}
    for index in range(spec.layers):
        at = f"model.layers.{index}."
        shapes[at + "input_layernorm.weight"] = (h,)
        shapes[at + "post_attention_layernorm.weight"] = (h,)
        if spec.qk_norm:
            shapes[at + "self_attn.q_norm.weight"] = (d,)
            shapes[at + "self_attn.k_norm.weight"] = (d,)
        for name, shape in matrices.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = shape
            if spec.output_bias if name == "o" else spec.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in mlp.items():
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
            if spec.mlp_bias:
                shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
    return shapes


def parameters(spec: ModelSpec) -> int:
    """Number of weights; shared embeddings count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(spec).values())
