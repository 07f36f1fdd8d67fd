"""Tensor parallelism for ``many_gpus.py``: the model of one rank, and one step of decoding.

torch's ``parallelize_module`` shards the same layers, and the LM matrix over the vocabulary. The
token, its position and the caches stay on the device, so that a step can be one CUDA graph.
Queries, keys and values are one product and so are gate and up, as in the engine.

Shapes: H hidden, N query heads, M key/value heads, G = N / M, D head size, F intermediate,
V vocabulary, S slots, R ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from ppsd_cli.errors import ConfigError
from ppsd_cli.model.layers import rms_norm
from ppsd_cli.model.random_weights import RandomCheckpoint
from ppsd_cli.model.rope import rope_tables, rotate
from ppsd_cli.model.spec import ModelSpec
from ppsd_cli.runtime.placement import layer_parameters

_WORK = 256 << 20
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rank:
    """One process."""

    number: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def share(self, size: int) -> slice:
        """This rank's part of a dimension."""
        each = size // self.world
        return slice(self.number * each, (self.number + 1) * each)


@dataclass(slots=True)
class Pieces:
    """What lies between the products, replaced as a whole by a variant."""

    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    gate: Callable[[Tensor], Tensor]
    reduce: Reduce


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual x + y and its norm."""
    x = x + y
    return x, rms_norm(x, weight, eps)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, tables: tuple[Tensor, Tensor], place: Tensor
) -> Tensor:
    """Attention of one token [1, N * D]; its key and value go into the caches [M, S, D].

    ``place`` [1]: its position. The G query heads of a group are rows of one query block.
    """
    m, slots, d = keys.shape
    heads = qkv.view(1, -1, d)
    n = heads.shape[1] - 2 * m
    cos, sin = (table.index_select(0, place)[:, None] for table in tables)
    rotated = rotate(heads[:, : n + m], cos, sin)
    keys.index_copy_(1, place, rotated[:, n:].transpose(0, 1))
    values.index_copy_(1, place, heads[:, n + m :].transpose(0, 1))
    seen = (torch.arange(slots, device=qkv.device) <= place)[None, None, None]
    grouped = rotated[:, :n].reshape(1, m, n // m, d)
    mask = seen.expand(1, m, n // m, slots)
    out = functional.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask)
    return out.reshape(1, n * d)


def gate(pair: Tensor) -> Tensor:
    """silu(gate) * up of [1, 2F]."""
    first, up = pair.chunk(2, dim=-1)
    return functional.silu(first) * up


class Block(nn.Module):
    """A decoder layer of one rank. Products are whole until they are parallelized."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        h, f, d = spec.hidden, spec.intermediate, spec.head_dim
        self.qkv = nn.Linear(h, (spec.heads + 2 * spec.kv_heads) * d, bias=False)
        self.output = nn.Linear(spec.heads * d, h, bias=False)
        self.gate_up = nn.Linear(h, 2 * f, bias=False)
        self.down = nn.Linear(f, h, bias=False)
        self.input_norm, self.mlp_norm = (nn.Parameter(torch.empty(h)) for _ in range(2))
        self.eps = spec.rms_eps
        self.keys: Tensor
        self.values: Tensor

    def forward(
        self, x: Tensor, y: Tensor, place: tuple[Any, Tensor], pieces: Pieces
    ) -> tuple[Tensor, Tensor]:
        """The residual before the last sum and what is to be added to it, each [1, H]."""
        tables, position = place
        x, normed = pieces.add_norm(x, y, self.input_norm, self.eps)
        heads = pieces.attend(self.qkv(normed), self.keys, self.values, tables, position)
        y = pieces.reduce(self.output(heads))
        x, normed = pieces.add_norm(x, y, self.mlp_norm, self.eps)
        return x, pieces.reduce(self.down(pieces.gate(self.gate_up(normed))))


class Decoder(nn.Module):
    """All layers of one rank, with the loop's state on the device."""

    def __init__(self, spec: ModelSpec, rank: Rank, slots: int) -> None:
        super().__init__()
        self.spec, self.rank = spec, rank
        with torch.device("meta"):
            self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
            self.lm = nn.Linear(spec.hidden, spec.vocabulary, bias=False)
            self.embedding = nn.Parameter(torch.empty(spec.vocabulary, spec.hidden))
            self.norm = nn.Parameter(torch.empty(spec.hidden))
        self.to(rank.dtype)
        self.requires_grad_(requires_grad=False)
        self._shard()
        self._fill()
        options = {"dtype": rank.dtype, "device": rank.device}
        shape = (spec.kv_heads // rank.world, slots, spec.head_dim)
        for block in self.blocks:
            block.keys, block.values = (torch.zeros(shape, **options) for _ in range(2))
        tables = rope_tables(spec, slots)
        self.tables = tuple(t.to(rank.device, rank.dtype) for t in tables)
        self.zero = torch.zeros(1, spec.hidden, **options)
        self.token, self.position = (
            torch.zeros(1, dtype=torch.int64, device=rank.device) for _ in range(2)
        )
        self.said = torch.zeros(slots + 1, dtype=torch.int64, device=rank.device)
        self.votes = torch.zeros(rank.world, 2, dtype=torch.float32, device=rank.device)

    def _shard(self) -> None:
        """By torch; what ``output`` and ``down`` give is summed by ``Pieces.reduce``, in place."""
        mesh = init_device_mesh(self.rank.device.type, (self.rank.world,))
        plan = {"qkv": ColwiseParallel(), "gate_up": ColwiseParallel()}
        plan |= {name: RowwiseParallel(output_layouts=Partial()) for name in ("output", "down")}
        for block in self.blocks:
            parallelize_module(block, mesh, plan)
        parallelize_module(self, mesh, {"lm": ColwiseParallel()})

    def _fill(self) -> None:
        """This rank's numbers of the model that the engine has with the same device and format.

        Made tensor by tensor; of each only the rank's part stays.
        """
        self.to_empty(device=self.rank.device)
        source = RandomCheckpoint(self.spec, 0, self.rank.device)
        spec, rank = self.spec, self.rank
        d = spec.head_dim

        def read(name: str) -> Tensor:
            return source.tensor(name, rank.dtype)

        def rows(names: Sequence[str]) -> Tensor:
            parts = []
            for name in names:
                whole = read(name)
                parts.append(whole[rank.share(whole.shape[0])].clone())
            return torch.cat(parts)

        for index, block in enumerate(self.blocks):
            at = f"model.layers.{index}."
            mixer, mlp = at + "self_attn.", at + "mlp."
            _put(block.qkv, rows([f"{mixer}{x}_proj.weight" for x in "qkv"]))
            _put(block.gate_up, rows([f"{mlp}{x}_proj.weight" for x in ("gate", "up")]))
            _put(block.output, read(mixer + "o_proj.weight")[:, rank.share(spec.heads * d)])
            _put(block.down, read(mlp + "down_proj.weight")[:, rank.share(spec.intermediate)])
            block.input_norm.copy_(read(at + "input_layernorm.weight"))
            block.mlp_norm.copy_(read(at + "post_attention_layernorm.weight"))
        _put(self.lm, rows(["lm_head.weight"]))
        self.embedding.copy_(read("model.embed_tokens.weight"))
        self.norm.copy_(read("model.norm.weight"))

    def logits(self, pieces: Pieces) -> Tensor:
        """This rank's logits [1, V / R] of the token that is due."""
        x, y = self.embedding.index_select(0, self.token), self.zero
        for block in self.blocks:
            x, y = block(x, y, (self.tables, self.position), pieces)
        return self.lm(pieces.add_norm(x, y, self.norm, self.spec.rms_eps)[1])

    def step(self, pieces: Pieces) -> None:
        """One token: choose the next by all ranks' logits, note it, and go on with it.

        Ties go to the lowest id. Ids fit float32 exactly.
        """
        logits = self.logits(pieces)
        best, column = logits.float().max(dim=-1)
        vote = torch.stack([best, (column + self.rank.number * logits.shape[-1]).float()], dim=-1)
        self.votes.zero_()
        self.votes[self.rank.number].copy_(vote[0])
        dist.all_reduce(self.votes)  # what the others say is zero here, so the sum is all votes
        winner = self.votes[:, 0].argmax(dim=0, keepdim=True)
        self.token.copy_(self.votes.index_select(0, winner)[:, 1].long())
        self.position.add_(1)
        self.said.index_copy_(0, self.position, self.token)

    def begin(self, prompt: Sequence[int], step: Callable[[], None]) -> None:
        """Run the prompt, one token after the other."""
        self.position.zero_()
        for token in prompt:
            self.token.fill_(token)
            step()


def _put(layer: nn.Linear, local: Tensor) -> None:
    assert isinstance(layer.weight, DTensor)
    target = layer.weight.to_local()
    assert target.shape == local.shape
    target.copy_(local)


def check_shape(spec: ModelSpec, world: int) -> None:
    """ConfigError for what these layers do not have or cannot be shared out among the ranks."""
    if spec.tied or spec.qk_norm or spec.qkv_bias or spec.output_bias or spec.mlp_bias:
        raise ConfigError("tensor parallelism is written for untied llama shapes without biases")
    if any(size % world for size in (spec.kv_heads, spec.intermediate, spec.vocabulary)):
        raise ConfigError(f"{spec.kv_heads} key/value heads cannot be shared by {world} ranks")


def needed_bytes(spec: ModelSpec, rank: Rank, slots: int) -> int:
    """What one rank allocates: its shards, caches, all embeddings, and one whole tensor."""
    matrix = spec.vocabulary * spec.hidden
    cache = 2 * spec.kv_heads * spec.head_dim * slots * spec.layers
    shards = spec.layers * layer_parameters(spec) + matrix + cache
    largest = max(matrix, spec.hidden * spec.intermediate)
    return (shards // rank.world + matrix + largest) * rank.dtype.itemsize + _WORK
