"""Many texts at once, for training text and measurements: rows in lockstep, one position a step.

Every row is at the same position, so the cache needs no mask and is read only as far as it is
filled. Prompts of different lengths are forced tokens: a row goes over to its own tokens where
its prompt ends.

Shapes: B rows, S positions, H hidden, N query heads, M key/value heads, G = N / M, D head
dimension, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppsd_cli.model.layers import Shape
from ppsd_cli.model.one_pass import PLAIN, Backbone, Pieces, causal_attention, window_mask

_CHECK_EVERY = 16
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


def greedy_answers(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    end_ids: Sequence[int],
    rows: int = 256,
    pieces: Pieces = PLAIN,
) -> list[list[int]]:
    """The model's greedy answer to each prompt: at most ``new_tokens`` ids, the end id included."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        texts = _greedy_batch(backbone, [prompts[i] for i in part], new_tokens, end_ids, pieces)
        for index, text in zip(part, texts, strict=True):
            answers[index] = text
    return answers


@torch.no_grad()
def _greedy_batch(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end_ids: Sequence[int],
    pieces: Pieces,
) -> list[list[int]]:
    device = backbone.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    total = longest + new_tokens
    ids = torch.zeros(len(prompts), total, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    ends = torch.tensor(list(end_ids), device=device, dtype=torch.int64)
    decoder = LockstepDecoder(backbone, rows=len(prompts), length=total, pieces=pieces)
    if shortest > 1:
        decoder.prefill(ids[:, : shortest - 1])
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for position in range(shortest - 1, total - 1):
        chosen = decoder.step(ids[:, position], position).argmax(dim=-1)
        own = lengths <= position + 1
        ids[:, position + 1] = torch.where(own, chosen, ids[:, position + 1])
        done |= own & torch.isin(chosen, ends)
        done |= lengths + new_tokens <= position + 2
        if position % _CHECK_EVERY == 0 and bool(done.all()):
            break
    return [
        _until_end(row[len(p) : len(p) + new_tokens], end_ids)
        for row, p in zip(ids.tolist(), prompts, strict=True)
    ]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """``ids`` up to and including the first end id."""
    for index, token in enumerate(ids):
        if token in end_ids:
            return ids[: index + 1]
    return ids
