"""Training checkpoints: one safetensors file with everything, replaced atomically.

The settings and the step lie in the file's metadata as JSON, so weights and step can never be of
two different saves. The order of the data is a function of seed and step and needs no state.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ppsd_cli.errors import AssetError, ConfigError
from ppsd_cli.model.weights import save_tensors
from ppsd_cli.tasks.head_init import TrainableHead
from ppsd_cli.tasks.optimize import Optimizer

FILE = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is: ``step`` steps done in ``elapsed`` seconds."""

    step: int
    elapsed: float


def save_checkpoint(
    folder: Path,
    heads: Sequence[TrainableHead],
    optimizer: Optimizer,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Write ``folder/checkpoint.safetensors``; the old one stays until the new one is complete."""
    tensors = {}
    for head in heads:
        for name, master in head.masters.items():
            at = f"{head.plan.name}/{name}"
            tensors[at] = master.detach()
            for moment, value in optimizer.moments(master).items():
                tensors[f"{at}/{moment}"] = value
            if head.output.token_ids is not None:
                tensors[f"{head.plan.name}/token_ids"] = head.output.token_ids.clone()
    state = {"step": progress.step, "elapsed": progress.elapsed, "settings": settings}
    save_tensors(folder / FILE, tensors, {"ppsd": json.dumps(state)})


def load_checkpoint(
    folder: Path,
    heads: Sequence[TrainableHead],
    optimizer: Optimizer,
    settings: dict[str, Any],
) -> Progress:
    """Put a checkpoint back into ``heads`` and ``optimizer``.

    AssetError where it is missing or damaged, ConfigError where it was made with other settings
    (each is named, with both values).
    """
    path = folder / FILE
    if not path.exists():
        raise AssetError(f"{path}: nothing to resume; leave out --resume to start")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = json.loads(file.metadata()["ppsd"])
            _compare(state["settings"], settings, path)
            names = set(file.keys())
            with torch.no_grad():
                for head in heads:
                    _restore(file, names, head, optimizer)
        return Progress(int(state["step"]), float(state["elapsed"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{path}: not a checkpoint of these heads ({error})") from error


def _restore(file: Any, names: set[str], head: TrainableHead, optimizer: Optimizer) -> None:
    for name, master in head.masters.items():
        at = f"{head.plan.name}/{name}"
        master.copy_(file.get_tensor(at))
        if f"{at}/step" in names:
            optimizer.restore(master, {m: file.get_tensor(f"{at}/{m}") for m in _MOMENTS})
    ids = head.output.token_ids
    if ids is not None and not torch.equal(
        file.get_tensor(f"{head.plan.name}/token_ids"), ids.cpu()
    ):
        raise ValueError("another draft vocabulary: the training text has changed")


def _compare(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ConfigError naming every setting that differs."""
    plain = json.loads(json.dumps(now))
    different = [
        f"{key} {saved.get(key)!r}, now {plain.get(key)!r}"
        for key in sorted({*saved, *plain})
        if saved.get(key) != plain.get(key)
    ]
    if different:
        raise ConfigError(f"{path} was made with other settings: {'; '.join(different)}")
