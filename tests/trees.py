"""What a tree's answer must satisfy, for the exactness tests and the planted faults."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import torch
from models import VOCABULARY, Run, Tiny

from ppsd_cli.core.events import Outcome
from ppsd_cli.model.heads import HeadWeights
from ppsd_cli.model.layers import Shape
from ppsd_cli.model.load import Loader
from ppsd_cli.model.one_pass import Backbone, backbone_states, head_states, second_one_pass
from ppsd_cli.model.weights import Checkpoint

CPU = torch.device("cpu")


def ranks_of(count: int, width: int, *, seed: int = 0) -> tuple[int, ...]:
    """Where the right token stands among its siblings: often first, seldom nowhere."""
    random = Random(seed)
    return tuple(random.choice([0, 0, 1, 2, width - 1, width]) for _ in range(count))


def assert_equal_answers(run: Run, reference: Run, *, count: int | None = None) -> None:
    """The same ids from the same logits. In float64 no rounding reaches the float32 of logits
    by more than its last bit."""
    assert run.ids == reference.ids[:count]
    torch.testing.assert_close(run.logits, reference.logits[:count], rtol=1e-6, atol=1e-6)


def assert_costs(run: Run, stages: int, *, depth: int = 1) -> None:
    """After a flush the next token takes as many ticks as there are stages, never more else."""
    for before, after in pairwise(run.commits):
        cost = after.tick - before.tick
        assert 2 - depth <= cost <= stages
        assert before.outcome is not Outcome.CORRECTED or cost == stages


class HeadOnText:
    """A head's logits behind a whole text, from one pass over it without caches or slots."""

    def __init__(self, tiny: Tiny, weights: HeadWeights) -> None:
        loader = Loader(Checkpoint(tiny.folder), tiny.spec, torch.float32, CPU)
        self._backbone, self._weights = Backbone.load(loader), weights
        self._known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def logits(self, text: Sequence[int], *, second: bool = False) -> torch.Tensor:
        """Logits [V'] of the token behind ``text``; ``second``: its last token was a guess."""
        key = tuple(text)
        if key not in self._known:
            self._known[key] = self._compute(key)
        found = self._known[key][second]
        assert found is not None, "a head of one depth"
        return found

    @torch.inference_mode()
    def _compute(self, text: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        backbone, weights = self._backbone, self._weights
        tables = backbone.tables(len(text))
        depths = {tap.depth for tap in weights.taps}
        states = backbone_states(backbone, torch.tensor([text]), depths, tables)
        taps = [states[tap.depth] for tap in weights.taps]
        shape, level = Shape.of(backbone.spec), weights.second
        own = head_states(weights, taps, shape, tables)
        first = weights.output.logits(own.state[0, -1:])[0]
        if level is None:
            return first, None
        tokens = backbone.embed(torch.tensor([text]))
        hidden = second_one_pass(level, own, tokens, shape, tables)
        return first, replace(weights.output, norm=level.norm).logits(hidden[0, -1:])[0]


def check_path_drafts(run: Run, prompt: Sequence[int], head: HeadOnText) -> tuple[int, int]:
    """Every guess has the logits of a chain that took its path; how many did, and how many of
    them stood on a path that turned out to be wrong."""
    texts: dict[int, tuple[int, ...]] = {}
    committed = tuple(prompt) + tuple(run.ids)
    count = aside = 0
    for result in run.results:
        drafts = iter(result.draft_logits)
        together = {node.serial for node in result.entered}
        for node in result.entered:
            if node.token_id is None:
                continue
            if node.parent is None:
                before = committed[: node.position]
            else:
                before = texts[node.parent]
                expected = head.logits(before, second=node.parent in together)
                scale = 2e-3 * expected.std().item()
                torch.testing.assert_close(next(drafts), expected, rtol=1e-3, atol=scale)
                count, aside = count + 1, aside + (before != committed[: len(before)])
            texts[node.serial] = (*before, node.token_id)
    return count, aside


def right_and_ranks(run: Run, width: int, *, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Options that force the answer's own tokens into the tree at various ranks."""
    assert max(run.ids) < VOCABULARY
    return {"forced": tuple(run.ids), "ranks": ranks_of(len(run.ids), width, seed=seed)}
