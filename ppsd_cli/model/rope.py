"""Rotary position embedding: the tables, and their use (Su et al., arXiv 2104.09864)."""

import math

import torch
from torch import Tensor

from ppsd_cli.model.spec import ModelSpec


def rope_tables(spec: ModelSpec, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [length, head_dim] in float32, for positions 0 to length-1.

    The sines of the first half are negative, so that ``rotate`` needs one roll and no negation.
    """
    frequencies = _frequencies(spec)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``heads`` [..., heads, head_dim] by tables of shape [..., 1, head_dim]."""
    half = heads.shape[-1] // 2
    return torch.addcmul(heads * cos, heads.roll(half, dims=-1), sin)


def _frequencies(spec: ModelSpec) -> Tensor:
    """Angle per position of each pair [head_dim / 2], scaled as the model asks."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    # Llama 3.1: long waves are slowed by the factor, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequencies
    context = scaling.original_context
    blend = (context / wavelength - scaling.low) / (scaling.high - scaling.low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slowed = torch.where(wavelength > context / scaling.low, frequencies / scaling.factor, blended)
    return torch.where(wavelength < context / scaling.high, frequencies, slowed)
