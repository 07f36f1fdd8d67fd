"""Random weights of a given shape: a checkpoint that is made as it is read, and a draft head.

Speed does not depend on what the numbers are, only on their count, so these show how fast a
model of that shape would be. The numbers follow from seed and tensor name alone, so every stage
and process has the same model; they differ between kinds of device and number formats, whose
generators differ.

Scales keep activations finite through any number of layers: matrices map unit variance to unit
variance, and what joins the residual stream is scaled by 1 / sqrt(2 * layers). Two gains keep the
answer from sinking into one repeated token, which attention to everything alike would bring
about: queries and keys are doubled (attention picks a few tokens), and so is what the gated MLP
puts out (the gate halves it).

The text is one that rounding does not change, because wider matrices (trees, EESD) round
otherwise and must not lead to another text, in which every forced guess is wrong. Embeddings
outweigh what all layers add, and row t + 1 of the LM matrix is the embedding of t: behind token t
comes t + 1, and 0 behind the last one. Where embeddings are the LM matrix, t comes again behind t.

Shapes: H hidden, N query heads, M key/value heads, D head dimension, F intermediate,
V vocabulary, K taps.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppsd_cli.errors import AssetError
from ppsd_cli.model.head_files import reduce_output
from ppsd_cli.model.heads import DeepWeights, HeadWeights, Tap, lagged_taps
from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.load import Loader
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.shapes import tensor_shapes
from ppsd_cli.model.spec import ModelSpec

DRAFT_VOCABULARY = 32000
BLOCKS = 2
RANDOM_DEEP, RANDOM_BLOCK = "random:deep", "random:block"
RANDOM_HEADS = (RANDOM_DEEP, RANDOM_BLOCK)
_GAIN = 2.0
_EMBEDDING_STD = 2.0
"""Over about 1 of what the layers add: in the shape ``tiny`` the best token's logit is at least 1.7
above the next one's (0.03 with embeddings of 1), while logits' standard deviation is 1."""
_EMBEDDING, _LM, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_GAINED = ("q_proj.weight", "k_proj.weight", "down_proj.weight", "q_norm.weight", "k_norm.weight")


@dataclass(frozen=True, slots=True)
class Noise:
    """Normal numbers by name, on one device."""

    seed: int
    device: torch.device

    def normal(
        self, name: str, shape: tuple[int, ...], *, std: float, dtype: torch.dtype
    ) -> Tensor:
        """The same numbers every time for the same name, shape and format."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        empty = torch.empty(shape, dtype=dtype, device=self.device)
        return empty.normal_(0.0, std, generator=generator)


class RandomCheckpoint:
    """The tensors of a model of that shape, made when they are read, on ``device``."""

    def __init__(self, spec: ModelSpec, seed: int, device: torch.device) -> None:
        self._spec, self._shapes = spec, tensor_shapes(spec)
        self._noise = Noise(seed, device)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._shapes)

    def has(self, name: str) -> bool:
        """Whether a model of this shape has the tensor ``name``."""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``."""
        if name not in self._shapes:
            raise AssetError(f"random weights of this shape have no tensor {name}")
        return self._shapes[name]

    def tensor(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Make one tensor, as ``dtype`` (default float32): norms constant, matrices normal."""
        found, dtype = self.shape(name), dtype or torch.float32
        if shape is not None and found != tuple(shape):
            raise AssetError(f"{name} has shape {list(found)}, expected {list(shape)}")
        gain = _GAIN if name.endswith(_GAINED) else 1.0
        if len(found) == 1:
            value = 0.0 if name.endswith(".bias") else gain
            if name == _NORM and self._spec.tied:  # logits of the same size as those of others
                value = self._spec.hidden**-0.5 / _EMBEDDING_STD
            return torch.full(found, value, dtype=dtype, device=self._noise.device)
        if name in (_EMBEDDING, _LM):
            return self._vocabulary(name, dtype)
        std = gain * found[1] ** -0.5
        if name.endswith(_INTO_RESIDUAL):
            std *= residual_scale(self._spec)
        return self._noise.normal(name, found, std=std, dtype=dtype)

    def _vocabulary(self, name: str, dtype: torch.dtype) -> Tensor:
        """Embeddings or LM matrix [V, H]: rows 1 to V, or 0 to V - 1, of the same V + 1 rows, of
        which the last one is the first one too. Nothing is moved, and no second matrix is made.
        """
        std = _EMBEDDING_STD if name == _EMBEDDING else self._spec.hidden**-0.5
        size = (self._spec.vocabulary + 1, self._spec.hidden)
        rows = self._noise.normal(_EMBEDDING, size, std=std, dtype=dtype)
        rows[0] = rows[-1]
        return rows[1:] if name == _EMBEDDING else rows[:-1]

    def nbytes(self, names: Iterable[str], dtype: torch.dtype | None = None) -> int:
        """Bytes that ``names`` take together as ``dtype`` (default float32)."""
        return (
            sum(math.prod(self.shape(name)) for name in names) * (dtype or torch.float32).itemsize
        )


def residual_scale(spec: ModelSpec) -> float:
    """What keeps the sum over all layers' outputs near unit variance."""
    return float((2 * spec.layers) ** -0.5)


def random_taps(head: str, split: tuple[int, ...], *, depth: int = 1) -> tuple[Tap, ...]:
    """What a random head reads: the exit layer and, if deep, the deepest state at each lag.

    ``depth``: depths of guesses that enter in one tick; see ``lagged_taps``.
    """
    assert head in RANDOM_HEADS
    return lagged_taps(split, depth=depth) if head == RANDOM_DEEP else (Tap(split[0], 0),)


def random_head(
    loader: Loader,
    lm_matrix: Tensor,
    *,
    taps: tuple[Tap, ...],
    blocks: int = BLOCKS,
    draft_vocab: int = DRAFT_VOCABULARY,
    depth: int = 1,
) -> HeadWeights:
    """A draft head of random numbers that works as long as a trained one: deep with several taps.

    Its guesses are worthless, also on random weights: a negative norm puts the likeliest token
    last. Forced drafts stand in for them. ``lm_matrix`` [H, V] is the model's own; the first
    ``draft_vocab`` columns are used, all where the model has no more.
    ``depth`` 2: with a second level.
    """
    spec, far = loader.spec, len(taps) - 1
    maker = _HeadMaker(loader, Noise(0, loader.device))
    h, kv = spec.hidden, 2 * spec.kv_heads * spec.head_dim
    ids = None
    if draft_vocab < spec.vocabulary:
        ids = torch.arange(draft_vocab, device=loader.device)
    deep = None
    if far:
        deep = DeepWeights(
            norms=maker.ones(far, h),
            kv=maker.matrix("head.deep.kv", far, h, kv),
            fuse=maker.matrix("head.deep.fuse", far, h, h),
        )
    output = reduce_output(-loader.final_norm(), lm_matrix, spec.rms_eps, ids)
    layers = tuple(maker.block(f"head.blocks.{i}.") for i in range(blocks))
    second = None
    if depth > 1:
        second = SecondLevel(
            state_norm=maker.ones(h),
            token_norm=maker.ones(h),
            fuse=maker.matrix("head.second.fuse", 2 * h, h),
            layer=maker.block("head.second.layer."),
            norm=output.norm,
        )
    return HeadWeights(taps, output, layers, deep=deep, second=second)


@dataclass(frozen=True, slots=True)
class _HeadMaker:
    """Tensors in the layouts of a head file: matrices [in, out]."""

    loader: Loader
    noise: Noise

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self.loader.dtype, device=self.noise.device)

    def matrix(self, name: str, *shape: int, scale: float = 1.0) -> Tensor:
        std = scale * shape[-2] ** -0.5
        return self.noise.normal(name, shape, std=std, dtype=self.loader.dtype)

    def block(self, at: str) -> LayerWeights:
        """A decoder layer with every tensor that the model's own layers have."""
        spec = self.loader.spec
        h, f, d = spec.hidden, spec.intermediate, spec.head_dim
        n, kv, scale = spec.heads * d, 2 * spec.kv_heads * d, residual_scale(spec)
        return LayerWeights(
            input_norm=self.ones(h),
            qkv=self.matrix(at + "qkv", h, n + kv),
            output=self.matrix(at + "output", n, h, scale=scale),
            mlp_norm=self.ones(h),
            gate_up=self.matrix(at + "gate_up", h, 2 * f),
            down=self.matrix(at + "down", f, h, scale=scale),
            qkv_bias=self.ones(n + kv) * 0 if spec.qkv_bias else None,
            output_bias=self.ones(h) * 0 if spec.output_bias else None,
            gate_up_bias=self.ones(2 * f) * 0 if spec.mlp_bias else None,
            down_bias=self.ones(h) * 0 if spec.mlp_bias else None,
            q_norm=self.ones(d) if spec.qk_norm else None,
            k_norm=self.ones(d) if spec.qk_norm else None,
        )
