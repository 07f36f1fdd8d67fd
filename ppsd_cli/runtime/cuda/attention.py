"""Attention of a few rows over a slot cache, in time that follows the length, not the capacity.

Program (m, s) reads split ``s`` of key/value head ``m`` once for all its query rows, or for BR of
them where programs are few. The size of a split depends on the position alone (SPLIT slots, doubled
until at most MAX_SPLITS are needed), so a row's rounding does not depend on the cache's capacity,
which only bounds the programs (SPLITS). The program that finishes last joins the splits in their
order and leaves the counter at zero for the next launch.

In a tree a slot is not a position. ``owner`` [S] says which node holds each slot, as a number that
grows with the tick of its entry. What entered up to the *horizon* is committed, and every row sees
it; of the newer nodes a row sees those of its own path. A free slot belongs to no one that could be
seen. This one account serves all stages: a node that entered after a row is newer than its path.

Shapes: W rows, G = N / M query heads in a group, R padded W * G rows, BR of them in a program, D
head size, S slots, P nodes of a path.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.linear import shifted, shifted_plainly, wait_for_predecessor


@triton.jit
def _attend_tile(q, keys, values, hide, top, total, out, SCALE: tl.constexpr):
    """One step of the running softmax over a tile of keys [BT, D]; ``hide`` [R, BT]."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * SCALE
    scores = tl.where(hide, float("-inf"), scores)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - safe[:, None])
    decay = tl.exp(top - safe)
    total = total * decay + tl.sum(weights, axis=1)
    out = out * decay[:, None]
    out = tl.dot(weights.to(values.dtype), values, out, input_precision="ieee")
    return new_top, total, out


@triton.jit
def _hidden_in_tree(
    slot,
    end,
    horizon,
    row,
    live,
    position,
    owner_ptr,
    where_ptr,
    path_ptr,
    kin_ptr,
    PATH: tl.constexpr,
    WINDOW: tl.constexpr,
    LAG: tl.constexpr,
):
    """Which slots [R, BT] the rows do not see; with ``LAG`` also those of their nearest ancestors,
    ``kin_ptr`` [W, LAG + 1].
    """
    owner = tl.load(owner_ptr + slot, mask=slot < end, other=2147483647)
    seen = (owner <= horizon)[None, :] | (row[:, None] < 0)
    for j in tl.static_range(PATH):
        node = tl.load(path_ptr + row * PATH + j, mask=live, other=0)
        seen = seen | (owner[None, :] == node[:, None])
    if WINDOW > 0:
        where = tl.load(where_ptr + slot, mask=slot < end, other=0)
        seen = seen & (where[None, :] > position[:, None] - WINDOW)
    for j in tl.static_range(LAG):
        near = tl.load(kin_ptr + row * (LAG + 1) + j, mask=live, other=0).to(tl.int32)
        seen = seen & (slot[None, :] != near[:, None])
    return seen == 0


@triton.jit
def _mean(out, total, PATH: tl.constexpr):
    """Weighted values over their weights. A void row of a tree may see nothing: zeros."""
    if PATH > 0:
        total = tl.where(total > 0, total, 1.0)
    return out / total[:, None]


@triton.jit
def attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    near_keys_ptr,
    near_values_ptr,
    place_ptr,
    part_ptr,
    part_top_ptr,
    part_total_ptr,
    count_ptr,
    out_ptr,
    table_ptr,
    owner_ptr,
    where_ptr,
    path_ptr,
    view_ptr,
    kin_ptr,
    W: tl.constexpr,
    head_stride,
    OUT: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    LAG: tl.constexpr,
    NEAR: tl.constexpr,
    SCALE: tl.constexpr,
    PATH: tl.constexpr,
    GROUPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [W, N * D] of queries [W, N, D]; a row at position p sees slots up to p - LAG.

    Rows of ``out`` are ``OUT`` apart.

    ``place_ptr`` [W, 2]: positions (and slots) of the rows, ascending. ``WINDOW``: a row sees
    itself and WINDOW - 1 slots before it (0: all). ``LAG`` > 0 adds for each row its own ``near``
    keys and values [M, W * LAG, D] at lags 0 to LAG - 1 (those before position 0 are hidden);
    ``NEAR``: their number, padded.
    ``PATH`` > 0: a tree; ``path_ptr`` [W, PATH] names the nodes of each row's path, ``view_ptr``
    [2] holds the end of the slots in use and the horizon, ``where_ptr`` [S] a slot's position.
    ``GROUPED``: as in ``linear_kernel``, with ``table_ptr`` [members, 11]; without near keys.
    """
    if GROUPED:
        q_ptr = shifted(q_ptr, table_ptr, 11, 0)
        keys_ptr = shifted(keys_ptr, table_ptr, 11, 1)
        values_ptr = shifted(values_ptr, table_ptr, 11, 2)
        place_ptr = shifted_plainly(place_ptr, table_ptr, 11, 3)
        part_ptr = shifted(part_ptr, table_ptr, 11, 4)
        part_top_ptr = shifted_plainly(part_top_ptr, table_ptr, 11, 5)
        part_total_ptr = shifted_plainly(part_total_ptr, table_ptr, 11, 6)
        count_ptr = shifted_plainly(count_ptr, table_ptr, 11, 7)
        out_ptr = shifted(out_ptr, table_ptr, 11, 8)
        path_ptr = shifted_plainly(path_ptr, table_ptr, 11, 9)
        view_ptr = shifted_plainly(view_ptr, table_ptr, 11, 10)
    G: tl.constexpr = N // M
    m = tl.program_id(0) // (R // BR)
    s = tl.program_id(1)
    wait_for_predecessor(PDL)
    r = (tl.program_id(0) % (R // BR)) * BR + tl.arange(0, BR)
    d = tl.arange(0, D)
    row = r // G
    live = r < W * G
    position = tl.load(place_ptr + row * 2, mask=live, other=0).to(tl.int32)
    if PATH > 0:
        end = tl.load(view_ptr).to(tl.int32)
        horizon = tl.load(view_ptr + 1).to(tl.int32)
    else:
        last = tl.load(place_ptr + (W - 1) * 2).to(tl.int32)
        end = tl.maximum(last + 1 - LAG, 0)  # slots that some row sees
    size = SPLIT
    while size * MAX_SPLITS < end:
        size *= 2
    splits = tl.maximum((end + size - 1) // size, 1)
    if s < splits:
        here = (m * G + r % G)[:, None] * D + d[None, :]
        at = row[:, None] * OUT + here
        q = tl.load(q_ptr + row[:, None] * (N * D) + here, mask=live[:, None], other=0.0)
        top = tl.full([BR], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BR], dtype=tl.float32)
        out = tl.zeros([BR, D], dtype=tl.float32)
        begin = s * size
        if (WINDOW > 0) & (PATH == 0):
            first = tl.load(place_ptr).to(tl.int32) - WINDOW + 1
            begin = tl.maximum(begin, (first // BT) * BT)
        for start in range(begin, tl.minimum(s * size + size, end), BT):
            slot = start + tl.arange(0, BT)
            inside = (slot < end)[:, None]
            tile = m * head_stride + slot[:, None] * D + d[None, :]
            keys = tl.load(keys_ptr + tile, mask=inside, other=0.0)
            values = tl.load(values_ptr + tile, mask=inside, other=0.0)
            if PATH > 0:
                hide = _hidden_in_tree(
                    slot,
                    end,
                    horizon,
                    row,
                    live,
                    position,
                    owner_ptr,
                    where_ptr,
                    path_ptr,
                    kin_ptr,
                    PATH,
                    WINDOW,
                    LAG,
                )
            else:
                hide = slot[None, :] > position[:, None] - LAG
                if WINDOW > 0:
                    hide = hide | (slot[None, :] <= position[:, None] - WINDOW)
            top, total, out = _attend_tile(q, keys, values, hide, top, total, out, SCALE)
        if LAG > 0:
            if s == 0:
                near = tl.arange(0, NEAR)
                lag = near % LAG
                tile = (m * (W * LAG) + near)[:, None] * D + d[None, :]
                inside = (near < W * LAG)[:, None]
                keys = tl.load(near_keys_ptr + tile, mask=inside, other=0.0)
                values = tl.load(near_values_ptr + tile, mask=inside, other=0.0)
                hide = (near // LAG)[None, :] != row[:, None]
                hide = hide | (near >= W * LAG)[None, :] | (lag[None, :] > position[:, None])
                top, total, out = _attend_tile(q, keys, values, hide, top, total, out, SCALE)
        if splits == 1:
            result = _mean(out, total, PATH)
            tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=live[:, None])
        else:
            part = (m * SPLITS + s) * R + r
            tl.store(part_top_ptr + part, top)
            tl.store(part_total_ptr + part, total)
            tl.store(part_ptr + part[:, None] * D + d[None, :], out)
            tl.debug_barrier()
            done = tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
            if done == splits - 1:
                tl.debug_barrier()
                all_s = tl.arange(0, SPLITS)
                every = (m * SPLITS + all_s)[:, None] * R + r[None, :]
                there = (all_s < splits)[:, None]
                tops = tl.load(
                    part_top_ptr + every, mask=there, other=float("-inf"), cache_modifier=".cg"
                )
                best = tl.max(tops, axis=0)
                out = tl.zeros([BR, D], dtype=tl.float32)
                total = tl.zeros([BR], dtype=tl.float32)
                for i in range(splits):
                    part = (m * SPLITS + i) * R + r
                    share = tl.exp(tl.load(part_top_ptr + part, cache_modifier=".cg") - best)
                    total += share * tl.load(part_total_ptr + part, cache_modifier=".cg")
                    piece = tl.load(part_ptr + part[:, None] * D + d[None, :], cache_modifier=".cg")
                    out += share[:, None] * piece
                result = _mean(out, total, PATH)
                tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=live[:, None])
                tl.store(count_ptr + tl.program_id(0), 0)
