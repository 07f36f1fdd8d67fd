"""Which guesses of a level are the best: of one depth, and of two (``core.tree``).

Records are those of ``tree_control.py``.

``first`` [W, 2] int64: leaf (its row; -1 for a token that is due, -2 for none) and token, best
first, with path scores in ``first_score`` [W].

Shapes: W rows of a level, WP padded, R guesses with others behind them, PATH nodes of a path.
"""

import triton
import triton.language as tl

from ppsd_cli.runtime.cuda.tree_choice import index_of, key_of, largest, score_of


@triton.jit
def best_children(
    token_ptr,
    share_ptr,
    score_ptr,
    mask,
    W: tl.constexpr,
    WP: tl.constexpr,
):
    """Leaf, token and path score of the W best children over the leaves in ``mask``, best first;
    leaf -1 where there are not so many. Ties go to the earlier leaf, then to the better guess.
    """
    at = tl.arange(0, WP * WP)
    leaf = at // WP
    rank = at % WP
    ok = (leaf < W) & (rank < W) & ((mask >> leaf) & 1 > 0)
    share = tl.load(share_ptr + leaf * W + rank, mask=ok, other=float("-inf"))
    score = tl.load(score_ptr + leaf, mask=ok, other=0.0) + share
    keys = tl.where(score > float("-inf"), key_of(score, at), -9223372036854775807)
    best_keys = largest(keys, W, WP)
    real = best_keys > -9223372036854775807
    chosen = tl.where(real, index_of(best_keys), 0)
    token = tl.load(token_ptr + (chosen // WP) * W + chosen % WP, mask=real, other=0)
    return tl.where(real, chosen // WP, -1), token, tl.where(real, score_of(best_keys), 0.0)


@triton.jit
def open_leaves(
    nodes_ptr,
    lineage_ptr,
    alive,
    before,
    limit,
    W: tl.constexpr,
    WP: tl.constexpr,
    PATH: tl.constexpr,
):
    """Which live rows of level ``before``, as bits, have no child in it and room behind them."""
    i = tl.arange(0, WP)
    node = nodes_ptr + (before * W + i) * 6
    lives = (i < W) & ((alive >> i) & 1 > 0)
    number = tl.load(lineage_ptr + (before * W + i) * PATH, mask=i < W, other=0).to(tl.int64)
    parent = tl.load(node + 4, mask=lives, other=-1)
    children = tl.sum((parent[None, :] == number[:, None]).to(tl.int32), axis=1)
    position = tl.load(node + 1, mask=i < W, other=0)
    ok = lives & (children == 0) & (position + 1 < limit)
    return tl.sum(tl.where(ok, tl.full([WP], 1, tl.int64) << i, 0), axis=0)


@triton.jit
def best_of_two(
    first_ptr,
    first_score_ptr,
    token_ptr,
    share_ptr,
    place_ptr,
    due,
    limit,
    W: tl.constexpr,
    WP: tl.constexpr,
    R: tl.constexpr,
    ALL: tl.constexpr,
):
    """The W best of both depths, the first before the second, and a due token in any case.

    By row: whether there is one, leaf, the row of this level that it stands on (-1: first depth),
    row of the logits it comes from (-1 for a due token), token, path score. ``token_ptr``,
    ``share_ptr`` [R, W]: the second depth.
    """
    i = tl.arange(0, WP)
    at = tl.arange(0, ALL)
    behind = at - WP
    r = tl.maximum(behind, 0) // WP
    rank = tl.maximum(behind, 0) % WP
    is_first = (at < W) & (behind < 0)
    is_second = (behind >= 0) & (r < R) & (rank < W)
    source = tl.where(is_first, at, r)
    some = is_first | is_second
    there = tl.load(first_ptr + source * 2, mask=some, other=-2) > -2
    room = tl.load(place_ptr + r * 2, mask=is_second, other=0) + 1 < limit
    base = tl.load(first_score_ptr + source, mask=some & there, other=0.0)
    second_ok = is_second & there & room
    share = tl.load(share_ptr + r * W + rank, mask=second_ok, other=float("-inf"))
    score = tl.where(is_first, tl.where(due, float("inf"), base), base + share)
    ok = (is_first & there) | (second_ok & (share > float("-inf")))
    keys = tl.where(ok, key_of(score, at), -9223372036854775807)
    best_keys = largest(keys, W, WP)
    real = best_keys > -9223372036854775807
    chosen = tl.where(real, index_of(best_keys), 0).to(tl.int32)
    late = (real & (chosen >= WP)).to(tl.int32)
    early = (real & (chosen < WP)).to(tl.int32)
    earlier = i[None, :] < i[:, None]
    among_late = tl.sum(tl.where(earlier, late[None, :], 0), axis=1)
    among_early = tl.sum(tl.where(earlier, early[None, :], 0), axis=1)
    target = tl.where(late > 0, tl.sum(early, axis=0) + among_late, among_early)
    moved = (target[None, :] == i[:, None]) & real[None, :]
    enters = tl.sum(moved.to(tl.int32), axis=1) > 0
    chosen = tl.sum(tl.where(moved, chosen[None, :], 0), axis=1)
    second = enters & (chosen >= WP)
    r = tl.where(second, (chosen - WP) // WP, 0)
    rank = tl.where(second, (chosen - WP) % WP, 0)
    source = tl.where(second, r, chosen)
    leaf = tl.load(first_ptr + source * 2, mask=enters, other=-2)
    token = tl.load(first_ptr + source * 2 + 1, mask=enters, other=0)
    late_token = tl.load(token_ptr + r * W + rank, mask=second, other=0)
    score = tl.load(first_score_ptr + source, mask=enters, other=0.0)
    score += tl.load(share_ptr + r * W + rank, mask=second, other=0.0)
    stands = tl.where(second, r, -1)
    logits = tl.where(second, W + r, leaf.to(tl.int32))
    return enters, leaf, stands, logits, tl.where(second, late_token, token), score
