"""Head files: ``head.safetensors`` beside ``head.json`` in one folder. Nothing is unpickled."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.errors import AssetError
from ppsd_cli.files import make_folder, replace_bytes
from ppsd_cli.model.heads import DeepWeights, HeadWeights, MlpWeights, Tap
from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.load import Loader
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.stage import Output
from ppsd_cli.model.weights import Checkpoint, save_tensors

FORMAT_VERSION = 1
KINDS = ("raw", "mlp", "block", "deep")


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """What a head file says of itself. ``training`` is free-form: settings and figures.

    ``depth``: depths of guesses that may enter in one tick; 2 with a second level.
    """

    kind: str
    model_hash: str
    model_name: str
    hidden: int
    taps: tuple[Tap, ...]
    blocks: int
    draft_vocabulary: int | None
    stages: int
    training: dict[str, Any]
    depth: int = 1

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
        if type(version) is not int or version != FORMAT_VERSION:
            raise AssetError(
                f"{path}: head format {version}, this ppsd reads {FORMAT_VERSION}; train it again"
            )
        vocabulary = data["draft_vocabulary"]
        info = HeadInfo(
            kind=_typed(data, "kind", str),
            model_hash=_typed(data, "model_hash", str),
            model_name=_typed(data, "model_name", str),
            hidden=_typed(data, "hidden", int),
            taps=tuple(Tap(int(depth), int(lag)) for depth, lag in data["taps"]),
            blocks=_typed(data, "blocks", int),
            draft_vocabulary=None if vocabulary is None else _typed(data, "draft_vocabulary", int),
            stages=_typed(data, "stages", int),
            training=_typed({"training": {}} | data, "training", dict),
            depth=_typed({"depth": 1} | data, "depth", int),
        )
    except FileNotFoundError as error:
        raise AssetError(f"{path}: no such head (train one with `ppsd train-head`)") from error
    except KeyError as error:
        raise AssetError(f"{path}: not a head description ({error} is missing)") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AssetError(f"{path}: not a head description ({error})") from error
    _check_info(info, path)
    return info


def _typed(data: dict[str, Any], key: str, kind: type) -> Any:
    """``data[key]``, or ValueError unless it is of that kind; a number must be 0 or more."""
    value = data[key]
    negative = isinstance(value, int) and value < 0
    if not isinstance(value, kind) or isinstance(value, bool) or negative:
        raise ValueError(f"{key}: {value!r}")
    return value


def _check_info(info: HeadInfo, path: Path) -> None:
    if info.kind not in KINDS:
        raise AssetError(f"{path}: head kind {info.kind!r}; known are {', '.join(KINDS)}")
    lags = [tap.lag for tap in info.taps]
    if not lags or lags != list(range(len(lags))):
        raise AssetError(f"{path}: taps must have the lags 0, 1, 2, ... in order, not {lags}")
    depths = [tap.depth for tap in info.taps]
    if min(depths) < 1 or depths != sorted(depths):
        raise AssetError(f"{path}: tap depths {depths} must be 1 or more and not fall")
    deep = info.kind == "deep"
    if info.depth not in (1, 2) or (info.depth == 2 and not _may_continue(info)):
        raise AssetError(
            f"{path}: a {info.kind} head with {info.blocks} blocks cannot have depth {info.depth}"
        )
    blocks = 1 if info.kind == "raw" else info.blocks
    if deep != (len(lags) > 1) or blocks < 1 or info.draft_vocabulary == 0:
        raise AssetError(
            f"{path}: a {info.kind} head with {len(lags)} taps, {info.blocks} blocks and draft "
            f"vocabulary {info.draft_vocabulary} cannot be"
        )


def _may_continue(info: HeadInfo) -> bool:
    """Whether there is a last block whose cache holds the keys of exit states."""
    return info.kind == "block" or (info.kind == "deep" and info.blocks > 1)


def check_fit(
    info: HeadInfo, *, model_hash: str, hidden: int, split: tuple[int, ...], depth: int = 1
) -> None:
    """Raise AssetError, with both values, where a head does not fit the model or the split.

    ``depth``: depths of guesses that enter in one tick.
    """
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
    tap = late_tap(info.taps, split, depth=depth)
    if tap is not None:
        raise AssetError(
            f"the head reads layer {tap.depth} at lag {tap.lag}, where the split "
            f"{','.join(map(str, split))} has run only {sum(split[: tap.lag // depth + 1])} layers"
            f"{'' if depth == 1 else f' at depth {depth}'}; use the head's {info.stages} stages "
            "or train one for this split"
        )


def late_tap(taps: tuple[Tap, ...], split: tuple[int, ...], *, depth: int = 1) -> Tap | None:
    """The first tap whose layer the split has not run by its lag; None where all are in time.

    ``depth``: depths of guesses that enter in one tick, so that as many lags share a stage.
    """
    return next((tap for tap in taps if tap.depth > sum(split[: tap.lag // depth + 1])), None)


def _short(model_hash: str) -> str:
    return model_hash[:19]


def read_head(folder: Path, info: HeadInfo, loader: Loader, lm_matrix: Tensor) -> HeadWeights:
    """The tensors of a head, in the loader's number format and on its device.

    ``lm_matrix`` [H, V] is the model's own, which heads share (reduced by ``token_ids``).
    AssetError where a tensor is absent or has a shape that model and description do not imply.
    """
    spec, far = loader.spec, len(info.taps) - 1
    reader = _Reader(folder / "head.safetensors", loader)
    h, kv = spec.hidden, 2 * spec.kv_heads * spec.head_dim
    count = range(info.blocks)
    blocks = tuple(reader.block(f"blocks.{i}.") for i in count if info.kind in ("block", "deep"))
    mlps = tuple(reader.mlp(f"mlps.{i}.") for i in count if info.kind == "mlp")
    deep = None
    if far:
        deep = DeepWeights(
            norms=reader.get("deep.norms", far, h),
            kv=reader.get("deep.kv", far, h, kv),
            fuse=reader.get("deep.fuse", far, h, h),
        )
    token_ids = None
    if info.draft_vocabulary is not None:
        token_ids = reader.token_ids(info.draft_vocabulary, spec.vocabulary)
    output = reduce_output(reader.get("norm", h), lm_matrix, spec.rms_eps, token_ids)
    second = reader.second(h) if info.depth > 1 else None
    return HeadWeights(info.taps, output, blocks, mlps, deep, second)


class _Reader:
    """Tensors of one head file, with the shapes that they must have."""

    def __init__(self, path: Path, loader: Loader) -> None:
        self._file = Checkpoint(path, described_by="head.json or the model")
        self._path, self._loader, self._spec = path, loader, loader.spec

    def get(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape."""
        loader = self._loader
        return self._file.tensor(name, dtype=loader.dtype, shape=shape).to(loader.device)

    def block(self, at: str) -> LayerWeights:
        """A decoder layer; biases and query and key norms are optional."""
        spec = self._spec
        h, d = spec.hidden, spec.head_dim
        n, kv = spec.heads * d, 2 * spec.kv_heads * d
        f = self._inner(at)
        needed = {
            "input_norm": (h,),
            "qkv": (h, n + kv),
            "output": (n, h),
            "mlp_norm": (h,),
            "gate_up": (h, 2 * f),
            "down": (f, h),
        }
        optional = {
            "qkv_bias": (n + kv,),
            "output_bias": (h,),
            "gate_up_bias": (2 * f,),
            "down_bias": (h,),
            "q_norm": (d,),
            "k_norm": (d,),
        }
        present = {k: v for k, v in optional.items() if self._file.has(at + k)}
        return LayerWeights(
            **{name: self.get(at + name, *shape) for name, shape in (needed | present).items()}
        )

    def second(self, hidden: int) -> SecondLevel:
        """How the head goes on from its own state."""
        return SecondLevel(
            state_norm=self.get("second.state_norm", hidden),
            token_norm=self.get("second.token_norm", hidden),
            fuse=self.get("second.fuse", 2 * hidden, hidden),
            layer=self.block("second.layer."),
            norm=self.get("second.norm", hidden),
        )

    def mlp(self, at: str) -> MlpWeights:
        """A gated MLP."""
        h, f = self._spec.hidden, self._inner(at)
        return MlpWeights(
            norm=self.get(at + "norm", h),
            gate_up=self.get(at + "gate_up", h, 2 * f),
            down=self.get(at + "down", f, h),
        )

    def token_ids(self, count: int, vocabulary: int) -> Tensor:
        """Ids [V'] of the draft vocabulary."""
        ids = self._file.tensor("token_ids", shape=(count,))
        if ids.dtype != torch.int64 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise AssetError(f"{self._path}: token_ids must be ids from 0 to {vocabulary - 1}")
        return ids.to(self._loader.device)

    def _inner(self, at: str) -> int:
        """Rows F of ``down``, the one size that a head may choose."""
        return (*self._file.shape(at + "down"), 0)[0]


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
    if weights.second is not None:
        tensors |= {f"second.{name}": t for name, t in weights.second.tensors().items()}
    packed = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    make_folder(folder)
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
        **({"depth": info.depth} if info.depth > 1 else {}),
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
