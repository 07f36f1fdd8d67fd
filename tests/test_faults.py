"""Tests with teeth: planted faults, each of which a check of checks.py must catch.

The checks are those of the other test files on a small scale. Without a fault they all pass.
"""

from collections.abc import Callable
from dataclasses import replace

import checks
import pytest
import torch
from torch.nn import functional

from ppsd_cli.core import choose, plan, schedule, tree
from ppsd_cli.core.events import Outcome
from ppsd_cli.core.plan import Sampling
from ppsd_cli.core.schedule import Limits, Schedule
from ppsd_cli.core.tree import Tree
from ppsd_cli.model import cache, heads, layers, rope, stage
from ppsd_cli.model.branches import Branches
from ppsd_cli.model.cache import LayerCache, Rows
from ppsd_cli.model.heads import DraftHead
from ppsd_cli.model.stage import Output, Stage
from ppsd_cli.runtime import drafting, worker
from ppsd_cli.runtime.drafting import Drafter
from ppsd_cli.runtime.front import Front
from ppsd_cli.runtime.worker import StageWorker

Patch = pytest.MonkeyPatch
_verify, _visible, _write = Tree.verify, cache.visible, LayerCache.write
_forward, _restrict, _gumbel = Stage.forward, choose.restrict, choose.gumbel
_observe, _tapped, _prompt_plans = DraftHead.observe, DraftHead._tapped, schedule._prompt_plans
_frequencies, _choose, _rotate = rope._frequencies, choose.choose, rope.rotate
_finish = layers.finish
_run, _second_logits = DraftHead._run, DraftHead.second_logits
_head_init, _split_heads, _linear = DraftHead.__init__, layers.split_heads, layers.linear
_fed_at, _enter = Front._fed_at, Front._enter
_settle, _burst, _targets = Front._settle, Front._burst, StageWorker._targets
_keep_below, _branch_rows, _branch_enter = Tree._keep_below, Branches.rows, Branches.enter
_hidden_far, _perturbed, _best_tokens = heads._hidden_far, choose.perturbed, choose.best_tokens
_ending, _feed_limit, _attend = Schedule._ending, Limits.feed_limit, cache.attend


# The schedule and the tree


def off_by_one_commit(patch: Patch) -> None:
    def verify(self, serial, target):
        verdict = _verify(self, serial, target)
        return verdict and replace(verdict, position=verdict.position + 1)

    patch.setattr(Tree, "verify", verify)


def flush_ignored(patch: Patch) -> None:
    patch.setattr(tree, "accepts", lambda _fed, _target: True)


def right_guesses_thrown_away(patch: Patch) -> None:
    patch.setattr(tree, "accepts", lambda _fed, _target: False)


def void_nodes_stay_live(patch: Patch) -> None:
    def verify(self, serial, target):
        verdict = _verify(self, serial, target)
        if verdict is not None:
            self._live.extend(verdict.void[1:])
        return verdict

    patch.setattr(Tree, "verify", verify)


def result_matched_by_order_not_serial(patch: Patch) -> None:
    patch.setattr(
        Tree,
        "verify",
        lambda self, serial, target: _verify(
            self, self._live[0].serial if self._live else serial, target
        ),
    )


def result_matched_by_position(patch: Patch) -> None:
    """A void node's answer counts for the live node of the same position."""
    positions: dict[int, int] = {}
    enter = Tree.enter

    def remember(self, node):
        positions[node.serial] = node.position
        enter(self, node)

    def verify(self, serial, target):
        if self._live and positions.get(serial) == self._live[0].position:
            serial = self._live[0].serial
        return _verify(self, serial, target)

    patch.setattr(Tree, "enter", remember)
    patch.setattr(Tree, "verify", verify)


def leftovers_of_the_last_answer_count(patch: Patch) -> None:
    patch.setattr(Tree, "clear", lambda _self: None)


def end_of_text_ignored(patch: Patch) -> None:
    patch.setattr(Schedule, "_ending", lambda self, verdict: _without_eos(self, verdict))


def _without_eos(self, verdict):
    self._limits = replace(self._limits, eos_ids=frozenset())
    return _ending(self, verdict)


def one_token_fed_too_many(patch: Patch) -> None:
    patch.setattr(Limits, "feed_limit", lambda self, tokens: _feed_limit(self, tokens) + 1)


def one_token_fed_too_few(patch: Patch) -> None:
    patch.setattr(Limits, "feed_limit", lambda self, tokens: _feed_limit(self, tokens) - 1)


def chunk_boundary_shifted(patch: Patch) -> None:
    def shifted(prompt, size, request):
        return [replace(p, start=max(p.start - 1, 0)) for p in _prompt_plans(prompt, size, request)]

    patch.setattr(schedule, "_prompt_plans", shifted)


def other_chunks_for_drafting(patch: Patch) -> None:
    """Nearly the same numbers: only bit-equality sees that a matrix had another width."""

    def other(prompt, size, request):
        return _prompt_plans(prompt, size - 5 if request.drafting else size, request)

    patch.setattr(schedule, "_prompt_plans", other)


# Choosing tokens


def noise_reused_across_positions(patch: Patch) -> None:
    patch.setattr(choose, "gumbel", lambda s, p, ids: _gumbel(s, torch.zeros_like(p), ids))


def noise_ignores_the_seed(patch: Patch) -> None:
    patch.setattr(choose, "gumbel", lambda _seed, p, ids: _gumbel(0, p, ids))


def noise_shared_by_neighbouring_tokens(patch: Patch) -> None:
    patch.setattr(choose, "gumbel", lambda s, p, ids: _gumbel(s, p, ids // 2))


def noise_slides_with_the_position(patch: Patch) -> None:
    def sliding(seed, positions, ids):
        rows = [_gumbel(seed, torch.zeros_like(p[None]), ids + p) for p in positions]
        return torch.cat(rows)

    patch.setattr(choose, "gumbel", sliding)


def noise_is_normal(patch: Patch) -> None:
    def normal(seed, positions, ids):
        uniform = (-(-_gumbel(seed, positions, ids).double()).exp()).exp()
        return torch.special.ndtri(uniform).float()

    patch.setattr(choose, "gumbel", normal)


def noise_by_column(patch: Patch) -> None:
    def by_column(seed, positions, ids):
        return _gumbel(seed, positions, torch.arange(len(ids)))

    patch.setattr(choose, "gumbel", by_column)


def noise_of_draft_and_target_differs(patch: Patch) -> None:
    def other(logits, sampling, positions, *, token_ids=None):
        return _choose(logits, replace(sampling, seed=-7), positions, token_ids=token_ids)

    patch.setattr(drafting, "choose", other)


def target_noise_of_the_position_before(patch: Patch) -> None:
    patch.setattr(worker, "choose", lambda lo, s, p, **more: _choose(lo, s, p - 1, **more))


def _restricting(change: Callable[[Sampling], Sampling]) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        patch.setattr(choose, "restrict", lambda scores, s: _restrict(scores, change(s)))

    return plant


def temperature_after_all(patch: Patch) -> None:
    patch.setattr(choose, "restrict", lambda scores, s: _restrict(scores * s.temperature, s))


# Layers and caches


def stale_cache_row(patch: Patch) -> None:
    """What was written once stays: a void token's keys outlive it."""

    def write(self, keys, values, slots):
        fresh = (self.keys[0, slots] == 0).all(-1)
        _write(self, keys[fresh], values[fresh], slots[fresh])

    patch.setattr(LayerCache, "write", write)


def write_skipped(patch: Patch) -> None:
    """One row of every chunk is not stored."""
    patch.setattr(
        LayerCache,
        "write",
        lambda self, keys, values, slots: _write(
            self, keys[slots % 9 != 5], values[slots % 9 != 5], slots[slots % 9 != 5]
        ),
    )


def rotary_position_of_single_tokens(patch: Patch) -> None:
    chained = Rows.chain.__func__  # type: ignore[attr-defined]

    def shifted(cls, start, count, device="cpu"):
        rows = chained(cls, start, count, device)
        return replace(rows, positions=rows.positions + 1) if count == 1 else rows

    patch.setattr(Rows, "chain", classmethod(shifted))


def rotary_position_in_later_stages(patch: Patch) -> None:
    def forward(self, hidden, rows):
        if self.part.first and rows.positions.shape[0] == 1:
            rows = replace(rows, positions=rows.positions - 1)
        return _forward(self, hidden, rows)

    patch.setattr(Stage, "forward", forward)


def rotary_scaling_forgotten(patch: Patch) -> None:
    patch.setattr(rope, "_frequencies", lambda s: _frequencies(replace(s, rope_scaling=None)))


def rotary_pairs_interleaved(patch: Patch) -> None:
    def interleaved(x, cos, sin):
        half = x.shape[-1] // 2
        order = torch.arange(2 * half).view(half, 2).t().reshape(-1)
        return _rotate(x[..., order], cos, sin)

    patch.setattr(layers, "rotate", interleaved)


def mask_too_wide_in_prefill(patch: Patch) -> None:
    def wide(rows, window):
        first, mask = _visible(rows, window)
        return first, None if mask is None else torch.ones_like(mask)

    patch.setattr(stage, "visible", wide)


def mask_one_too_wide_in_prefill(patch: Patch) -> None:
    def wide(rows, window):
        first, mask = _visible(rows, window)
        return first, None if mask is None else mask | mask.roll(1, dims=-1)

    patch.setattr(stage, "visible", wide)


def mask_hides_the_row_itself(patch: Patch) -> None:
    def narrow(rows, window):
        first, mask = _visible(replace(rows, slots=rows.slots - 1), window)
        if mask is not None:
            mask[:, 0] = True
        return first, mask

    patch.setattr(stage, "visible", narrow)


def _window(change: int | None) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        def visible(rows, window):
            wrong = None if window is None or change is None else window + change
            return _visible(rows, wrong)

        patch.setattr(stage, "visible", visible)

    return plant


def length_one_too_long(patch: Patch) -> None:
    """A single token sees the slot behind its own, where void tokens may lie."""

    def attend(q, store, rows, view):
        longer = rows.length + (1 if q.shape[0] == 1 else 0)
        return _attend(q, store, replace(rows, length=longer), view)

    patch.setattr(stage, "attend", attend)


def groups_of_queries_mixed_up(patch: Patch) -> None:
    def attend(q, store, rows, view):
        w, n, d = q.shape
        m = store.keys.shape[0]
        mixed = q.view(w, n // m, m, d).transpose(1, 2).reshape(w, n, d)
        return _attend(mixed, store, rows, view)

    patch.setattr(stage, "attend", attend)


def final_norm_skipped(patch: Patch) -> None:
    patch.setattr(Output, "logits", lambda self, hidden: hidden @ self.lm_matrix)


def final_norm_without_its_weight(patch: Patch) -> None:
    def logits(self, hidden):
        return functional.rms_norm(hidden, (hidden.shape[-1],), None, self.eps) @ self.lm_matrix

    patch.setattr(Output, "logits", logits)


def bias_forgotten(patch: Patch) -> None:
    patch.setattr(layers, "linear", lambda x, weight, _bias=None: _linear(x, weight))


def key_norm_forgotten(patch: Patch) -> None:
    def without(qkv, w, shape, cos, sin):
        return _split_heads(qkv, replace(w, q_norm=None, k_norm=None), shape, cos, sin)

    patch.setattr(layers, "split_heads", without)


def gate_and_up_swapped(patch: Patch) -> None:
    def finish(x, attended, w, shape):
        swapped = replace(w, gate_up=w.gate_up.roll(w.gate_up.shape[1] // 2, dims=1))
        return _finish(x, attended, swapped, shape)

    patch.setattr(stage, "finish", finish)


# Boundaries and heads


def boundary_a_tick_early(patch: Patch) -> None:
    patch.setattr(Front, "_fed_at", lambda self, tick: _fed_at(self, tick + 1))


def correction_not_fed(patch: Patch) -> None:
    """Stage 0 goes on with its own guess although a correction is due."""

    def following(self, plan):
        due = self._tree._due
        if due is not None and self._drafter.head is not None and self._request.drafting:
            self._tree._due = (due[0], due[1] ^ 1)
        return _enter(self, plan)

    patch.setattr(Front, "_enter", following)


def ring_too_short(patch: Patch) -> None:
    def short(self, spec, weights, *, slots, ring):
        del ring
        _head_init(self, spec, weights, slots=slots, ring=3)

    patch.setattr(DraftHead, "__init__", short)


def ring_without_room_for_chunks_in_flight(patch: Patch) -> None:
    def short(self, spec, weights, *, slots, ring):
        del ring
        _head_init(self, spec, weights, slots=slots, ring=18)

    patch.setattr(DraftHead, "__init__", short)


def whatever_arrived(patch: Patch) -> None:
    """A deeper state replaces the tapped one as soon as it is there."""

    def observe(self, depth, start, states):
        for tap in self.taps:
            if tap.depth <= depth:
                _observe(self, tap.depth, start, states)

    patch.setattr(DraftHead, "observe", observe)


def first_state_kept(patch: Patch) -> None:
    """States of void tokens are not replaced by those of the right ones."""

    def observe(self, depth, start, states):
        seen = self.__dict__.setdefault("seen", set())
        slots = [start] if isinstance(start, int) else start
        rows = states.split(1) if len(slots) > 1 else [states]
        for slot, row in zip(slots, rows, strict=True):
            if (depth, slot) not in seen:
                _observe(self, depth, slot, row)
            seen.add((depth, slot))

    patch.setattr(DraftHead, "observe", observe)


def taps_one_position_off(patch: Patch) -> None:
    patch.setattr(
        DraftHead,
        "_tapped",
        lambda self, index, positions: _tapped(self, index, positions - (1 if index else 0)),
    )


def head_skips_the_prompt(patch: Patch) -> None:
    patch.setattr(DraftHead, "prefill", lambda _self, _start, _count: None)


def near_keys_from_the_exit_only(patch: Patch) -> None:
    real = heads.tap_keys

    def keys(state, index, w, deep, shape, tables):
        return real(state, max(1, index - 1), w, deep, shape, tables)

    patch.setattr(heads, "tap_keys", keys)


# Bursts


def _returning(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[Patch], None]:
    """The last stage's targets of a burst, changed."""

    def plant(patch: Patch) -> None:
        def settle(self, nodes, back):
            if len(back.token_ids) > 1:
                back = replace(back, token_ids=change(back.token_ids))
            return _settle(self, nodes, back)

        patch.setattr(Front, "_settle", settle)

    return plant


def target_positions_of_a_burst_one_late(patch: Patch) -> None:
    def later(self, hidden, position):
        return _targets(self, hidden, position + (hidden.shape[0] > 1))

    patch.setattr(StageWorker, "_targets", later)


def void_row_committed(patch: Patch) -> None:
    """Behind a wrong guess, one more row counts."""

    def verify(self, serial, target):
        verdict = _verify(self, serial, target)
        if verdict is not None and len(verdict.void) > 1:
            self._live.append(verdict.void[0])
        return verdict

    patch.setattr(Tree, "verify", verify)


def draft_position_off_by_one(patch: Patch) -> None:
    """Guesses of a burst are drafted with the noise of the position before theirs."""

    def other(logits, sampling, positions, *, token_ids=None):
        return _choose(logits, sampling, positions - 1, token_ids=token_ids)

    patch.setattr(drafting, "choose", other)


def rows_of_a_burst_see_each_other(patch: Patch) -> None:
    def wide(rows, window):
        first, mask = _visible(rows, window)
        short = mask is not None and mask.shape[0] < 8
        return first, torch.ones_like(mask) if short else mask

    patch.setattr(stage, "visible", wide)


def burst_forgets_its_last_guess(patch: Patch) -> None:
    """The row behind the last guess is taken for one that no head needs to run on."""
    guess = Drafter.guess

    def forget(self, position):
        self._next = max(self._next, position - 1)
        return guess(self, position)

    patch.setattr(Drafter, "guess", forget)


def nothing_stands_in_for_deeper_states(patch: Patch) -> None:
    patch.setattr(Front, "_stand_in", lambda _self, _row: None)


def one_guess_too_many(patch: Patch) -> None:
    patch.setattr(Front, "_burst", lambda self, length: _burst(self, length + 1))


# Trees


def siblings_stay_live(patch: Patch) -> None:
    """A right guess makes nothing void."""

    def keep(self, root):
        return () if root is not None else _keep_below(self, root)

    patch.setattr(Tree, "_keep_below", keep)


def subtree_void_with_its_siblings(patch: Patch) -> None:
    """What stands on the accepted node is thrown away."""

    def keep(self, root):
        void = _keep_below(self, root)
        while root is not None and len(self._live) > 1:
            self._live.pop()
        return void

    patch.setattr(Tree, "_keep_below", keep)


def slot_of_a_live_node_given_away(patch: Patch) -> None:
    def keep(self, root):
        void = _keep_below(self, root)
        if root is not None and void:
            self._slots.free(root.slot)
        return void

    patch.setattr(Tree, "_keep_below", keep)


def correction_stands_on_the_wrong_node(patch: Patch) -> None:
    """A correction sees what the node verified before the last one saw."""

    def verify(self, serial, target):
        tip = self._tip
        verdict = _verify(self, serial, target)
        if verdict is not None and verdict.outcome is Outcome.CORRECTED and tip is not None:
            self._tip = replace(self._tip, slot=tip.slot)
        return verdict

    patch.setattr(Tree, "verify", verify)


def branches_see_each_other(patch: Patch) -> None:
    def rows(self, slots):
        real = _branch_rows(self, slots)
        return replace(real, tree_mask=torch.ones_like(real.tree_mask))

    patch.setattr(Branches, "rows", rows)


def node_sees_its_siblings_parent(patch: Patch) -> None:
    def enter(self, slots, parents):
        return _branch_enter(self, slots, parents[:1] * len(parents))

    patch.setattr(Branches, "enter", enter)


def node_does_not_see_its_parent(patch: Patch) -> None:
    def rows(self, slots):
        real = _branch_rows(self, slots)
        mask = real.tree_mask.clone()
        for row, slot in enumerate(slots):
            if self._positions[slot] > 20:
                mask[row, self._parents[slot]] = False
        return replace(real, tree_mask=mask)

    patch.setattr(Branches, "rows", rows)


def window_counted_in_slots(patch: Patch) -> None:
    def visible(rows, window):
        if rows.slot_positions is not None:
            slots = torch.arange(len(rows.slot_positions))
            rows = replace(rows, slot_positions=slots)
        return _visible(rows, window)

    patch.setattr(stage, "visible", visible)


def window_forgotten_in_trees(patch: Patch) -> None:
    def visible(rows, window):
        return _visible(rows, None if rows.tree_mask is not None else window)

    patch.setattr(stage, "visible", visible)


def positions_count_within_a_level(patch: Patch) -> None:
    def rows(self, slots):
        real = _branch_rows(self, slots)
        return replace(real, positions=real.positions + torch.arange(len(slots)))

    patch.setattr(Branches, "rows", rows)


def states_by_position_instead_of_slot(patch: Patch) -> None:
    patch.setattr(Rows, "behind", lambda self, lag: self.positions - lag)


def ancestors_by_slot(patch: Patch) -> None:
    def ancestors(self, slots, lags):
        del self
        return torch.stack([torch.tensor(slots) - lag for lag in range(lags)], dim=1)

    patch.setattr(Branches, "ancestors", ancestors)


def near_states_seen_twice(patch: Patch) -> None:
    def hidden(rows, lags):
        return _hidden_far(rows, lags if rows.tree_mask is None else lags - 1)

    patch.setattr(heads, "_hidden_far", hidden)


def children_drafted_with_the_noise_before(patch: Patch) -> None:
    def other(logits, sampling, positions, token_ids=None):
        return _perturbed(logits, sampling, positions - 1, token_ids)

    patch.setattr(drafting, "perturbed", other)


def second_best_child_first(patch: Patch) -> None:
    def shifted(scores, count, *, scale, token_ids=None):
        return [row[1:] for row in _best_tokens(scores, count, scale=scale, token_ids=token_ids)]

    patch.setattr(drafting, "best_tokens", shifted)


def second_level_of_its_own_slot(patch: Patch) -> None:
    def run(self, rows):
        hidden = _run(self, rows)
        self._own[rows.slots] = hidden.roll(1, dims=0)
        return hidden

    patch.setattr(DraftHead, "_run", run)


def second_level_a_position_early(patch: Patch) -> None:
    def logits(self, parents, tokens):
        return _second_logits(self, replace(parents, positions=parents.positions - 1), tokens)

    patch.setattr(DraftHead, "second_logits", logits)


def second_level_deaf_to_its_token(patch: Patch) -> None:
    def logits(self, parents, tokens):
        return _second_logits(self, parents, tokens.roll(1, dims=0))

    patch.setattr(DraftHead, "second_logits", logits)


def second_level_sees_all_branches(patch: Patch) -> None:
    def logits(self, parents, tokens):
        seen = torch.ones_like(parents.tree_mask)
        return _second_logits(self, replace(parents, tree_mask=seen), tokens)

    patch.setattr(DraftHead, "second_logits", logits)


def child_misses_its_parent_of_the_level(patch: Patch) -> None:
    def enter(self, slots, parents):
        own = [parents[slots.index(p)] if p in slots else p for p in parents]
        return _branch_enter(self, slots, own)

    patch.setattr(Branches, "enter", enter)


def first_depth_offered_again(patch: Patch) -> None:
    patch.setattr(Tree, "leaves", property(lambda self: self.level))


FAULTS: list[tuple[Callable[[Patch], None], tuple[str, ...]]] = [
    (off_by_one_commit, ("schedule",)),
    (flush_ignored, ("schedule", "exact llama")),
    (right_guesses_thrown_away, ("schedule",)),
    (void_nodes_stay_live, ("schedule",)),
    (result_matched_by_order_not_serial, ("schedule", "exact llama")),
    (result_matched_by_position, ("schedule", "exact llama")),
    (leftovers_of_the_last_answer_count, ("schedule",)),
    (end_of_text_ignored, ("schedule",)),
    (one_token_fed_too_many, ("schedule", "context edge")),
    (one_token_fed_too_few, ("schedule",)),
    (chunk_boundary_shifted, ("reference llama",)),
    (other_chunks_for_drafting, ("exact llama",)),
    (noise_reused_across_positions, ("noise", "sampled")),
    (noise_ignores_the_seed, ("noise", "sampled")),
    (noise_shared_by_neighbouring_tokens, ("noise",)),
    (noise_slides_with_the_position, ("noise",)),
    (noise_is_normal, ("noise", "draws")),
    (noise_by_column, ("reduced vocabulary",)),
    (noise_of_draft_and_target_differs, ("shared noise",)),
    (target_noise_of_the_position_before, ("shared noise",)),
    (_restricting(lambda s: replace(s, top_k=0)), ("draws",)),
    (_restricting(lambda s: replace(s, top_k=s.top_k and s.top_k + 1)), ("draws",)),
    (_restricting(lambda s: replace(s, top_p=1.0)), ("draws",)),
    (_restricting(lambda s: replace(s, min_p=0.0)), ("draws",)),
    (temperature_after_all, ("draws",)),
    (stale_cache_row, ("exact llama",)),
    (write_skipped, ("reference llama",)),
    (rotary_position_of_single_tokens, ("reference llama",)),
    (rotary_position_in_later_stages, ("exact llama",)),
    (rotary_scaling_forgotten, ("reference llama",)),
    (rotary_pairs_interleaved, ("reference llama",)),
    (mask_too_wide_in_prefill, ("reference llama",)),
    (mask_one_too_wide_in_prefill, ("reference llama",)),
    (mask_hides_the_row_itself, ("reference llama",)),
    (_window(1), ("reference mistral",)),
    (_window(-1), ("reference mistral",)),
    (_window(None), ("reference mistral",)),
    (length_one_too_long, ("reference llama", "exact llama")),
    (groups_of_queries_mixed_up, ("reference llama",)),
    (final_norm_skipped, ("reference llama",)),
    (final_norm_without_its_weight, ("reference llama",)),
    (bias_forgotten, ("reference qwen2",)),
    (key_norm_forgotten, ("reference qwen3",)),
    (gate_and_up_swapped, ("reference llama",)),
    (boundary_a_tick_early, ("exact llama",)),
    (correction_not_fed, ("exact llama",)),
    (ring_too_short, ("head",)),
    (ring_without_room_for_chunks_in_flight, ("head",)),
    (whatever_arrived, ("head",)),
    (first_state_kept, ("head",)),
    (taps_one_position_off, ("head",)),
    (head_skips_the_prompt, ("head",)),
    (near_keys_from_the_exit_only, ("head",)),
    (void_nodes_stay_live, ("bursts",)),
    (flush_ignored, ("bursts", "bursts of llama")),
    (right_guesses_thrown_away, ("bursts", "bursts of llama")),
    (leftovers_of_the_last_answer_count, ("bursts",)),
    (end_of_text_ignored, ("bursts",)),
    (stale_cache_row, ("bursts of llama",)),
    (_returning(lambda ids: (*ids[1:], ids[0])), ("bursts of llama",)),
    (_returning(lambda ids: (ids[0], *ids[:-1])), ("bursts of llama",)),
    (target_positions_of_a_burst_one_late, ("bursts of echo",)),
    (void_row_committed, ("bursts", "bursts of llama")),
    (draft_position_off_by_one, ("bursts of echo",)),
    (rows_of_a_burst_see_each_other, ("bursts of llama",)),
    (one_guess_too_many, ("bursts of llama",)),
    (burst_forgets_its_last_guess, ("head in bursts",)),
    (nothing_stands_in_for_deeper_states, ("head in bursts",)),
    (flush_ignored, ("trees", "trees of llama")),
    (right_guesses_thrown_away, ("trees", "trees of llama")),
    (void_nodes_stay_live, ("trees",)),
    (result_matched_by_order_not_serial, ("trees", "trees of llama")),
    (leftovers_of_the_last_answer_count, ("trees",)),
    (end_of_text_ignored, ("trees",)),
    (siblings_stay_live, ("trees", "trees of llama")),
    (subtree_void_with_its_siblings, ("trees",)),
    (slot_of_a_live_node_given_away, ("trees", "trees of llama")),
    (correction_stands_on_the_wrong_node, ("trees of llama",)),
    (branches_see_each_other, ("trees of llama",)),
    (node_sees_its_siblings_parent, ("trees of llama",)),
    (node_does_not_see_its_parent, ("trees of llama",)),
    (stale_cache_row, ("trees of llama",)),
    (window_counted_in_slots, ("trees of mistral",)),
    (window_forgotten_in_trees, ("trees of mistral",)),
    (positions_count_within_a_level, ("trees of llama",)),
    (boundary_a_tick_early, ("trees of llama",)),
    (states_by_position_instead_of_slot, ("head in trees",)),
    (ancestors_by_slot, ("head in trees",)),
    (near_states_seen_twice, ("head in trees",)),
    (first_state_kept, ("head in trees",)),
    (whatever_arrived, ("head in trees",)),
    (children_drafted_with_the_noise_before, ("trees of echo",)),
    (second_best_child_first, ("trees of echo",)),
    (first_depth_offered_again, ("two depths",)),
    (second_level_of_its_own_slot, ("second level",)),
    (second_level_a_position_early, ("second level",)),
    (second_level_deaf_to_its_token, ("second level",)),
    (second_level_sees_all_branches, ("second level",)),
    (child_misses_its_parent_of_the_level, ("second level",)),
    (first_state_kept, ("second level",)),
    (whatever_arrived, ("second level",)),
    (flush_ignored, ("two depths",)),
    (siblings_stay_live, ("two depths",)),
]
CASES = [
    pytest.param(plant, check, id=f"{number}-{plant.__name__}-{check}")
    for number, (plant, caught_by) in enumerate(FAULTS)
    for check in caught_by
]


@pytest.fixture
def run_check(tiny, tmp_path) -> Callable[[str], None]:
    """Run a check by name; models are made before any fault is planted."""
    for kind in ("llama", "mistral", "qwen2", "qwen3", "echo"):
        tiny(kind)

    def run(name: str) -> None:
        kind, _, model = name.partition(" ")
        table: dict[str, Callable[[], None]] = {
            "schedule": checks.check_schedule,
            "noise": checks.check_noise,
            "draws": checks.check_draws,
            "reduced vocabulary": checks.check_reduced_vocabulary,
            "sampled": lambda: checks.check_sampled(tiny),
            "shared noise": lambda: checks.check_shared_noise(tiny),
            "context edge": lambda: checks.check_context_edge(tiny),
            "head": lambda: checks.check_head(tiny, tmp_path),
            "bursts": checks.check_bursts,
            "bursts of llama": lambda: checks.check_bursts_of_a_model(tiny),
            "bursts of echo": lambda: checks.check_bursts_that_are_right(tiny),
            "head in bursts": lambda: checks.check_head_in_bursts(tiny, tmp_path),
            "trees": checks.check_trees,
            "trees of llama": lambda: checks.check_trees_of_a_model(tiny, "llama"),
            "trees of mistral": lambda: checks.check_trees_of_a_model(tiny, "mistral"),
            "trees of echo": lambda: checks.check_trees_that_are_right(tiny),
            "head in trees": lambda: checks.check_head_in_trees(tiny, tmp_path),
            "two depths": checks.check_two_depths,
            "second level": lambda: checks.check_second_level(tiny, tmp_path),
        }
        if kind == "reference":
            checks.check_reference(tiny, model)
        elif kind == "exact":
            checks.check_exact(tiny, model)
        else:
            table[name]()

    return run


@pytest.mark.parametrize("check", sorted({c for _, caught_by in FAULTS for c in caught_by}))
def test_without_a_fault_the_check_passes(run_check, check):
    run_check(check)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("plant", "check"), CASES)
def test_a_planted_fault_is_caught(run_check, monkeypatch, plant, check):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_check(check)


def test_faults_are_planted_where_the_code_is(monkeypatch):
    """A patch of a name that the product does not use would prove nothing."""
    assert schedule.chunks is plan.chunks
    monkeypatch.undo()
    assert stage.visible is cache.visible
    assert stage.attend is cache.attend
    assert worker.choose is choose.choose
    assert drafting.choose is choose.choose
