"""Kernel launches: shapes to grids, tiles and flags. The same code runs in Triton's interpreter.

Shapes: W rows, H hidden, N query heads, M key/value heads, D head size, F intermediate, V columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.model.cache import LayerCache
from ppsd_cli.model.layers import LayerWeights, Shape
from ppsd_cli.runtime.cuda.attention import attend_kernel
from ppsd_cli.runtime.cuda.choice import output_kernel
from ppsd_cli.runtime.cuda.control import gather_kernel
from ppsd_cli.runtime.cuda.linear import linear_kernel, qkv_kernel
from ppsd_cli.runtime.cuda.tiles import ROWS, Tile, choose_tile, power_of_two


@dataclass(frozen=True, slots=True)
class Launcher:
    """Settings of all launches. ``chained``: programmatic dependent launch within a stream.

    ``splits``: programs of one key/value head in attention, a power of two.
    """

    clock: bool
    chained: int
    splits: int = 32
    attention: tuple[int, int, int] = (64, 128, 4)
    attention_chain: int = 1
    ahead: int = 0

    def flags(self, tile: Tile, *, head: bool) -> dict[str, Any]:
        """Compile-time and launch settings; ``head``: the first kernel of a branch waits plainly."""
        pdl = 0 if head else self.chained
        return {
            "PDL": pdl,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **({"launch_pdl": True} if pdl else {}),
        }


@dataclass(frozen=True, slots=True)
class Stamp:
    """Where a kernel notes when it was done: column ``stamps[:, stage]`` of int64 [TICKS, n]."""

    stamps: Tensor
    column: int
    board: Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """Scratch of one branch for attention: partial results of the splits, and their counter."""

    part: Tensor
    top: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, shape: Shape, *, width: int, splits: int, device: torch.device) -> "Attention":
        """Scratch for ``width`` rows."""
        m, r = shape.kv_heads, attention_rows(shape, width)
        wide = {"dtype": torch.float32, "device": device}
        return cls(
            torch.zeros(m, splits, r, shape.head_dim, **wide),
            torch.zeros(m, splits, r, **wide),
            torch.zeros(m, splits, r, **wide),
            torch.zeros(m, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class Near:
    """Keys and values [M, L, D] of a draft head's newest lags, beside its cache."""

    keys: Tensor
    values: Tensor

    @property
    def lags(self) -> int:
        """L."""
        return self.keys.shape[1]


def attention_rows(shape: Shape, width: int) -> int:
    """Query rows of one key/value head, padded for tensor cores."""
    return max(16, power_of_two(width * shape.heads // shape.kv_heads))


def rows_of(weight: Tensor) -> Tensor:
    """A matrix [in, out] as contiguous [out, in]; no copy where it is one already."""
    return weight.t().contiguous()


def linear(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    stamp: Stamp | None = None,
    head: bool = False,
) -> None:
    """out [W, O] = residual + f(norm(x) [W, K] @ weight.T + bias); see ``linear_kernel``."""
    width, inner = x.shape
    outer = out.shape[1]
    tile = choose_tile(
        inner, outer, width=width, paired=gated, narrow=weight.dtype != torch.float32
    )
    linear_kernel[(-(-outer // tile.rows),)](
        x,
        norm if norm is not None else x,
        weight,
        bias if bias is not None else x,
        residual if residual is not None else x,
        out,
        *_stamp_pointers(stamp, x),
        width,
        eps,
        outer,
        K=inner,
        BN=tile.rows,
        BK=tile.columns,
        WP=ROWS if tile.dot else 1,
        NORM=norm is not None,
        GATED=gated,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        STAMP=stamp is not None and launcher.clock,
        STAMPS=1 if stamp is None else stamp.stamps.shape[1],
        DOT=tile.dot,
        AHEAD=launcher.ahead if residual is not None and not gated else 0,
        **launcher.flags(tile, head=head),
    )


def qkv(
    launcher: Launcher,
    x: Tensor,
    w: LayerWeights,
    weight: Tensor,
    *,
    norm: Tensor,
    bias: Tensor | None,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    place: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    head: bool = False,
) -> None:
    """Queries of x [W, H] into q [W, N, D], keys and values into [M, slots, D] at ``place``.

    ``weight`` [(N + 2M) * D, H]; ``shape.heads`` 0 makes keys and values only.
    """
    width, inner = x.shape
    n, m, d = shape.heads, shape.kv_heads, shape.head_dim
    pairs = (n + 2 * m) * d // 2
    single = w.q_norm is not None
    tile = choose_tile(inner, pairs, width=width, paired=True, narrow=x.dtype != torch.float32)
    rows = d // 2 if single else tile.rows
    qkv_kernel[(-(-pairs // rows),)](
        x,
        norm,
        weight,
        bias if bias is not None else x,
        w.q_norm if single else x,
        w.k_norm if single else x,
        *tables,
        place,
        q,
        keys,
        values,
        width,
        shape.rms_eps,
        keys.stride(0),
        N=n,
        M=m,
        D=d,
        K=inner,
        BN=rows,
        BK=tile.columns if rows == tile.rows else min(tile.columns, 64),
        WP=ROWS if tile.dot else 1,
        BIAS=bias is not None,
        HEAD_NORM=single,
        DOT=tile.dot,
        **launcher.flags(tile, head=head),
    )


def attend(
    launcher: Launcher,
    q: Tensor,
    cache: LayerCache,
    out: Tensor,
    *,
    shape: Shape,
    place: Tensor,
    scratch: Attention,
    window: int | None = None,
    near: Near | None = None,
) -> None:
    """Attention of q [W, N, D] over the cache into out [W, N * D]; see ``attend_kernel``."""
    width = q.shape[0]
    rows = attention_rows(shape, width)
    attend_kernel[(shape.kv_heads, launcher.splits)](
        q,
        cache.keys,
        cache.values,
        near.keys if near else cache.keys,
        near.values if near else cache.values,
        place,
        scratch.part,
        scratch.top,
        scratch.total,
        scratch.count,
        out,
        width,
        cache.keys.stride(0),
        N=shape.heads,
        M=shape.kv_heads,
        D=shape.head_dim,
        R=rows,
        BT=launcher.attention[0],
        SPLIT=launcher.attention[1],
        MAX_SPLITS=launcher.splits,
        WINDOW=window or 0,
        LAG=near.lags if near else 0,
        SCALE=shape.head_dim**-0.5,
        **launcher.flags(Tile(0, 0, launcher.attention[2], stages=2), head=False)
        | ({"PDL": launcher.attention_chain} if launcher.chained else {}),
    )


@dataclass(frozen=True, slots=True)
class Votes:
    """Best score and column of each tile, [W, T]: what ``elect`` takes the token from."""

    scores: Tensor
    columns: Tensor

    @classmethod
    def of(cls, width: int, tiles: int, device: torch.device) -> "Votes":
        """Room for ``tiles`` votes a row."""
        return cls(
            torch.zeros(width, tiles, dtype=torch.float32, device=device),
            torch.zeros(width, tiles, dtype=torch.int32, device=device),
        )

    @property
    def tiles(self) -> int:
        """T."""
        return self.scores.shape[1]


@dataclass(frozen=True, slots=True)
class Noise:
    """Sampling settings on the device: seed (int64 [1]) and temperature (float32 [1])."""

    seed: Tensor
    temperature: Tensor


def output_tile(inner: int, columns: int, *, width: int, dtype: torch.dtype) -> Tile:
    """Tile of an LM matrix [V, H]."""
    return choose_tile(inner, columns, width=width, paired=False, narrow=dtype != torch.float32)


def output(
    launcher: Launcher,
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    *,
    eps: float,
    place: Tensor,
    logits: Tensor,
    votes: Votes,
    noise: Noise | None,
    token_ids: Tensor | None,
    stamp: Stamp | None = None,
) -> None:
    """Logits [W, V] (float32) of x [W, H] and the votes for a token; ``noise`` None is greedy."""
    width, inner = x.shape
    columns = weight.shape[0]
    tile = output_tile(inner, columns, width=width, dtype=weight.dtype)
    output_kernel[(-(-columns // tile.rows),)](
        x,
        norm,
        weight,
        token_ids if token_ids is not None else x,
        place,
        noise.seed if noise else x,
        noise.temperature if noise else x,
        logits,
        votes.scores,
        votes.columns,
        *_stamp_pointers(stamp, x),
        width,
        eps,
        columns,
        K=inner,
        BN=tile.rows,
        BK=tile.columns,
        WP=ROWS if tile.dot else 1,
        SAMPLE=noise is not None,
        MAPPED=token_ids is not None,
        STAMP=stamp is not None and launcher.clock,
        STAMPS=1 if stamp is None else stamp.stamps.shape[1],
        DOT=tile.dot,
        **launcher.flags(tile, head=False),
    )


def gather(launcher: Launcher, rings: Tensor, place: Tensor, out: Tensor) -> None:
    """States of every tap at its lag, from rings [K, RING + 1, H] into out [K, 1, H].

    ``place`` [2 + L, 2]: first row, position of the newest token.
    """
    taps, ring, hidden = rings.shape
    gather_kernel[(taps,)](
        rings,
        place,
        out,
        RING=ring - 1,
        H=hidden,
        BH=power_of_two(hidden),
        **launcher.flags(Tile(0, 0, 4), head=False),
    )


def _stamp_pointers(stamp: Stamp | None, other: Tensor) -> tuple[Tensor, Tensor]:
    if stamp is None:
        return other, other
    return stamp.stamps[:, stamp.column :], stamp.board
