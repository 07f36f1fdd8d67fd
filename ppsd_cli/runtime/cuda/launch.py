"""Kernel launches: shapes to grids, tiles and flags. The same code runs in Triton's interpreter.

A launch serves a *group*: the same product of several stages at once, which on one GPU is faster
than kernels side by side. Members differ in their tensors only.

Shapes: W rows, H hidden, N query heads, M key/value heads, D head size, F intermediate, V columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppsd_cli.model.layers import Shape
from ppsd_cli.runtime.cuda.attention import attend_kernel
from ppsd_cli.runtime.cuda.choice import output_kernel
from ppsd_cli.runtime.cuda.linear import linear_kernel, qkv_kernel
from ppsd_cli.runtime.cuda.tiles import (
    ATTENTION,
    FEWEST_ROWS,
    HOPPER_SHARED,
    SPLIT,
    Tile,
    attention_block,
    attention_tile,
    choose_tile,
    power_of_two,
)


@dataclass(frozen=True, slots=True)
class Launcher:
    """Settings of all launches.

    ``clock``: kernels note times. ``chained``: programmatic dependent launch within a stream.
    ``slots``: capacity of the caches, which bounds the programs of attention. ``shared``: bytes of
    shared memory that a program may have.
    """

    clock: bool
    chained: bool
    slots: int
    shared: int = HOPPER_SHARED
    tables: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def splits(self) -> int:
        """Programs of one key/value head in attention: a power of two, at most ``ATTENTION``."""
        return min(ATTENTION, power_of_two(-(-self.slots // SPLIT)))

    def tile(
        self,
        inner: int,
        outer: int,
        *,
        width: int,
        paired: bool,
        dtype: torch.dtype,
        members: int = 1,
    ) -> Tile:
        """How a product with weights of ``dtype`` is cut on this GPU; see ``choose_tile``."""
        narrow = dtype != torch.float32
        tile = choose_tile(inner, outer, width=width, paired=paired, narrow=narrow, members=members)
        return tile.within(self.shared, paired=paired, size=dtype.itemsize)

    def flags(self, tile: Tile, *, first: bool) -> dict[str, Any]:
        """Compile-time and launch settings. ``first``: the kernel may follow several others, and
        so waits in the ordinary way.
        """
        chained = self.chained and not first
        return {
            "PDL": chained,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **({"launch_pdl": True} if chained else {}),
        }

    def table(self, members: Sequence[Sequence[Any]], *, aligned: Sequence[int]) -> Tensor:
        """Offsets [members, fields] of each member's tensors from the first one's, in elements.

        Plain integers stay as they are. ``aligned``: fields that kernels take for whole 16 bytes.
        """
        rows = []
        for member in members:
            row = [
                _distance(value, origin) if isinstance(origin, Tensor) else value
                for value, origin in zip(member, members[0], strict=True)
            ]
            for index in aligned:
                tensor = member[index]
                assert isinstance(tensor, Tensor)
                assert row[index] * tensor.element_size() % 16 == 0, "a member is not aligned"
            rows.append(row)
        key = tuple(number for row in rows for number in row)
        if key not in self.tables:
            first = next(value for value in members[0] if isinstance(value, Tensor))
            self.tables[key] = torch.tensor(rows, dtype=torch.int64, device=first.device)
        return self.tables[key]


@dataclass(frozen=True, slots=True)
class Stamp:
    """Where a kernel notes when it was done: column ``stamps[:, stage]`` of int64 [TICKS, n]."""

    stamps: Tensor
    column: int
    board: Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """One product: out [W, O] = residual + f(norm(x) [W, K] @ weight.T + bias)."""

    x: Tensor
    weight: Tensor
    out: Tensor
    norm: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Qkv:
    """Queries of x [W, H] into q [W, N, D]; keys and values into [M, slots, D] at ``place``.

    ``weight`` [(N + 2M) * D, H]; ``place`` [W, 2]: positions and slots. In a group, members with
    ``keys_only`` make no queries, and their weight's first N * D rows are not read.
    """

    x: Tensor
    weight: Tensor
    norm: Tensor | None
    place: Tensor
    q: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    keys_only: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """Scratch of attention: partial results of the splits, and their counter."""

    part: Tensor
    top: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, shape: Shape, *, width: int, splits: int, device: torch.device) -> "Scores":
        """Scratch for ``width`` rows."""
        m, r = shape.kv_heads, attention_rows(shape, width)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return cls(
            torch.zeros(m, splits, r, shape.head_dim, **wide),
            torch.zeros(m, splits, r, **wide),
            torch.zeros(m, splits, r, **wide),
            torch.zeros(m * (r // FEWEST_ROWS), dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class Near:
    """Keys and values [M, W * L, D] of the newest lags of a draft head's rows, beside its cache.

    Row w sees those from w * L on.
    """

    keys: Tensor
    values: Tensor
    width: int = 1

    @property
    def lags(self) -> int:
        """L."""
        return self.keys.shape[1] // self.width


@dataclass(frozen=True, slots=True)
class Branch:
    """What rows see in a tree: see ``attention.py``.

    ``owner`` [S], ``where`` [S] (int32): node and position of each slot. ``path`` [W, P] (int32):
    nodes of each row's path. ``view`` [2] (int64): end of the slots in use, and the horizon.
    ``kin`` [W, K] (int64): slots of each row and its ancestors, where near keys replace them.
    """

    owner: Tensor
    where: Tensor
    path: Tensor
    view: Tensor
    kin: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Attend:
    """Attention of q [W, N, D] over keys and values [M, slots, D] into out [W, N * D], whose rows
    may lie apart.

    ``branch``: in trees; without it slots are positions.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    place: Tensor
    scores: Scores
    out: Tensor
    near: Near | None = None
    branch: Branch | None = None


def attention_rows(shape: Shape, width: int) -> int:
    """Query rows of one key/value head, padded for tensor cores."""
    return max(FEWEST_ROWS, power_of_two(width * shape.heads // shape.kv_heads))


def rows_of(weight: Tensor) -> Tensor:
    """A matrix [in, out] as contiguous [out, in]; no copy where it is one already."""
    return weight.t().contiguous()


def linear(
    launcher: Launcher,
    members: Sequence[Linear],
    *,
    eps: float = 0.0,
    gated: bool = False,
    first: bool = False,
) -> None:
    """A group of products of equal shape; see ``linear_kernel``."""
    one = members[0]
    width, inner = one.x.shape
    outer = one.out.shape[1]
    tile = launcher.tile(
        inner,
        outer,
        width=width,
        paired=gated,
        dtype=one.weight.dtype,
        members=len(members),
    )
    stamps = next((m.stamp for m in members if m.stamp is not None), None)
    table = one.x
    if len(members) > 1:
        rows = [(*_linear_tensors(m), -1 if m.stamp is None else m.stamp.column) for m in members]
        table = launcher.table(rows, aligned=range(6))
    linear_kernel[(-(-outer // tile.rows), 1, len(members))](
        *_linear_tensors(one),
        *_stamp_pointers(stamps, one.x, shared=len(members) > 1),
        table,
        width,
        eps,
        outer,
        K=inner,
        BN=tile.rows,
        BK=tile.columns,
        WP=tile.padded(width),
        NORM=one.norm is not None,
        GATED=gated,
        BIAS=one.bias is not None,
        RESIDUAL=one.residual is not None,
        STAMP=stamps is not None and launcher.clock,
        STAMPS=1 if stamps is None else stamps.stamps.shape[1],
        DOT=tile.dot,
        SLICES=tile.slices,
        GROUPED=len(members) > 1,
        **launcher.flags(tile, first=first),
    )


def _linear_tensors(call: Linear) -> tuple[Tensor, ...]:
    x = call.x
    optional = (call.norm, call.bias, call.residual)
    norm, bias, residual = (x if t is None else t for t in optional)
    return x, norm, call.weight, bias, residual, call.out


def qkv(
    launcher: Launcher,
    members: Sequence[Qkv],
    *,
    shape: Shape,
    tables: tuple[Tensor, Tensor],
    first: bool = False,
) -> None:
    """A group of equal shape; ``shape.heads`` 0 makes keys and values only. See ``qkv_kernel``."""
    one = members[0]
    width, inner = one.x.shape
    n, m, d = shape.heads, shape.kv_heads, shape.head_dim
    pairs = (n + 2 * m) * d // 2
    single = one.q_norm is not None
    tile = launcher.tile(
        inner, pairs, width=width, paired=True, dtype=one.x.dtype, members=len(members)
    )
    rows = d // 2 if single else tile.rows
    table = one.place
    if len(members) > 1:
        named = [
            (*_qkv_tensors(call), call.keys.stride(0), n * d // 2 * call.keys_only)
            for call in members
        ]
        table = launcher.table(named, aligned=(0, 1, 2, 3, 4, 5, 7, 8, 9))
    x, norm, weight, bias, q_norm, k_norm, place, q, keys, values = _qkv_tensors(one)
    qkv_kernel[(-(-pairs // rows), 1, len(members))](
        x,
        norm,
        weight,
        bias,
        q_norm,
        k_norm,
        *tables,
        place,
        q,
        keys,
        values,
        table,
        width,
        shape.rms_eps,
        keys.stride(0),
        N=n,
        M=m,
        D=d,
        K=inner,
        BN=rows,
        BK=tile.columns if rows == tile.rows else min(tile.columns, 64),
        WP=tile.padded(width),
        NORM=one.norm is not None,
        BIAS=one.bias is not None,
        HEAD_NORM=single,
        DOT=tile.dot,
        SLICES=tile.slices,
        GROUPED=len(members) > 1,
        SKIPS=any(call.keys_only for call in members),
        **launcher.flags(tile, first=first),
    )


def _qkv_tensors(call: Qkv) -> tuple[Tensor, ...]:
    norm, bias, q_norm, k_norm = (
        call.x if t is None else t for t in (call.norm, call.bias, call.q_norm, call.k_norm)
    )
    return (
        call.x, norm, call.weight, bias, q_norm, k_norm,
        call.place, call.q, call.keys, call.values,
    )  # fmt: skip


def attend(
    launcher: Launcher, members: Sequence[Attend], *, shape: Shape, window: int | None = None
) -> None:
    """A group of equal shape; see ``attend_kernel``."""
    one = members[0]
    width, near, branch = one.q.shape[0], one.near, one.branch
    table = one.place
    if len(members) > 1:
        named = [_attend_tensors(call) for call in members]
        table = launcher.table(named, aligned=(0, 1, 2, 4, 8))
    q, keys, values, place, part, top, total, count, out, path, view = _attend_tensors(one)
    tile = attention_tile(shape.head_dim)
    rows = attention_rows(shape, width)
    block = attention_block(rows, heads=shape.kv_heads * len(members))
    attend_kernel[(shape.kv_heads * (rows // block), launcher.splits, len(members))](
        q,
        keys,
        values,
        near.keys if near else keys,
        near.values if near else values,
        place,
        part,
        top,
        total,
        count,
        out,
        table,
        place if branch is None else branch.owner,
        place if branch is None else branch.where,
        path,
        view,
        place if branch is None or branch.kin is None else branch.kin,
        width,
        keys.stride(0),
        OUT=one.out.stride(0),
        N=shape.heads,
        M=shape.kv_heads,
        D=shape.head_dim,
        R=rows,
        BR=block,
        BT=tile.columns,
        SPLIT=SPLIT,
        MAX_SPLITS=ATTENTION,
        SPLITS=launcher.splits,
        WINDOW=window or 0,
        LAG=near.lags if near else 0,
        NEAR=max(16, power_of_two(near.keys.shape[1])) if near else 16,
        SCALE=shape.head_dim**-0.5,
        PATH=0 if branch is None else branch.path.shape[1],
        GROUPED=len(members) > 1,
        **launcher.flags(tile, first=False),
    )


def _attend_tensors(call: Attend) -> tuple[Tensor, ...]:
    s, place, branch = call.scores, call.place, call.branch
    path, view = (place, place) if branch is None else (branch.path, branch.view)
    return (
        call.q, call.keys, call.values, place, s.part, s.top, s.total, s.count, call.out,
        path, view,
    )  # fmt: skip


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
    first: bool = False,
) -> None:
    """Logits [W, V] (float32) of x [W, H] and the votes for a token; ``noise`` None is greedy."""
    width, inner = x.shape
    columns = weight.shape[0]
    tile = launcher.tile(inner, columns, width=width, paired=False, dtype=weight.dtype)
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
        *_stamp_pointers(stamp, x, shared=False),
        width,
        eps,
        columns,
        K=inner,
        BN=tile.rows,
        BK=tile.columns,
        WP=tile.padded(width),
        SAMPLE=noise is not None,
        MAPPED=token_ids is not None,
        STAMP=stamp is not None and launcher.clock,
        STAMPS=1 if stamp is None else stamp.stamps.shape[1],
        DOT=tile.dot,
        SLICES=tile.slices,
        **launcher.flags(tile, first=first),
    )


def _distance(tensor: Tensor, origin: Tensor) -> int:
    """Elements from one tensor to another."""
    return (tensor.data_ptr() - origin.data_ptr()) // tensor.element_size()


def _stamp_pointers(stamp: Stamp | None, other: Tensor, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Stamps and board; the column is in the table where a group shares the launch."""
    if stamp is None:
        return other, other
    return stamp.stamps if shared else stamp.stamps[:, stamp.column :], stamp.board
