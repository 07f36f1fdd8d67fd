"""Skinny matrix products: a few rows of activations times a weight matrix, with all that fits.

One kernel body serves every product of a decoder layer. Its program takes BN rows of the weight
matrix [O, K] (the checkpoint's own layout) and walks along K, so each weight is read once. Two
ways to multiply: by tensor cores over rows padded to WP (any width), or by plain multiply-adds for
one row (``DOT`` false). The first gives every row the same rounding whatever the width. ``SLICES``
of K side by side make it about as fast as the second where K is small.

The root mean square of the row is gathered along the way and applied to the sums at the end.

Shapes: W rows, WP padded rows, K inputs, O outputs, BN and BK tile sizes, H hidden, D head size.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Before anything that the kernel before us wrote is read (programmatic dependent launch).

    The kernel after us may start at once: it waits here too, with its first weights on their way.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def shifted(ptr, table_ptr, FIELDS: tl.constexpr, field: tl.constexpr):
    """``ptr`` moved to this program's member of the group; offsets are whole 16 bytes."""
    offset = tl.load(table_ptr + tl.program_id(2) * FIELDS + field)
    return ptr + tl.multiple_of(offset, 8)


@triton.jit
def shifted_plainly(ptr, table_ptr, FIELDS: tl.constexpr, field: tl.constexpr):
    """The same for offsets that promise no alignment."""
    return ptr + tl.load(table_ptr + tl.program_id(2) * FIELDS + field)


@triton.jit
def store_time(stamp_ptr, board_ptr, STAMPS: tl.constexpr):
    """Note the device's clock (ns) in the tick's row of stamps; ``board`` field 10 is the tick."""
    tick = tl.load(board_ptr + 10)
    tl.store(stamp_ptr + (tick % 64) * STAMPS, tl.extra.cuda.globaltimer().to(tl.int64))


@triton.jit
def _weights(w_ptr, rows, ok, cols, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile [BN, BK] of weights."""
    at = w_ptr + rows[:, None] * K + cols[None, :]
    if EVEN:
        return tl.load(at, mask=ok[:, None], other=0.0, eviction_policy="evict_first")
    inside = ok[:, None] & (cols < K)[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _dot_products(
    x_ptr,
    norm_ptr,
    w_ptr,
    low,
    high,
    ok,
    W: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    NORM: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """``products`` by tensor cores: rows padded to WP.

    The next kernel may start only when this one is nearly done: its programs would take the place
    of those here that are still to start.
    """
    cols = tl.arange(0, BK)
    EVEN: tl.constexpr = K % BK == 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    ws = tl.arange(0, WP)
    sums_low = tl.zeros([BN, WP], dtype=tl.float32)
    sums_high = tl.zeros([BN, WP], dtype=tl.float32)
    squares = tl.zeros([BK, WP], dtype=tl.float32)
    for k in range(0, K, BK):
        here = k + cols
        inside = (ws < W)[None, :] & (here < K)[:, None]
        x = tl.load(x_ptr + ws[None, :] * K + here[:, None], mask=inside, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm_ptr + here, mask=here < K, other=0.0).to(tl.float32)
            x = (wide * gain[:, None]).to(x.dtype)
        tile = _weights(w_ptr, low, ok, here, K, EVEN)
        sums_low = tl.dot(tile, x, sums_low, input_precision="ieee")
        if PAIRED:
            tile = _weights(w_ptr, high, ok, here, K, EVEN)
            sums_high = tl.dot(tile, x, sums_high, input_precision="ieee")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    return sums_low, sums_high, tl.sum(squares, axis=0)


@triton.jit
def _row_products(
    x_ptr,
    norm_ptr,
    w_ptr,
    low,
    high,
    ok,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """``products`` for one row, by plain multiply-adds in float32; WP is 1."""
    cols = tl.arange(0, BK)
    EVEN: tl.constexpr = K % BK == 0
    next_low = _weights(w_ptr, low, ok, cols, K, EVEN)
    next_high = next_low
    if PAIRED:
        next_high = _weights(w_ptr, high, ok, cols, K, EVEN)
    wait_for_predecessor(PDL)
    wide_low = tl.zeros([BN, BK], dtype=tl.float32)
    wide_high = tl.zeros([BN, BK], dtype=tl.float32)
    wide_squares = tl.zeros([BK], dtype=tl.float32)
    for k in range(0, K, BK):
        here = k + cols
        tile_low, tile_high = next_low, next_high
        if k + BK < K:
            next_low = _weights(w_ptr, low, ok, here + BK, K, EVEN)
            if PAIRED:
                next_high = _weights(w_ptr, high, ok, here + BK, K, EVEN)
        x = tl.load(x_ptr + here, mask=here < K, other=0.0).to(tl.float32)
        if NORM:
            wide_squares += x * x
            x = x * tl.load(norm_ptr + here, mask=here < K, other=0.0).to(tl.float32)
        wide_low += tile_low.to(tl.float32) * x[None, :]
        if PAIRED:
            wide_high += tile_high.to(tl.float32) * x[None, :]
    sums_low = tl.sum(wide_low, axis=1)[:, None]
    sums_high = sums_low
    if PAIRED:
        sums_high = tl.sum(wide_high, axis=1)[:, None]
    squares = tl.sum(wide_squares, axis=0) + tl.zeros([1], dtype=tl.float32)
    return sums_low, sums_high, squares


@triton.jit
def _short_products(
    x_ptr,
    norm_ptr,
    w_ptr,
    low,
    high,
    ok,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """``_row_products`` for K of few tiles: every weight is asked for before the wait."""
    cols = tl.arange(0, BK)
    EVEN: tl.constexpr = K % BK == 0
    PARTS: tl.constexpr = (K + BK - 1) // BK
    lows = (_weights(w_ptr, low, ok, cols, K, EVEN),)
    for part in tl.static_range(1, PARTS):
        lows = lows + (_weights(w_ptr, low, ok, part * BK + cols, K, EVEN),)  # type: ignore[assignment]
    highs = lows
    if PAIRED:
        highs = (_weights(w_ptr, high, ok, cols, K, EVEN),)
        for part in tl.static_range(1, PARTS):
            highs = highs + (_weights(w_ptr, high, ok, part * BK + cols, K, EVEN),)  # type: ignore[assignment]
    wait_for_predecessor(PDL)
    sums_low = tl.zeros([BN, BK], dtype=tl.float32)
    sums_high = tl.zeros([BN, BK], dtype=tl.float32)
    squares = tl.zeros([BK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        here = part * BK + cols
        x = tl.load(x_ptr + here, mask=here < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + here, mask=here < K, other=0.0).to(tl.float32)
        sums_low += lows[part].to(tl.float32) * x[None, :]
        if PAIRED:
            sums_high += highs[part].to(tl.float32) * x[None, :]
    a = tl.sum(sums_low, axis=1)[:, None]
    b = a
    if PAIRED:
        b = tl.sum(sums_high, axis=1)[:, None]
    return a, b, tl.sum(squares, axis=0) + tl.zeros([1], dtype=tl.float32)


@triton.jit
def _slice_tile(w_ptr, rows, ok, cols, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile [S, BN, BK / S] of weights, slices of K beside each other; ``cols`` [S, BK / S]."""
    at = w_ptr + rows[None, :, None] * K + cols[:, None, :]
    inside = ok[None, :, None]
    if not EVEN:
        inside = inside & (cols < K)[:, None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sliced_products(
    x_ptr,
    norm_ptr,
    w_ptr,
    low,
    high,
    ok,
    W: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    S: tl.constexpr,
    NORM: tl.constexpr,
    PAIRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """``_dot_products`` for K of few tiles: every weight is asked for before the wait.

    Each warp multiplies a slice of K, so that the chain of dependent products is short.
    """
    BS: tl.constexpr = BK // S
    cols = tl.arange(0, S)[:, None] * BS + tl.arange(0, BS)[None, :]
    EVEN: tl.constexpr = K % BK == 0
    PARTS: tl.constexpr = (K + BK - 1) // BK
    rows, there = low, ok
    if PAIRED:  # both weight rows of a pair beside each other: one product, one sum over slices
        rows = tl.reshape(tl.join(low, high), [2 * BN])
        there = tl.reshape(tl.join(ok, ok), [2 * BN])
    tiles = (_slice_tile(w_ptr, rows, there, cols, K, EVEN),)
    for part in tl.static_range(1, PARTS):
        tiles = tiles + (_slice_tile(w_ptr, rows, there, part * BK + cols, K, EVEN),)  # type: ignore[assignment]
    wait_for_predecessor(PDL)
    ws = tl.arange(0, WP)
    sums = tl.zeros([S, 2 * BN if PAIRED else BN, WP], dtype=tl.float32)
    squares = tl.zeros([S, BS, WP], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        here = part * BK + cols
        inside = (ws < W)[None, None, :] & (here < K)[:, :, None]
        x = tl.load(x_ptr + ws[None, None, :] * K + here[:, :, None], mask=inside, other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm_ptr + here, mask=here < K, other=0.0).to(tl.float32)
            x = (wide * gain[:, :, None]).to(x.dtype)
        sums = tl.dot(tiles[part], x, sums, input_precision="ieee")
    total = tl.sum(tl.sum(squares, axis=0), axis=0)
    sum_low = tl.sum(sums, axis=0)
    sum_high = sum_low
    if PAIRED:
        pairs = tl.reshape(sum_low, [BN, 2, WP])
        sum_low, sum_high = tl.split(tl.permute(pairs, (0, 2, 1)))
    return sum_low, sum_high, total


@triton.jit
def products(
    x_ptr,
    norm_ptr,
    w_ptr,
    low,
    high,
    ok,
    W: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    NORM: tl.constexpr,
    PAIRED: tl.constexpr,
    DOT: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums [BN, WP] of weight rows ``low`` and ``high`` with x [W, K], and squares [WP] of x.

    ``norm_ptr`` [K]: weight of a root-mean-square norm whose factor the caller applies.
    """
    if SLICES > 0:
        a, b, squares = _sliced_products(
            x_ptr, norm_ptr, w_ptr, low, high, ok, W, K, BN, BK, WP, SLICES, NORM, PAIRED, PDL
        )
    elif DOT:
        a, b, squares = _dot_products(
            x_ptr, norm_ptr, w_ptr, low, high, ok, W, K, BN, BK, WP, NORM, PAIRED, PDL
        )
    elif K <= 4 * BK or K <= 1024:
        a, b, squares = _short_products(
            x_ptr, norm_ptr, w_ptr, low, high, ok, K, BN, BK, NORM, PAIRED, PDL
        )
    else:
        a, b, squares = _row_products(
            x_ptr, norm_ptr, w_ptr, low, high, ok, K, BN, BK, NORM, PAIRED, PDL
        )
    return a, b, squares


@triton.jit
def linear_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    stamp_ptr,
    board_ptr,
    table_ptr,
    W: tl.constexpr,
    eps,
    O,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAMP: tl.constexpr,
    STAMPS: tl.constexpr,
    DOT: tl.constexpr,
    SLICES: tl.constexpr,
    GROUPED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [W, O] = residual + f(norm(x) [W, K] @ weight.T + bias).

    ``GATED``: the weight has 2 * O rows, gate first, and f(gate, up) = silu(gate) * up.
    ``STAMP``: the first program notes when it was done, in the tick's row of ``stamp_ptr``.
    ``GROUPED``: axis 2 of the grid is a member of a group of equal products, whose tensors lie at
    the offsets that ``table_ptr`` [members, 7] gives from those of the first.
    """
    column = 0
    if GROUPED:
        x_ptr = shifted(x_ptr, table_ptr, 7, 0)
        norm_ptr = shifted(norm_ptr, table_ptr, 7, 1)
        w_ptr = shifted(w_ptr, table_ptr, 7, 2)
        bias_ptr = shifted(bias_ptr, table_ptr, 7, 3)
        residual_ptr = shifted(residual_ptr, table_ptr, 7, 4)
        out_ptr = shifted(out_ptr, table_ptr, 7, 5)
        column = tl.load(table_ptr + tl.program_id(2) * 7 + 6)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = rows < O
    low, high, squares = products(
        x_ptr, norm_ptr, w_ptr, rows, rows + O, ok, W, K, BN, BK, WP, NORM, GATED, DOT, SLICES, PDL
    )
    ws = tl.arange(0, WP)
    if NORM:
        factor = tl.rsqrt(squares / K + eps)[None, :]
        low = low * factor
        high = high * factor
    if BIAS:
        low += tl.load(bias_ptr + rows, mask=ok, other=0.0).to(tl.float32)[:, None]
        if GATED:
            high += tl.load(bias_ptr + O + rows, mask=ok, other=0.0).to(tl.float32)[:, None]
    if GATED:
        low = low * tl.sigmoid(low) * high
    at = ws[None, :] * O + rows[:, None]
    inside = ok[:, None] & (ws < W)[None, :]
    if RESIDUAL:
        low += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, low.to(out_ptr.dtype.element_ty), mask=inside)
    if STAMP:
        if (tl.program_id(0) == 0) & (column >= 0):
            store_time(stamp_ptr + column, board_ptr, STAMPS)


@triton.jit
def qkv_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    place_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    W: tl.constexpr,
    eps,
    head_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WP: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    DOT: tl.constexpr,
    SLICES: tl.constexpr,
    GROUPED: tl.constexpr,
    SKIPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries [W, N, D] to ``q_ptr``, keys and values [M, slots, D] into their cache slots.

    A program owns BN pairs (j, j + D/2) of rotary dimensions, over all heads in a row; with norms
    of single heads (``HEAD_NORM``) BN is D/2, one head a program. ``place_ptr`` [W, 2]: position
    and slot of each row. ``head_stride``: slots of a cache times D. N is 0 for keys of a tap.
    ``GROUPED``: as in ``linear_kernel``; ``table_ptr`` [members, 12] also holds the
    stride and, with ``SKIPS``, the first pair that the member makes.
    """
    if GROUPED:
        x_ptr = shifted(x_ptr, table_ptr, 12, 0)
        norm_ptr = shifted(norm_ptr, table_ptr, 12, 1)
        w_ptr = shifted(w_ptr, table_ptr, 12, 2)
        bias_ptr = shifted(bias_ptr, table_ptr, 12, 3)
        q_norm_ptr = shifted(q_norm_ptr, table_ptr, 12, 4)
        k_norm_ptr = shifted(k_norm_ptr, table_ptr, 12, 5)
        place_ptr = shifted_plainly(place_ptr, table_ptr, 12, 6)
        q_ptr = shifted(q_ptr, table_ptr, 12, 7)
        keys_ptr = shifted(keys_ptr, table_ptr, 12, 8)
        values_ptr = shifted(values_ptr, table_ptr, 12, 9)
        head_stride = tl.load(table_ptr + tl.program_id(2) * 12 + 10)
    half: tl.constexpr = D // 2
    pair = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = pair < (N + 2 * M) * half
    if SKIPS:
        least = tl.load(table_ptr + tl.program_id(2) * 12 + 11)
        if tl.program_id(0) * BN + BN <= least:
            return
        ok = ok & (pair >= least)
    head = pair // half
    j = pair % half
    low_rows = head * D + j
    low, high, squares = products(
        x_ptr,
        norm_ptr,
        w_ptr,
        low_rows,
        low_rows + half,
        ok,
        W,
        K,
        BN,
        BK,
        WP,
        NORM,
        True,
        DOT,
        SLICES,
        PDL,
    )
    if NORM:
        factor = tl.rsqrt(squares / K + eps)[None, :]
        low = low * factor
        high = high * factor
    if BIAS:
        low += tl.load(bias_ptr + low_rows, mask=ok, other=0.0).to(tl.float32)[:, None]
        high += tl.load(bias_ptr + low_rows + half, mask=ok, other=0.0).to(tl.float32)[:, None]
    ws = tl.arange(0, WP)
    position = tl.load(place_ptr + ws * 2, mask=ws < W, other=0)
    slot = tl.load(place_ptr + ws * 2 + 1, mask=ws < W, other=0)
    turned = (head < N + M)[:, None]
    if HEAD_NORM:
        mean = (tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / D
        level = tl.rsqrt(mean + eps)[None, :]
        is_query = (head < N)[:, None]
        gain_low = tl.where(
            is_query, tl.load(q_norm_ptr + j)[:, None], tl.load(k_norm_ptr + j)[:, None]
        ).to(tl.float32)
        gain_high = tl.where(
            is_query,
            tl.load(q_norm_ptr + half + j)[:, None],
            tl.load(k_norm_ptr + half + j)[:, None],
        ).to(tl.float32)
        low = tl.where(turned, low * level * gain_low, low)
        high = tl.where(turned, high * level * gain_high, high)
    table = position[None, :] * D + j[:, None]
    cos = tl.load(cos_ptr + table).to(tl.float32)
    sin_low = tl.load(sin_ptr + table).to(tl.float32)
    sin_high = tl.load(sin_ptr + table + half).to(tl.float32)
    first = tl.where(turned, low * cos + high * sin_low, low)
    second = tl.where(turned, high * cos + low * sin_high, high)
    inside = ok[:, None] & (ws < W)[None, :]
    if N > 0:
        at = ws[None, :] * (N * D) + low_rows[:, None]
        queries = inside & (head < N)[:, None]
        tl.store(q_ptr + at, first.to(q_ptr.dtype.element_ty), mask=queries)
        tl.store(q_ptr + at + half, second.to(q_ptr.dtype.element_ty), mask=queries)
    kind = keys_ptr.dtype.element_ty
    at = (head - N)[:, None] * head_stride + slot[None, :] * D + j[:, None]
    mask = inside & ((head >= N) & (head < N + M))[:, None]
    tl.store(keys_ptr + at, first.to(kind), mask=mask)
    tl.store(keys_ptr + at + half, second.to(kind), mask=mask)
    at -= M * head_stride
    mask = inside & (head >= N + M)[:, None]
    tl.store(values_ptr + at, first.to(kind), mask=mask)
    tl.store(values_ptr + at + half, second.to(kind), mask=mask)
