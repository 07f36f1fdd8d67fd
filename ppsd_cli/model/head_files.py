"""Head files: ``head.safetensors`` beside ``head.json`` in one folder. Nothing is unpickled."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.errors import AssetError
from ppsd_cli.files import replace_bytes
from ppsd_cli.model.heads import DeepWeights, HeadWeights, MlpWeights, Tap
from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.load import Loader
from ppsd_cli.model.stage import Output
from ppsd_cli.model.weights import Checkpoint, save_tensors

FORMAT_VERSION = 1
KINDS = ("raw", "mlp", "block", "deep")
_LAYER_FIELDS = [f.name for f in fields(LayerWeights)]


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """What a head file says of itself. ``training`` is free-form: settings and figures."""

    kind: str
    model_hash: str
    model_name: str
    hidden: int
    taps: tuple[Tap, ...]
    blocks: int
    draft_vocabulary: int | None
    stages: int
    training: dict[str, Any]

    @property
    def exit_layer(self) -> int:
        """The depth that the head drafts from."""
        return self.taps[0].depth


def read_info(folder: Path) -> HeadInfo:
    """The description in ``folder``; AssetError where it is missing, damaged or too new."""
    path = folder / "head.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise AssetError(
                f"{path}: head format {version}, this ppsd reads {FORMAT_VERSION}; train it again"
            )
        info = HeadInfo(
            kind=data["kind"],
            model_hash=data["model_hash"],
            model_name=data["model_name"],
            hidden=int(data["hidden"]),
            taps=tuple(Tap(int(depth), int(lag)) for depth, lag in data["taps"]),
            blocks=int(data["blocks"]),
            draft_vocabulary=data["draft_vocabulary"],
            stages=int(data["stages"]),
            training=data.get("training", {}),
        )
    except FileNotFoundError as error:
        raise AssetError(f"{path}: no such head (train one with `ppsd train-head`)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{path}: not a head description ({error})") from error
    _check_info(info, path)
    return info


def _check_info(info: HeadInfo, path: Path) -> None:
    if info.kind not in KINDS:
        raise AssetError(f"{path}: head kind {info.kind!r}; known are {', '.join(KINDS)}")
    lags = [tap.lag for tap in info.taps]
    if not lags or lags != list(range(len(lags))):
        raise AssetError(f"{path}: taps must have the lags 0, 1, 2, ... in order, not {lags}")
    depths = [tap.depth for tap in info.taps]
    if min(depths) < 1 or depths != sorted(depths):
        raise AssetError(f"{path}: tap depths {depths} must be 1 or more and not fall")


def check_fit(info: HeadInfo, *, model_hash: str, hidden: int, split: tuple[int, ...]) -> None:
    """Raise AssetError, with both values, where a head does not fit the model or the split."""
    if info.model_hash != model_hash:
        raise AssetError(
            f"the head was trained for {info.model_name} ({_short(info.model_hash)}), "
            f"this model is {_short(model_hash)}; train a head for it with `ppsd train-head`"
        )
    if info.hidden != hidden:
        raise AssetError(f"the head has hidden size {info.hidden}, the model has {hidden}")
    if info.exit_layer != split[0]:
        raise AssetError(
            f"the head drafts from layer {info.exit_layer}, the exit layer is {split[0]}; "
            f"use --exit-layer {info.exit_layer}"
        )
    for tap in info.taps:
        done = sum(split[: tap.lag + 1])
        if tap.depth > done:
            raise AssetError(
                f"the head reads layer {tap.depth} at lag {tap.lag}, where the split "
                f"{','.join(map(str, split))} has run only {done} layers; use the head's "
                f"{info.stages} stages or train one for this split"
            )


def _short(model_hash: str) -> str:
    return model_hash[:19]


def read_head(folder: Path, info: HeadInfo, loader: Loader, lm_matrix: Tensor) -> HeadWeights:
    """The tensors of a head, in the loader's number format and on its device.

    ``lm_matrix`` [H, V] is the model's own, which heads share (reduced by ``token_ids``).
    """
    file = Checkpoint(folder / "head.safetensors")

    def get(name: str) -> Tensor:
        return file.tensor(name, dtype=loader.dtype).to(loader.device)

    blocks = tuple(
        LayerWeights(
            **{f: get(f"blocks.{i}.{f}") for f in _LAYER_FIELDS if file.has(f"blocks.{i}.{f}")}
        )
        for i in range(info.blocks if info.kind in ("block", "deep") else 0)
    )
    mlps = tuple(
        MlpWeights(**{f: get(f"mlps.{i}.{f}") for f in ("norm", "gate_up", "down")})
        for i in range(info.blocks if info.kind == "mlp" else 0)
    )
    deep = None
    if len(info.taps) > 1:
        deep = DeepWeights(get("deep.norms"), get("deep.kv"), get("deep.fuse"))
    token_ids = file.tensor("token_ids").to(loader.device) if file.has("token_ids") else None
    output = reduce_output(get("norm"), lm_matrix, loader.spec.rms_eps, token_ids)
    return HeadWeights(info.taps, output, blocks, mlps, deep)


def reduce_output(norm: Tensor, lm_matrix: Tensor, eps: float, token_ids: Tensor | None) -> Output:
    """A head's output: the LM matrix [H, V] itself, or a copy of its columns ``token_ids``."""
    if token_ids is None:
        return Output(norm, lm_matrix, eps)
    columns = lm_matrix.index_select(1, token_ids)
    if columns.device.type != "cpu":
        columns = columns.t().contiguous().t()
    return Output(norm, columns, eps, token_ids)


def write_head(folder: Path, info: HeadInfo, weights: HeadWeights) -> None:
    """Save a head; the LM matrix is not stored. Each file is replaced atomically."""
    tensors: dict[str, Tensor] = {"norm": weights.output.norm}
    if weights.output.token_ids is not None:
        tensors["token_ids"] = weights.output.token_ids
    for i, block in enumerate(weights.blocks):
        tensors |= {f"blocks.{i}.{name}": t for name, t in block.tensors().items()}
    for i, mlp in enumerate(weights.mlps):
        tensors |= {f"mlps.{i}.{f}": getattr(mlp, f) for f in ("norm", "gate_up", "down")}
    if weights.deep is not None:
        tensors |= {f"deep.{f}": getattr(weights.deep, f) for f in ("norms", "kv", "fuse")}
    packed = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "head.safetensors", packed, {"format": "ppsd-head"})
    description = {
        "format_version": FORMAT_VERSION,
        "kind": info.kind,
        "model_hash": info.model_hash,
        "model_name": info.model_name,
        "hidden": info.hidden,
        "taps": [[tap.depth, tap.lag] for tap in info.taps],
        "blocks": info.blocks,
        "draft_vocabulary": info.draft_vocabulary,
        "stages": info.stages,
        "training": info.training,
    }
    replace_bytes(folder / "head.json", (json.dumps(description, indent=2) + "\n").encode())


def raw_exit(
    loader: Loader, exit_layer: int, lm_matrix: Tensor, *, columns: int | None
) -> HeadWeights:
    """The model's own final norm and LM matrix as a head, or its first ``columns`` tokens.

    A byte-pair vocabulary lists its tokens in the order in which they were merged, so the first
    ones are the most frequent.
    """
    ids = None if columns is None else torch.arange(columns, device=loader.device)
    output = reduce_output(loader.final_norm(), lm_matrix, loader.spec.rms_eps, ids)
    return HeadWeights((Tap(exit_layer, 0),), output)
