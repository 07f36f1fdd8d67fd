"""One stage: a run of consecutive layers with its caches, and the ends of the model it holds.

Shapes: W rows, H hidden, V vocabulary, S slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ppsd_cli.model.cache import LayerCache, Rows, attend, visible
from ppsd_cli.model.layers import LayerWeights, Shape, finish, linear, project, rms_norm
from ppsd_cli.model.load import Loader
from ppsd_cli.model.rope import rope_tables
from ppsd_cli.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StageRange:
    """Layers [first, last) of a model of ``total`` layers."""

    first: int
    last: int
    total: int

    @property
    def embeds(self) -> bool:
        """Whether token embeddings belong to this stage."""
        return self.first == 0

    @property
    def predicts(self) -> bool:
        """Whether the final norm and LM matrix belong to this stage."""
        return self.last == self.total


@dataclass(frozen=True, slots=True)
class Output:
    """The final norm [H] and LM matrix [H, V], or [H, V'] with ``token_ids`` [V'] (reduced)."""

    norm: Tensor
    lm_matrix: Tensor
    eps: float
    token_ids: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [W, V] of hidden states [W, H] before the final norm."""
        return linear(rms_norm(hidden, self.norm, self.eps), self.lm_matrix)


class Stage:
    """Layers with caches of ``slots`` slots. One call serves every width."""

    def __init__(
        self,
        spec: ModelSpec,
        part: StageRange,
        weights: list[LayerWeights],
        *,
        slots: int,
        embedding: Tensor | None = None,
        output: Output | None = None,
    ) -> None:
        assert len(weights) == part.last - part.first
        self.spec, self.part, self.embedding, self.output = spec, part, embedding, output
        self.tap_depths: frozenset[int] = frozenset()
        self.slots = slots
        self._weights, self._shape = weights, Shape.of(spec)
        norm = weights[0].input_norm
        self.dtype, self.device = norm.dtype, norm.device
        cos, sin = rope_tables(spec, slots)
        self._cos = cos.to(self.device, self.dtype)
        self._sin = sin.to(self.device, self.dtype)
        self.caches = [
            LayerCache(
                kv_heads=spec.kv_heads,
                slots=slots,
                head_dim=spec.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            for _ in weights
        ]

    @classmethod
    def load(cls, loader: Loader, part: StageRange, *, slots: int) -> "Stage":
        """Read exactly the tensors of this stage; tied embeddings are held once."""
        embedding = loader.embedding() if part.embeds else None
        output = None
        if part.predicts:
            shared = embedding if loader.spec.tied else None
            matrix = loader.lm_matrix() if shared is None else shared
            output = Output(loader.final_norm(), matrix, loader.spec.rms_eps)
        weights = [loader.layer(i) for i in range(part.first, part.last)]
        return cls(loader.spec, part, weights, slots=slots, embedding=embedding, output=output)

    @property
    def layers(self) -> list[LayerWeights]:
        """Weights of the stage's layers, in order."""
        return self._weights

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Rotary cosines and signed sines [S, D]."""
        return self._cos, self._sin

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states [W, H] of token ids [W]."""
        assert self.embedding is not None
        return self.embedding[:, token_ids].t().contiguous()

    def forward(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers on hidden [W, H]; also the states after the depths in ``tap_depths``."""
        cos, sin = self._cos[rows.positions][:, None], self._sin[rows.positions][:, None]
        views = {w: visible(rows, w) for w in set(self._windows())}
        taps = {}
        for depth, (weights, cache, window) in enumerate(
            zip(self._weights, self.caches, self._windows(), strict=True), self.part.first + 1
        ):
            q, k, v = project(hidden, weights, self._shape, cos, sin)
            cache.write(k, v, rows.slots)
            attended = attend(q, cache, rows, views[window])
            hidden = finish(hidden, attended, weights, self._shape)
            if depth in self.tap_depths:
                taps[depth] = hidden
        return hidden, taps

    def first_layers(self, count: int) -> "Stage":
        """A stage of the first ``count`` layers, with the same weights but caches of its own."""
        part = StageRange(self.part.first, self.part.first + count, self.part.total)
        return Stage(self.spec, part, self._weights[:count], slots=self.slots)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight that this stage holds, shared ones once."""
        if self.embedding is not None:
            yield self.embedding
        if self.output is not None:
            yield self.output.norm
            if self.output.lm_matrix is not self.embedding:
                yield self.output.lm_matrix
        for weights in self._weights:
            yield from weights.tensors().values()

    def weight_bytes(self) -> int:
        """Bytes of the weights, without caches."""
        return sum(t.nbytes for t in self.tensors())

    def _windows(self) -> tuple[int | None, ...]:
        return self.spec.windows[self.part.first : self.part.last]
