"""What the kernel tests need of the engine's launching code, and nothing else of it.

When launches change, only this file has to follow.

Shapes: W rows, H hidden, V columns, T tiles of votes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppsd_cli.core.choose import signed_seed
from ppsd_cli.core.plan import Sampling
from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.layers import LayerWeights, Shape
from ppsd_cli.model.stage import Output
from ppsd_cli.runtime.cuda.choice import elect
from ppsd_cli.runtime.cuda.lanes import Block, BlockCall, Chooser, Scratch, run_blocks
from ppsd_cli.runtime.cuda.launch import Launcher, Noise


@dataclass(frozen=True)
class Layer:
    """One decoder layer and what it works on: rows x [W, H] from ``position`` on."""

    weights: LayerWeights
    cache: LayerCache
    x: Tensor
    position: int
    window: int | None = None


def launcher_for(slots: int) -> Launcher:
    """Plain launches over caches of that many slots."""
    return Launcher(clock=False, chained=False, slots=slots)


def run_group(
    layers: Sequence[Layer], shape: Shape, tables: tuple[Tensor, Tensor], *, slots: int
) -> list[Tensor]:
    """Results [W, H] of layers that go in one launch each step."""
    launcher, calls = launcher_for(slots), []
    for layer in layers:
        middle = layer.weights.down.shape[0]
        scratch = Scratch.of(launcher, shape, middle=middle, source=layer.x)
        block = Block.of(layer.weights, layer.window)
        place = place_of(layer.position, layer.x.shape[0]).to(layer.x.device)
        out = torch.zeros_like(layer.x)
        calls.append(BlockCall(block, layer.x, out, layer.cache, place, scratch))
    run_blocks(launcher, calls, shape, tables)
    return [call.out for call in calls]


def vote(head: Output, x: Tensor, position: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits [W, V] of rows x, and the column of each row that the votes are for."""
    chooser = Chooser(launcher_for(64), head, width=x.shape[0])
    noise = Noise(
        torch.tensor([signed_seed(sampling.seed)]),
        torch.tensor([max(sampling.temperature, 1e-30)], dtype=torch.float32),
    )
    chooser.run(x, place_of(position, x.shape[0]), sampling, noise)
    votes = chooser.votes(sampling)
    elected = torch.zeros(x.shape[0], dtype=torch.int64)
    _elect_kernel[(x.shape[0],)](votes.scores, votes.columns, elected, votes.tiles, 4)
    return chooser.logits, elected


def place_of(position: int, width: int) -> Tensor:
    """Positions and slots [W, 2] of consecutive rows."""
    positions = torch.arange(position, position + width)
    return torch.stack([positions, positions], dim=1).contiguous()


@triton.jit
def _elect_kernel(vote_ptr, vote_id_ptr, out_ptr, tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    winner = elect(vote_ptr + row * tiles, vote_id_ptr + row * tiles, tiles, BLOCK)
    tl.store(out_ptr + row, winner.to(tl.int64))
