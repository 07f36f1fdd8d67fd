"""Could a draft head go on from its own state, so that one tick enters guesses of two depths?

    python docs/benchmarks/second_level.py -m MODEL HEAD... -o FOLDER --text-seconds 200 \
        --time-limit 300

For each head (frozen, as is the model) three continuations are trained beside each other. Of a
token x behind position p - 1 they get the head's state there and x, and guess the token behind x:

``mlp``: the state plus a product of both, and a gated MLP;
``block``: the same through a decoder layer that attends to its own earlier inputs;
``reuse``: through a decoder layer that attends to the keys of the head's last block, so that a
pipeline would need no further cache.

``FOLDER/second_level.json`` says how often the model's token is among the best 1, 2, 4, 8
guesses of the head (first level) and of each continuation (second level: the token before it is
given) on held-out text and on greedy answers to MT-Bench and HumanEval; ``FOLDER/ranks.npz`` has
both levels' best 16 with their log shares, from which ``tree_depths.py --ranks`` simulates.

Shapes: B texts, T positions, H hidden, n answer tokens (padded).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import head_acceptance
import numpy as np
import torch
from torch import Tensor

from ppsd_cli.assets import resolve_model
from ppsd_cli.assets.tokenizer import load_tokenizer
from ppsd_cli.core.choose import best_tokens
from ppsd_cli.model.heads import HeadWeights, MlpWeights
from ppsd_cli.model.lagged_attention import lagged_attention
from ppsd_cli.model.layers import LayerWeights, Shape, rms_norm
from ppsd_cli.model.one_pass import (
    Backbone,
    backbone_states,
    causal_attention,
    compiled,
    head_one_pass,
    shift,
)
from ppsd_cli.tasks.batch_decode import GREEDY
from ppsd_cli.tasks.chat import read_glue
from ppsd_cli.tasks.dataset import Batch, Batches, BatchSettings, Sample, held_out
from ppsd_cli.tasks.evaluate import target_ranks
from ppsd_cli.tasks.loss import DraftOutput, LossPieces, chunk_tokens, losses_and_gradients
from ppsd_cli.tasks.optimize import Schedule
from ppsd_cli.tasks.text_store import TextSettings, TextWish, read_text, round_tokens, write_text

KINDS = ("mlp", "block", "reuse")
TOP, MOST = (1, 2, 4, 8), 16
_LAYER = [f.name for f in fields(LayerWeights)]
_CLIP, _WARMUP = 1.0, 100


@dataclass(frozen=True, slots=True)
class Given:
    """What the frozen part hands on for one batch, all [B, T, H] (or keys [B, T, M, D])."""

    state: Tensor
    token: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Continuation:
    """A second level in training: float32 masters by name."""

    head: str
    kind: str
    masters: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Head and kind."""
        return f"{self.head} {self.kind}"


@dataclass(frozen=True, slots=True)
class Work:
    """Everything frozen."""

    setup: head_acceptance.Setup
    outputs: Mapping[str, DraftOutput]
    loss: LossPieces

    @property
    def backbone(self) -> Backbone:
        """The model."""
        return self.setup.backbone

    @property
    def shape(self) -> Shape:
        """Of a layer."""
        return Shape.of(self.backbone.spec)


def start(head: str, kind: str, weights: HeadWeights, backbone: Backbone) -> Continuation:
    """Start values: the head's last block and norm; the token's share of the input is zero."""
    last, hidden = weights.blocks[-1], backbone.spec.hidden
    tensors = {
        "norm": weights.output.norm,
        "state_norm": backbone.output.norm,
        "token_norm": backbone.layers[0].input_norm,
        "fuse": torch.zeros(2 * hidden, hidden, device=backbone.device),
        **{name: tensor for name, tensor in last.tensors().items()},
    }
    if kind == "mlp":
        for name in ("input_norm", "qkv", "output"):
            del tensors[name]
    masters = {
        name: t.detach().float().clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, t in tensors.items()
    }
    return Continuation(head, kind, masters)


def second(one: Continuation, given: Given, work: Work, tables: tuple[Tensor, Tensor]) -> Tensor:
    """States [B, T, H] before the norm: at p from the head's state at p - 1 and token p."""
    dtype, eps = work.backbone.dtype, work.backbone.spec.rms_eps
    w = {name: t.to(dtype) for name, t in one.masters.items()}
    before = shift(given.state, 1)
    both = (
        rms_norm(before, w["state_norm"], eps),
        rms_norm(given.token, w["token_norm"], eps),
    )
    hidden = before + torch.cat(both, dim=-1) @ w["fuse"]
    pieces = work.setup.pieces
    if one.kind == "mlp":
        return pieces.gated_mlp(hidden, MlpWeights(w["mlp_norm"], w["gate_up"], w["down"]), eps)
    layer = LayerWeights(**{name: w[name] for name in _LAYER if name in w})
    q, k, v = pieces.project(hidden, layer, work.shape, *tables)
    if one.kind == "block":
        return pieces.finish(hidden, causal_attention(q, k, v, None), layer, work.shape)
    groups = q.shape[2] // k.shape[2]
    near = (_spread(x, groups)[:, :, :, None] for x in (k, v))
    far = (_spread(x, groups) for x in (given.keys, given.values))
    attended = lagged_attention(q.transpose(1, 2), *far, *near)
    return pieces.finish(hidden, attended.transpose(1, 2).flatten(2), layer, work.shape)


def _spread(x: Tensor, groups: int) -> Tensor:
    """Keys or values [B, T, M, D] as [B, N, T, D]."""
    return x.transpose(1, 2).repeat_interleave(groups, dim=1)


@torch.no_grad()
def frozen(work: Work, batch: Batch) -> tuple[Tensor, dict[str, Given], tuple[Tensor, Tensor]]:
    """The model's final states [B, T, H], what each head hands on, and the rotary tables."""
    backbone, heads, pieces = work.backbone, work.setup.heads, work.setup.pieces
    tables = backbone.tables(batch.token_ids.shape[1])
    depths = {tap.depth for head in heads.values() for tap in head.taps}
    states = backbone_states(backbone, batch.token_ids, depths, tables, pieces)
    token = backbone.embed(batch.token_ids)
    given = {}
    for name, head in heads.items():
        taps = [states[tap.depth] for tap in head.taps]
        short = replace(head, blocks=head.blocks[:-1])
        inner = head_one_pass(short, taps, work.shape, tables, pieces)
        q, k, v = pieces.project(inner, head.blocks[-1], work.shape, *tables)
        attended = causal_attention(q, k, v, None)
        state = pieces.finish(inner, attended, head.blocks[-1], work.shape)
        given[name] = Given(state, token, k, v)
    return states[len(backbone.layers)], given, tables


def select(states: Tensor, where: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Normed rows [n, H] at flat positions [n]."""
    return rms_norm(states.flatten(0, 1).index_select(0, where), norm, eps)


def train(work: Work, parts: Sequence[Continuation], batches: Batches, limit: float) -> None:
    """AdamW with a cosine over ``limit`` seconds; prints loss and acceptance."""
    groups = [list(one.masters.values()) for one in parts]
    fused = work.backbone.device.type != "cpu"
    adam = torch.optim.AdamW(
        [{"params": g} for g in groups], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=fused
    )
    schedule, began, step = Schedule(10**9, _WARMUP, limit), time.monotonic(), 0
    sums = torch.zeros(2, len(parts), device=work.backbone.device)
    answers = 0
    while (elapsed := time.monotonic() - began) < limit:
        batch = batches[step].to(work.backbone.device)
        losses, hits = _backward(work, parts, batch)
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, _CLIP)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * schedule.factor(step, elapsed)
        adam.step()
        adam.zero_grad(set_to_none=True)
        sums += torch.stack([losses, hits])
        step, answers = step + 1, answers + batch.count
        if step % 250 == 0 or step in (1, 10):
            shares = (sums[1] / answers).tolist()
            pairs = zip(parts, shares, strict=True)
            _note(f"{step} {elapsed:.0f}s " + ", ".join(f"{p.name} {s:.3f}" for p, s in pairs))
            sums.zero_()
            answers = 0
    _note(f"{step} steps in {time.monotonic() - began:.0f} s")


def _backward(work: Work, parts: Sequence[Continuation], batch: Batch) -> tuple[Tensor, Tensor]:
    eps = work.backbone.spec.rms_eps
    final, given, tables = frozen(work, batch)
    target = select(final, batch.where, work.backbone.output.norm, eps)
    drafts = [
        select(
            second(one, given[one.head], work, tables),
            batch.where,
            one.masters["norm"].to(work.backbone.dtype),
            eps,
        )
        for one in parts
    ]
    pairs = [(d.detach(), work.outputs[p.head]) for d, p in zip(drafts, parts, strict=True)]
    losses, hits, gradients = losses_and_gradients(
        target, pairs, batch.weight, work.backbone.output, work.loss
    )
    torch.autograd.backward(drafts, gradients)
    return losses, hits


Logits = Callable[[slice], Tensor]


@torch.no_grad()
def levels(
    work: Work, parts: Sequence[Continuation], batch: Batch
) -> Iterator[tuple[str, HeadWeights, Tensor, Tensor]]:
    """For the heads and the continuations: name, head, normed states [n, H], best tokens [n]."""
    eps = work.backbone.spec.rms_eps
    final, given, tables = frozen(work, batch)
    where = batch.where[: batch.count]
    rows = final.flatten(0, 1).index_select(0, where)
    best = torch.cat([work.backbone.output.logits(r).argmax(dim=-1) for r in rows.split(4096)])
    for name, head in work.setup.heads.items():
        yield name, head, select(given[name].state, where, head.output.norm, eps), best
        for one in (p for p in parts if p.head == name):
            norm = one.masters["norm"].to(work.backbone.dtype)
            states = second(one, given[name], work, tables)
            yield one.name, head, select(states, where, norm, eps), best


def score(work: Work, parts: Sequence[Continuation], samples: list[Sample]) -> dict[str, Any]:
    """Acceptance by name: is the model's token among the best 1, 2, 4, 8?"""
    counts: dict[str, Tensor] = {}
    total = 0
    tops = torch.tensor(TOP, device=work.backbone.device)
    for batch in _in_order(work, samples):
        total += batch.count
        for name, head, states, best in levels(work, parts, batch):
            for rows, right in zip(states.split(4096), best.split(4096), strict=True):
                ranks = target_ranks(rows @ head.output.lm_matrix, right, head.output)
                hits = (ranks[:, None] < tops).sum(dim=0).cpu()
                counts[name] = counts.get(name, torch.zeros(len(TOP))) + hits
    figures = {
        name: {f"top{k}": round(float(h) / total, 4) for k, h in zip(TOP, hits, strict=True)}
        for name, hits in counts.items()
    }
    return {"answer_tokens": total, "levels": figures}


def ranks(work: Work, parts: Sequence[Continuation], samples: list[Sample]) -> dict[str, Any]:
    """Arrays for the simulation: tokens, where each answer begins, best 16 of each level."""
    arrays: dict[str, list[Any]] = {"tokens": [], "lengths": []}
    for sample in samples:
        batch = Batches([sample], BatchSettings(1, 0, 1, shuffle=False))[0]
        batch = batch.to(work.backbone.device)
        tokens = sample.ids[sample.answers]
        arrays["tokens"].append(tokens)
        arrays["lengths"].append([len(tokens)])
        for name, head, states, _ in levels(work, parts, batch):
            found = best_tokens(
                states @ head.output.lm_matrix, MOST, scale=1.0, token_ids=head.output.token_ids
            )
            table = np.array(found, dtype=np.float32)
            arrays.setdefault(f"{name}: tokens", []).append(table[..., 0].astype(np.int32))
            arrays.setdefault(f"{name}: shares", []).append(table[..., 1].astype(np.float16))
    return {name: np.concatenate(parts) for name, parts in arrays.items()}


def _in_order(work: Work, samples: list[Sample]) -> Iterator[Batch]:
    settings = BatchSettings(work.setup.batch_tokens, 0, 1, shuffle=False)
    batches = Batches(samples, settings)
    return (batches[i].to(work.backbone.device) for i in range(batches.per_epoch))


def texts(work: Work, model_hash: str, folder: Path, options: argparse.Namespace) -> list[Sample]:
    """Self-written text, as ``ppsd train-head`` writes it."""
    backbone = work.backbone
    glue = read_glue(load_tokenizer(folder), folder)
    wish = TextWish(options.text_tokens, options.text_seconds)
    settings = TextSettings(
        model_hash=model_hash,
        context=options.context,
        seed=0,
        round_tokens=round_tokens(backbone, wish.tokens),
        dtype=str(backbone.dtype).removeprefix("torch."),
        chat=glue.chat,
    )
    write_text(backbone, glue, settings, wish, pieces=work.setup.pieces)
    if backbone.device.type != "cpu":
        torch.get_device_module(backbone.device).empty_cache()
    samples = read_text(settings, wish)
    _note(f"{len(samples)} texts, {sum(len(s.ids) for s in samples):,} tokens")
    return samples


def main() -> int:
    """Train, measure, write."""
    options = _options()
    files = resolve_model(options.model, offline=options.offline)
    setup = head_acceptance.load(files, options)
    vocabulary = setup.backbone.spec.vocabulary
    outputs = {
        name: DraftOutput(head.output.lm_matrix, head.output.token_ids, vocabulary)
        for name, head in setup.heads.items()
    }
    loss = LossPieces.compiled(compiled) if options.compile else LossPieces()
    work = Work(setup, outputs, loss)
    samples = texts(work, files.model_hash, files.folder, options)
    rest, kept = held_out(samples, options.held_out)
    chunk = chunk_tokens(vocabulary) if options.compile else 1
    parts = [
        start(name, kind, head, setup.backbone)
        for name, head in setup.heads.items()
        for kind in KINDS
    ]
    train(
        work, parts, Batches(rest, BatchSettings(options.batch_tokens, 0, chunk)), options.limit_s
    )
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"training_tokens": sum(len(s.ids) for s in rest), "tasks": {}}
    report["tasks"]["held out"] = score(work, parts, kept)
    for name, prompts in head_acceptance.read_tasks(options).items():
        answers = head_acceptance.conversations(setup, prompts, GREEDY)
        report["tasks"][name] = score(work, parts, answers)
        if name == "mt-bench":
            np.savez_compressed(options.output / "ranks.npz", **ranks(work, parts, answers))
        _save(report, options)
    return 0


def _save(report: dict[str, Any], options: argparse.Namespace) -> None:
    text = json.dumps(report, indent=2) + "\n"
    (options.output / "second_level.json").write_text(text)
    _note(text)


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("heads", type=Path, nargs="+", metavar="HEAD", help="head folders")
    parser.add_argument("--model", "-m", required=True)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--text-tokens", type=int, default=100_000_000)
    parser.add_argument("--text-seconds", type=float, default=200)
    parser.add_argument("--time-limit", dest="limit_s", type=float, default=300)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--new-tokens", "-n", type=int, default=128)
    parser.add_argument("--limit", type=int, help="first N prompts of each task")
    parser.add_argument("--mt-bench", type=Path, help="question.jsonl instead of the wheel's")
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl[.gz] instead")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser.add_argument("--device", default="cpu" if found is None else found.type)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--offline", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
