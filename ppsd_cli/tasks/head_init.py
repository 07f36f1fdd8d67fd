"""Trainable tensors of a head: where they start, and how they become ``HeadWeights``.

Names are those of a head file (``model/head_files.py``). Masters are float32.

Shapes: H hidden, M key/value heads, D head dimension, K taps, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ppsd_cli.model.heads import DeepWeights, HeadWeights, MlpWeights
from ppsd_cli.model.layers import LayerWeights
from ppsd_cli.model.one_pass import Backbone
from ppsd_cli.model.second_level import SecondLevel
from ppsd_cli.model.stage import Output
from ppsd_cli.tasks.dataset import Sample
from ppsd_cli.tasks.head_plan import HeadPlan
from ppsd_cli.tasks.loss import DraftOutput

_LAYER_FIELDS = [f.name for f in fields(LayerWeights)]
_MLP_FIELDS = ("norm", "gate_up", "down")
_DEEP_FIELDS = ("norms", "kv", "fuse")


@dataclass(frozen=True, slots=True)
class TrainableHead:
    """A head in training: its plan, float32 masters by name, and its frozen LM matrix."""

    plan: HeadPlan
    masters: dict[str, Tensor]
    output: DraftOutput
    eps: float

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The masters of the head, and those of its second level (none with one depth)."""
        names = sorted(self.masters, key=lambda name: name.startswith("second."))
        count = sum(not name.startswith("second.") for name in names)
        tensors = [self.masters[name] for name in names]
        return tensors[:count], tensors[count:]

    def weights(self, dtype: torch.dtype) -> HeadWeights:
        """The head's weights as ``dtype``, differentiable with respect to the masters."""
        return assemble(
            self.plan, {k: v.to(dtype) for k, v in self.masters.items()}, self.output, self.eps
        )


def assemble(
    plan: HeadPlan, tensors: Mapping[str, Tensor], output: DraftOutput, eps: float
) -> HeadWeights:
    """Named tensors as the structure that the pipeline and the one-pass form use."""

    def pick(prefix: str, names: Iterable[str]) -> dict[str, Tensor]:
        return {n: tensors[prefix + n] for n in names if prefix + n in tensors}

    attention = plan.kind in ("block", "deep")
    blocks = [
        LayerWeights(**pick(f"blocks.{i}.", _LAYER_FIELDS))
        for i in range(plan.blocks if attention else 0)
    ]
    mlps = [
        MlpWeights(**pick(f"mlps.{i}.", _MLP_FIELDS))
        for i in range(0 if attention else plan.blocks)
    ]
    deep = DeepWeights(**pick("deep.", _DEEP_FIELDS)) if "deep.kv" in tensors else None
    last = Output(tensors["norm"], output.lm_matrix, eps, output.token_ids)
    second = SecondLevel.of(_below(tensors, "second.")) if plan.depth > 1 else None
    return HeadWeights(plan.taps, last, tuple(blocks), tuple(mlps), deep, second)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def initial_tensors(plan: HeadPlan, backbone: Backbone) -> dict[str, Tensor]:
    """Start values: the model's own last layers; deep keys as the first block's, fusion zero.

    The second level starts as the head's last block that sees nothing of the token.
    """
    spec = backbone.spec
    own = backbone.layers[spec.layers - plan.blocks :]
    tensors = {"norm": backbone.output.norm}
    for i, layer in enumerate(own):
        if plan.kind == "mlp":
            tensors[f"mlps.{i}.norm"] = layer.mlp_norm
            tensors[f"mlps.{i}.gate_up"] = layer.gate_up
            tensors[f"mlps.{i}.down"] = layer.down
        else:
            tensors |= {f"blocks.{i}.{name}": t for name, t in layer.tensors().items()}
    extra = len(plan.taps) - 1
    if extra:
        first, width = own[0], 2 * spec.kv_heads * spec.head_dim
        tensors["deep.norms"] = first.input_norm.expand(extra, -1)
        tensors["deep.kv"] = first.qkv[:, -width:].expand(extra, -1, -1)
        tensors["deep.fuse"] = torch.zeros(extra, spec.hidden, spec.hidden, device=backbone.device)
    if plan.depth > 1:
        start = SecondLevel(
            state_norm=backbone.output.norm,
            token_norm=backbone.layers[0].input_norm,
            fuse=torch.zeros(2 * spec.hidden, spec.hidden, device=backbone.device),
            layer=own[-1],
            norm=backbone.output.norm,
        )
        tensors |= {f"second.{name}": t for name, t in start.tensors().items()}
    return {
        name: t.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }


def make_heads(
    plans: Iterable[HeadPlan], backbone: Backbone, samples: list[Sample], ends: Iterable[int]
) -> list[TrainableHead]:
    """All heads at their start values; heads of one draft vocabulary share its LM matrix."""
    vocabulary, matrix = backbone.spec.vocabulary, backbone.output.lm_matrix
    outputs: dict[int | None, DraftOutput] = {}
    heads = []
    for plan in plans:
        if plan.draft_vocab not in outputs:
            ids = None
            if plan.draft_vocab is not None:
                chosen = frequent_ids(samples, vocabulary, plan.draft_vocab, ends)
                ids = torch.from_numpy(chosen).to(backbone.device)
            outputs[plan.draft_vocab] = draft_output(matrix, ids, vocabulary)
        masters = initial_tensors(plan, backbone)
        for tensor in masters.values():
            tensor.requires_grad_()
        head = TrainableHead(plan, masters, outputs[plan.draft_vocab], backbone.spec.rms_eps)
        heads.append(head)
    return heads


def draft_output(matrix: Tensor, ids: Tensor | None, vocabulary: int) -> DraftOutput:
    """The LM matrix [H, V] or its columns ``ids``, in the memory order of the whole."""
    if ids is None:
        return DraftOutput(matrix, None, vocabulary)
    columns = matrix.t().index_select(0, ids).contiguous().t()
    return DraftOutput(columns, ids, vocabulary)


def frequent_ids(
    samples: Iterable[Sample], vocabulary: int, size: int, always: Iterable[int]
) -> np.ndarray:
    """The ``size`` most frequent answer tokens, ascending; ``always`` first, ties by lowest id."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for sample in samples:
        counts += np.bincount(sample.ids[sample.answers], minlength=vocabulary)
    counts[[i for i in always if i < vocabulary]] = np.iinfo(np.int64).max
    chosen: np.ndarray = np.sort(np.argsort(-counts, kind="stable")[:size])
    return chosen
