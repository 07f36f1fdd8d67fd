"""Faults for test_cuda_faults.py: a text of a kernel's source and what stands there instead.

Each with the module of ``ppsd_cli.runtime.cuda`` and the check that must notice.
"""

FAULTS: dict[str, tuple[str, str, str, str]] = {
    # the rule
    "every answer of the model counts, void or not": (
        "control",
        "live = (arrived > 0) & (tl.load(node + 1) == epoch)",
        "live = arrived > 0",
        "chain",
    ),
    "a flush does not raise the epoch": (
        "control",
        "epoch += flush.to(tl.int64)",
        "epoch += 0",
        "chain",
    ),
    "a wrong guess is accepted": (
        "control",
        "accepted = live & fed & (tl.load(heir + 3) == target)",
        "accepted = live & fed",
        "chain",
    ),
    "a right guess is thrown away": (
        "control",
        "accepted = live & fed & (tl.load(heir + 3) == target)",
        "accepted = live & fed & (tl.load(heir + 3) == target + 1)",
        "chain",
    ),
    "what leaves the last stage is looked up a tick late": (
        "control",
        "node = ledger_ptr + ((tick + 64 - STAGES) % 64) * 5",
        "node = ledger_ptr + ((tick + 64 - STAGES - 1) % 64) * 5",
        "chain",
    ),
    "the successor is looked up a tick late": (
        "control",
        "heir = ledger_ptr + ((tick + 64 - STAGES + 1) % 64) * 5",
        "heir = ledger_ptr + ((tick + 64 - STAGES + 2) % 64) * 5",
        "chain",
    ),
    "a bubble counts as a successor": (
        "control",
        "fed = (tl.load(heir) > 0) & (tl.load(heir + 1) == epoch)",
        "fed = tl.load(heir + 1) == epoch",
        "naive",
    ),
    # what enters
    "the correction is dropped": (
        "control",
        "due = flush | (tl.load(board_ptr + 2) > 0)",
        "due = tl.load(board_ptr + 2) > 0",
        "chain",
    ),
    "the correction comes one position late": (
        "control",
        "tl.where(flush, tl.load(node + 2) + 1,",
        "tl.where(flush, tl.load(node + 2) + 2,",
        "chain",
    ),
    "the correction is fed again and again": (
        "control",
        "tl.store(board_ptr + 2, tl.where(enters, 0, due.to(tl.int64)))",
        "tl.store(board_ptr + 2, due.to(tl.int64))",
        "chain",
    ),
    "forced guesses are off by one": (
        "control",
        "index = guessed_at - tl.load(board_ptr + 9)",
        "index = guessed_at - tl.load(board_ptr + 9) + 1",
        "chain",
    ),
    "one token is fed too many": (
        "control",
        "enters & (position < tl.load(board_ptr + 7))",
        "enters & (position <= tl.load(board_ptr + 7))",
        "chain",
    ),
    "serials stand still": (
        "control",
        "tl.store(board_ptr + 5, serial + enters.to(tl.int64))",
        "tl.store(board_ptr + 5, serial)",
        "chain",
    ),
    # where rows belong
    "bubbles write to a slot that is seen": (
        "control",
        "tl.store(place_ptr + s * 2 + 1, tl.where(there, position, trash))",
        "tl.store(place_ptr + s * 2 + 1, tl.where(there, position, 0))",
        "chain",
    ),
    "a stage works at the position of the stage before": (
        "control",
        "inside = ledger_ptr + ((tick + 64 - s) % 64) * 5",
        "inside = ledger_ptr + ((tick + 64 - s + 1) % 64) * 5",
        "chain",
    ),
    "a row is written beside its slot": (
        "control",
        "tl.store(place_ptr + 1, tl.where(enters, position, trash))",
        "tl.store(place_ptr + 1, tl.where(enters, position + 1, trash))",
        "chain",
    ),
    # the draft head
    "tapped states enter their ring one place off": (
        "control",
        "tl.where(at >= 0, at % RING, RING)",
        "tl.where(at >= 0, (at + 1) % RING, RING)",
        "chain",
    ),
    "every lag reads the newest state": (
        "control",
        "tl.where(tl.load(newest) > 0, tl.load(newest + 2), 0) - where",
        "tl.where(tl.load(newest) > 0, tl.load(newest + 2), 0)",
        "chain",
    ),
    "what left a stage counts as the state at any lag": (
        "control",
        "tl.where((wanted >= 0) & (wanted == at), state, kept)",
        "tl.where(wanted >= 0, state, kept)",
        "chain",
    ),
    "the first block reads states without their norm": (
        "control",
        "tl.store(own_ptr + row * H + h, level, mask=h < H)",
        "tl.store(own_ptr + row * H + h, state, mask=h < H)",
        "chain",
    ),
    "a token is drawn with the noise of the next position": (
        "control",
        "tl.store(left_place_ptr, tl.load(out + 2))",
        "tl.store(left_place_ptr, tl.load(out + 2) + 1)",
        "sampled",
    ),
    "keys of a tap are made with the rows of the one before": (
        "linear",
        "least = tl.load(table_ptr + tl.program_id(2) * 12 + 11)",
        "least = tl.load(table_ptr + tl.program_id(2) * 12 + 11) + BN",
        "chain",
    ),
    "the last lag is cached at the newest slot": (
        "control",
        "slot = tl.where(there & (behind >= 0), behind, trash)",
        "slot = tl.where(there & (behind >= 0), position, trash)",
        "chain",
    ),
    "the head's first tick, a bubble, writes to a slot that is seen": (
        "control",
        "slot = tl.where(there & (behind >= 0), behind, trash)",
        "slot = tl.maximum(behind, 0)",
        "chain",
    ),
    "the cache is seen up to the newest slot beside the near lags": (
        "attention",
        "hide = slot[None, :] > position[:, None] - LAG",
        "hide = slot[None, :] > position[:, None]",
        "chain",
    ),
    # several devices
    "a box has one half": ("relay", "half = tick % 2", "half = tick * 0", "several"),
    "a follower reads the half that is being filled": (
        "relay",
        "half = (tick + 1) % 2",
        "half = tick % 2",
        "several",
    ),
    "a follower's places are not handed on": (
        "relay",
        "place_ptr + index - 2",
        "place_ptr + index",
        "several",
    ),
    "returned states go to the ring of another tap": (
        "relay",
        "source = tl.load(move)",
        "source = tl.load(move) * 0",
        "several",
    ),
    # attention and choice
    "a row does not see itself": (
        "attention",
        "end = tl.maximum(last + 1 - LAG, 0)",
        "end = tl.maximum(last - LAG, 0)",
        "chain",
    ),
    "the window is one slot too wide": (
        "attention",
        "slot[None, :] <= position[:, None] - WINDOW",
        "slot[None, :] < position[:, None] - WINDOW",
        "window",
    ),
    "partial results of attention are joined without their scale": (
        "attention",
        "out += share[:, None] * piece",
        "out += piece",
        "long",
    ),
    "the counter of finished splits is not reset": (
        "attention",
        "tl.store(count_ptr + tl.program_id(0), 0)",
        "tl.store(count_ptr + tl.program_id(0), 2)",
        "long",
    ),
    "noise of the position before": (
        "choice",
        ".to(tl.int64) + 1",
        ".to(tl.int64)",
        "sampled",
    ),
    # trees
    "any child of the root is taken for the right one": (
        "tree_settle",
        "heir = lives & (behind == 0) & ((parent & 15) == root) & (token == target)",
        "heir = lives & (behind == 0)",
        "tree",
    ),
    "what is not below the new root stays live": (
        "tree_settle",
        "stays = tl.where(behind == 0, heir, (above >> (parent & 15)) & 1 > 0)",
        "stays = tl.where(behind == 0, heir, lives)",
        "tree",
    ),
    "slots of dead nodes are lost": (
        "tree_settle",
        "slots < 4611686018427387904",
        "slots < 0",
        "tree",
    ),
    "free slots are not in order": (
        "tree_settle",
        "before = other[None, :] < slots[:, None]",
        "before = other[None, :] > slots[:, None]",
        "tree",
    ),
    "guesses stand on the level of the last tick only": (
        "tree_settle",
        "leaves = tl.where(alive != 0, at, leaves)",
        "leaves = leaves",
        "tree",
    ),
    "a branch sees its siblings": (
        "attention",
        "seen = (owner <= horizon)[None, :]",
        "seen = (owner < 2147483647)[None, :]",
        "tree",
    ),
    "a node does not see its path": (
        "attention",
        "seen = seen | (owner[None, :] == node[:, None])",
        "seen = seen | ((owner[None, :] == node[:, None]) & (j == 0))",
        "tree",
    ),
    "the head sees its near ancestors twice": (
        "attention",
        "seen = seen & (slot[None, :] != near[:, None])",
        "seen = seen & (slot[None, :] != near[:, None] + 10000)",
        "tree",
    ),
    "the head reads states of another path": (
        "tree_drafts",
        "slot = tl.load(kin_ptr + row * (LAGS + 1) + lag)",
        "slot = tl.load(kin_ptr + 0 * row * (LAGS + 1) + lag)",
        "tree",
    ),
    "scores of paths do not add up": (
        "tree_best",
        "score = tl.load(score_ptr + leaf, mask=ok, other=0.0) + share",
        "score = share",
        "tree",
    ),
    "shares are not of the whole vocabulary": (
        "tree_choice",
        "share = scores * tl.load(scale_ptr) - (top + tl.log(tl.sum(weight, axis=0)))",
        "share = scores * tl.load(scale_ptr)",
        "tree",
    ),
    "the best guess is taken again and again": (
        "tree_choice",
        "keys = tl.where(keys == best, -9223372036854775807, keys)",
        "keys = tl.where(keys == best + 1, -9223372036854775807, keys)",
        "tree",
    ),
    # two depths a tick
    "the rule applies once a tick": ("tree_settle", "if second < WP:", "if second > WP:", "depth"),
    "siblings of the second token keep their slots": (
        "tree_settle",
        "dies = lives & (i != root) & (i != second)",
        "dies = lives & (i != root) & (i > second)",
        "depth",
    ),
    "a guess outlives the one before it in its level": (
        "tree_settle",
        "stays = tl.where(behind == j, (first >> (parent & 15)) & 1 > 0, stays)",
        "stays = tl.where(behind == j, lives, stays)",
        "depth",
    ),
    "the second depth stands on the leaf": (
        "tree_entry",
        "inner = enters & (stands >= 0)",
        "inner = enters & (stands >= W)",
        "depth",
    ),
    "a path lacks the guess of its own level": (
        "tree_entry",
        "older = tl.where(inner, parent_number.to(tl.int32), older)",
        "older = tl.where(inner, 0, older)",
        "depth",
    ),
    "ancestors lack the guess of their own level": (
        "tree_entry",
        "behind = tl.where(inner, _of_row(slot, stands, i), behind)",
        "behind = tl.where(inner, slot, behind)",
        "depth",
    ),
    "behind a due token stands another state": (
        "tree_drafts",
        "tip = tl.load(kin_ptr + tl.load(tree_ptr + 1) * (LAGS + 1))",
        "tip = tl.load(kin_ptr)",
        "depth",
    ),
    "nodes with children are leaves": (
        "tree_best",
        "ok = lives & (children == 0)",
        "ok = lives",
        "depth",
    ),
    "the second depth has the position of the first": (
        "tree_entry",
        "position = tl.where(due, due_position, position) + (stands >= 0).to(tl.int64)",
        "position = tl.where(due, due_position, position)",
        "depth",
    ),
    "the second depth's own share alone counts": (
        "tree_best",
        'tl.where(due, float("inf"), base), base + share)',
        'tl.where(due, float("inf"), base), share)',
        "depth",
    ),
}
