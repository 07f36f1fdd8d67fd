"""What a place of weights can be: a model folder, or ``random:SHAPE[:SEED]``.

A place travels as text to stage processes, so random weights are made where they are used.
"""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ppsd_cli.errors import ConfigError
from ppsd_cli.model.random_weights import RandomCheckpoint
from ppsd_cli.model.shapes import SHAPES
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.model.spec_reader import read_spec
from ppsd_cli.model.weights import Checkpoint

_PREFIX = "random:"
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Random weights of a named shape."""

    shape: str
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "RandomModel":
        """``SHAPE`` or ``SHAPE:SEED``; ConfigError for an unknown shape or a bad seed."""
        shape, colon, seed = text.partition(":")
        if shape not in SHAPES:
            near = difflib.get_close_matches(shape.lower(), SHAPES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"no random weights of shape {shape!r}; {hint}{_known()}")
        if not colon:
            return cls(shape)
        if not (seed.isascii() and seed.isdigit() and int(seed[:20]) <= _LARGEST_SEED):
            raise ConfigError(
                f"random weights {text!r}: the seed must be a number from 0 to {_LARGEST_SEED}"
            )
        return cls(shape, int(seed))

    @property
    def place(self) -> str:
        """What ``open_checkpoint`` and ``spec_of`` take."""
        return f"{_PREFIX}{self.shape}:{self.seed}"

    @property
    def model_hash(self) -> str:
        """Stands for the weights' checksum: the same shape and seed, the same model."""
        return f"sha256:{hashlib.sha256(self.place.encode()).hexdigest()}"

    @property
    def spec(self) -> ModelSpec:
        """The shape itself."""
        return SHAPES[self.shape]


def random_model(place: str | Path) -> RandomModel | None:
    """The random model that ``place`` names; None for a folder."""
    text = str(place)
    return RandomModel.parse(text.removeprefix(_PREFIX)) if text.startswith(_PREFIX) else None


def spec_of(place: str | Path) -> ModelSpec:
    """The shape of the model at ``place``; errors as ``read_spec`` and ``RandomModel.parse``."""
    model = random_model(place)
    return read_spec(Path(place)) if model is None else model.spec


def open_checkpoint(place: str | Path, device: torch.device) -> Checkpoint | RandomCheckpoint:
    """The weights at ``place``; random ones are made on ``device``."""
    model = random_model(place)
    if model is None:
        return Checkpoint(Path(place))
    return RandomCheckpoint(model.spec, model.seed, device)


def _known() -> str:
    return f"there are: {', '.join(SHAPES)}"
