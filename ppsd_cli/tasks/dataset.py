"""Texts with their answer tokens, and batches of them.

A batch is a pure function of (samples, settings, index): resuming needs no state but the index.

Shapes: B texts, T positions of the batch's rung, n answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppsd_cli.errors import AssetError


@dataclass(frozen=True, slots=True)
class Sample:
    """One text: token ids, and for each whether it belongs to an answer (is to be drafted)."""

    ids: NDArray[np.int32]
    answers: NDArray[np.bool_]
    greedy: bool = False

    @classmethod
    def of(cls, ids: Sequence[int], spans: Sequence[Sequence[int]], *, greedy: bool) -> "Sample":
        """From ids and the [start, end) spans that answer."""
        flags = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            flags[start:end] = True
        return cls(np.asarray(ids, dtype=np.int32), flags, greedy)

    def cut(self, length: int) -> "Sample":
        """The first ``length`` tokens."""
        return Sample(self.ids[:length], self.answers[:length], self.greedy)

    def positions(self) -> NDArray[np.intp]:
        """Positions whose next token is an answer token: where a draft is wanted."""
        found: NDArray[np.intp] = np.flatnonzero(self.answers[1:])
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """``token_ids`` [B, T]; ``where`` [n'] flat indices into B * T of the wanted positions,
    padded to whole chunks; ``weight`` [n'] 1 / n for real rows, 0 for padding; ``count`` = n."""

    token_ids: Tensor
    where: Tensor
    weight: Tensor
    count: int

    def to(self, device: torch.device) -> "Batch":
        """On ``device``, without waiting for the copy."""
        if device.type == "cpu":
            return self
        ids, where, weight = (
            t.pin_memory().to(device, non_blocking=True)
            for t in (self.token_ids, self.where, self.weight)
        )
        return Batch(ids, where, weight, self.count)


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """``tokens`` of one batch with padding, ``seed`` of the order, ``chunk`` of the loss."""

    tokens: int
    seed: int
    chunk: int
    shuffle: bool = True


def rung(length: int) -> int:
    """The padded length for a text: powers of two and the steps halfway, from 16 on.

    Few lengths keep the number of compiled shapes small.
    """
    size = 16
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


class Batches:
    """Samples in batches of about equal length, in a new order each epoch."""

    def __init__(self, samples: Sequence[Sample], settings: BatchSettings) -> None:
        self._samples, self._settings = samples, settings
        self._rungs: dict[int, list[int]] = {}
        for index, sample in enumerate(samples):
            if len(sample.positions()):
                self._rungs.setdefault(rung(len(sample.ids)), []).append(index)
        if not self._rungs:
            raise AssetError("the training text has no answer tokens; check --data")
        self._order: tuple[int, list[tuple[int, list[int]]]] = (-1, [])
        self.per_epoch = len(self._epoch(0))

    def __getitem__(self, index: int) -> Batch:
        """Batch ``index``, counted over all epochs, on the CPU."""
        epoch, at = divmod(index, self.per_epoch)
        length, members = self._epoch(epoch)[at]
        return self._build(length, members)

    def _epoch(self, epoch: int) -> list[tuple[int, list[int]]]:
        """(length, sample indices) of every batch of one epoch."""
        if self._order[0] == epoch:
            return self._order[1]
        random = np.random.default_rng([self._settings.seed, epoch])
        batches: list[tuple[int, list[int]]] = []
        for length, members in sorted(self._rungs.items()):
            order = random.permutation(members) if self._settings.shuffle else np.array(members)
            rows = self.rows(length)
            parts = [order[i : i + rows].tolist() for i in range(0, len(order), rows)]
            batches += [(length, part) for part in parts]
        if self._settings.shuffle:
            batches = [batches[i] for i in random.permutation(len(batches))]
        self._order = (epoch, batches)
        return batches

    def rows(self, length: int) -> int:
        """Texts of a batch of one length."""
        return max(1, self._settings.tokens // length)

    def _build(self, length: int, members: Sequence[int]) -> Batch:
        """Always all rows of the rung, so that shapes repeat; missing texts are zeros."""
        rows = min(self.rows(length), len(self._rungs[length]))
        ids = np.zeros((rows, length), dtype=np.int64)
        wanted = []
        for row, member in enumerate(members):
            sample = self._samples[member]
            ids[row, : len(sample.ids)] = sample.ids
            wanted.append(row * length + sample.positions())
        where = np.concatenate(wanted)
        count, chunk = len(where), self._settings.chunk
        padded = -(-count // chunk) * chunk
        weight = np.zeros(padded, dtype=np.float32)
        weight[:count] = 1.0 / count
        where = np.concatenate([where, np.zeros(padded - count, dtype=np.int64)])
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(where), torch.from_numpy(weight), count
        )


def held_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples: every k-th one is held out, at most a fifth of all."""
    count = min(count, len(samples) // 5)
    if count < 1:
        raise AssetError(f"{len(samples)} texts are too few to train on; give at least 5")
    step = len(samples) // count
    chosen = set(range(step - 1, step * count, step))
    rest = [s for i, s in enumerate(samples) if i not in chosen]
    return rest, [samples[i] for i in sorted(chosen)]
