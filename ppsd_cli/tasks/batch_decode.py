"""Many texts at once, for training text and measurements: rows in lockstep, one position a step.

Every row is at the same position, so the cache needs no mask and is read only as far as it is
filled. Prompts of different lengths are forced tokens: a row goes over to its own tokens where
its prompt ends.

Shapes: B rows, S positions, H hidden, N query heads, M key/value heads, G = N / M, D head
dimension, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppsd_cli.core.choose import choose
from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.one_pass import PLAIN, Backbone, Pieces, causal_attention, window_mask

_CHECK_EVERY = 16
GREEDY = Sampling()
# Without cuDNN's: it plans anew for every length, and here each step has another one.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class LockstepDecoder:
    """Static caches [B, M, S, D] for each layer, and one step for all rows."""

    def __init__(
        self, backbone: Backbone, *, rows: int, length: int, pieces: Pieces = PLAIN
    ) -> None:
        spec = backbone.spec
        self.backbone, self.length, self._pieces = backbone, length, pieces
        self._shape = Shape.of(spec)
        self._cos, self._sin = backbone.tables(length)
        size = (rows, spec.kv_heads, length, spec.head_dim)
        pattern = backbone.embedding
        self._keys = [pattern.new_empty(size) for _ in backbone.layers]
        self._values = [pattern.new_empty(size) for _ in backbone.layers]

    @torch.no_grad()
    def prefill(self, token_ids: Tensor) -> None:
        """Fill the caches with token ids [B, P] at the positions 0 to P - 1."""
        count, spec = token_ids.shape[1], self.backbone.spec
        hidden = self.backbone.embed(token_ids)
        tables = self._cos[:count], self._sin[:count]
        for index, weights in enumerate(self.backbone.layers):
            q, k, v = self._pieces.project(hidden, weights, self._shape, *tables)
            self._keys[index][:, :, :count] = k.transpose(1, 2)
            self._values[index][:, :, :count] = v.transpose(1, 2)
            mask = window_mask(count, spec.windows[index], hidden.device)
            attended = causal_attention(q, k, v, mask)
            hidden = self._pieces.finish(hidden, attended, weights, self._shape)

    @torch.no_grad()
    def step(self, token_ids: Tensor, position: int) -> Tensor:
        """Logits [B, V] after feeding token ids [B] at ``position``, all earlier ones being fed."""
        with sdpa_kernel(_BACKENDS):
            return self._step(token_ids, position)

    def _step(self, token_ids: Tensor, position: int) -> Tensor:
        hidden = self.backbone.embed(token_ids)
        tables = self._cos[position], self._sin[position]  # [1, D]
        for index, weights in enumerate(self.backbone.layers):
            q, k, v = self._pieces.project(hidden, weights, self._shape, *tables)
            self._keys[index][:, :, position] = k
            self._values[index][:, :, position] = v
            attended = self._attend(q, index, position)
            hidden = self._pieces.finish(hidden, attended, weights, self._shape)
        return self.backbone.output.logits(hidden)

    def _attend(self, q: Tensor, index: int, position: int) -> Tensor:
        """Attention [B, N * D] of q [B, N, D]; the G heads of a group are G query rows."""
        window = self.backbone.spec.windows[index]
        first = 0 if window is None else max(0, position + 1 - window)
        keys = self._keys[index][:, :, first : position + 1]
        values = self._values[index][:, :, first : position + 1]
        b, n, d = q.shape
        m = keys.shape[1]
        out = functional.scaled_dot_product_attention(q.view(b, m, n // m, d), keys, values)
        return out.reshape(b, n * d)


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """An answer ends after ``new_tokens`` or with one of ``end_ids``."""

    new_tokens: int
    end_ids: tuple[int, ...]


def write_answers(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    limits: AnswerLimits,
    sampling: Sampling = GREEDY,
    rows: int = 256,
    pieces: Pieces = PLAIN,
) -> list[list[int]]:
    """The model's answer to each prompt, the end id included.

    The noise of sampled answers differs between prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        writer = _AnswerBatch(backbone, [prompts[i] for i in part], limits, pieces)
        seeded = dataclasses.replace(sampling, seed=sampling.seed + first)
        for index, text in zip(part, writer.run(seeded), strict=True):
            answers[index] = text
    return answers


class _AnswerBatch:
    """Prompts of different lengths in lockstep: ``ids`` [B, S] holds prompts, then answers."""

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Sequence[int]],
        limits: AnswerLimits,
        pieces: Pieces,
    ) -> None:
        device = backbone.device
        self._prompts, self._limits = prompts, limits
        self._total = max(map(len, prompts)) + limits.new_tokens
        ids = torch.zeros(len(prompts), self._total, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        self._ids = ids.to(device)
        self._lengths = torch.tensor([len(p) for p in prompts], device=device)
        self._ends = torch.tensor(list(limits.end_ids), device=device, dtype=torch.int64)
        self._decoder = LockstepDecoder(
            backbone, rows=len(prompts), length=self._total, pieces=pieces
        )

    @torch.no_grad()
    def run(self, sampling: Sampling) -> list[list[int]]:
        """The answers, each up to and including its end id."""
        ids, lengths, count = self._ids, self._lengths, self._limits.new_tokens
        start = int(lengths.min()) - 1
        if start > 0:
            self._decoder.prefill(ids[:, :start])
        done = torch.zeros_like(lengths, dtype=torch.bool)
        own_noise = torch.arange(len(lengths), device=ids.device) * self._total
        for position in range(start, self._total - 1):
            logits = self._decoder.step(ids[:, position], position)
            chosen = choose(logits, sampling, own_noise + position + 1)
            free = lengths <= position + 1
            ids[:, position + 1] = torch.where(free, chosen, ids[:, position + 1])
            done |= free & torch.isin(chosen, self._ends)
            done |= lengths + count <= position + 2
            if position % _CHECK_EVERY == 0 and bool(done.all()):
                break
        return [
            _until_end(row[len(p) : len(p) + count], self._limits.end_ids)
            for row, p in zip(ids.tolist(), self._prompts, strict=True)
        ]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """``ids`` up to and including the first end id."""
    for index, token in enumerate(ids):
        if token in end_ids:
            return ids[: index + 1]
    return ids
