"""A tree pipeline without tensors: each stage has its own cache by slot, as real stages do."""

from collections import deque
from collections.abc import Callable

from fake_pipeline import FakeRunner, hash_model

from ppsd_cli.core.plan import Bubble, Node, Plan, Prompt, Target
from ppsd_cli.core.tree import CONTINUED, Child, Tree, best_children, best_of_two_depths

SHARES = tuple(-0.5 * (rank + 1) for rank in range(16))


class FakeTree(FakeRunner):
    """Answers plans up to ``lookahead`` late.

    ``rank(index)`` says where the model's token for that index of the answer stands among the
    guesses behind a node, on whatever text; beyond the width it is not among them. A stage reads a
    node's text through the slots that the node may see, out of its own cache, which is overwritten
    and never cleared.
    """

    def __init__(
        self,
        stages: int,
        *,
        lookahead: int = 0,
        rank: Callable[[int], int],
        shares: tuple[float, ...] = SHARES,
    ) -> None:
        super().__init__(stages, lookahead=lookahead)
        self.rank, self.tree, self.shares = rank, Tree(), shares
        self._flight: deque[tuple[int, list[Node], list[tuple[int, ...]]]] = deque()
        self._views: dict[int, tuple[int, ...]] = {}
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def _boundary(self) -> tuple[Target, ...]:
        """The last stage works at the end of its tick: on its own cache, in the order of entry."""
        targets = []
        while self._flight and self._flight[0][0] <= self._tick - self.stages:
            _, nodes, tokens = self._flight.popleft()
            for node, written in zip(nodes, tokens, strict=True):
                self._last |= dict(enumerate(written, node.slot or 0))
            for node in nodes:
                target = None
                if node.final:
                    target = hash_model(tuple(self._last[s] for s in self._views[node.serial]))
                    self.tree.verify(node.serial, target)
                targets.append(Target(node.serial, target, ()))
        return tuple(targets)

    def _enter(self, plan: Plan) -> tuple[Node, ...]:
        if isinstance(plan, Bubble):
            return ()
        if isinstance(plan, Prompt):
            if plan.request is not None:
                self._request = plan.request
                self.tree.clear()
            chunk = Node(0, plan.start, None, len(plan.token_ids), False, plan.last)
            return self._feed([chunk], [plan.token_ids])
        level = self._level()
        return self._feed(level, [(node.token_id or 0,) for node in level])

    def _level(self) -> list[Node]:
        assert self._request is not None
        position, due = self.tree.next_position(), self.tree.due
        if position >= self._request.feed_limit:
            return []
        if due is not None:
            tip = self.tree.tip
            assert tip is not None
            root = Child(tip, due[1], 0.0)
            behind = self._behind([root])[: self._request.width - 1]
            return self._nodes([root, *behind])
        leaves = [x for x in self.tree.leaves if x.position + 1 < self._request.feed_limit]
        offered = [self._guesses(self._text(leaf), leaf.position + 1) for leaf in leaves]
        first = best_children(leaves, offered, self._request.width)
        second = self._behind(first[:CONTINUED])
        return self._nodes(best_of_two_depths(first, second, self._request.width))

    def _behind(self, parents: list[Child]) -> list[Child]:
        """Guesses of the second depth, best first."""
        assert self._request is not None
        if self._request.depth == 1:
            return []
        found = []
        for parent in parents:
            assert isinstance(parent.parent, Node)
            if parent.position + 1 < self._request.feed_limit:
                text = (*self._text(parent.parent), parent.token_id)
                for token, share in self._guesses(text, parent.position + 1):
                    found.append(Child(parent, token, parent.score + share))
        return sorted(found, key=lambda child: -child.score)

    def _nodes(self, children: list[Child]) -> list[Node]:
        serials = {id(child): self._serial + index for index, child in enumerate(children)}
        nodes = []
        for child in children:
            above = child.parent
            serial = serials[id(above)] if isinstance(above, Child) else above.serial
            drafted = above is not self.tree.tip
            nodes.append(
                Node(
                    0,
                    child.position,
                    child.token_id,
                    1,
                    drafted,
                    True,
                    parent=serial if drafted else None,
                    score=child.score,
                )  # fmt: skip
            )
        return nodes

    def _text(self, node: Node) -> tuple[int, ...]:
        return tuple(self._first[slot] for slot in self._views[node.serial])

    def _guesses(self, text: tuple[int, ...], position: int) -> list[tuple[int, float]]:
        assert self._request is not None
        right, rank = hash_model(text), self.rank(position - self._request.prompt_tokens)
        tokens = [right + 1 + step for step in range(16)]
        tokens = [*tokens[:rank], right, *tokens[rank:]][: self._request.width]
        return list(zip(tokens, self.shares, strict=False))

    def _feed(self, nodes: list[Node], tokens: list[tuple[int, ...]]) -> tuple[Node, ...]:
        numbered = []
        for node, slot in zip(nodes, self.tree.slots.lowest(len(nodes)), strict=True):
            parent = node.parent
            if parent is None and self.tree.tip is not None:
                parent = self.tree.tip.serial
            above = () if node.position == 0 else self._views[self._chunk_or(parent)]
            made = Node(
                self._serial, node.position, node.token_id, node.tokens, node.drafted, node.final,
                node.parent, slot, node.score,
            )  # fmt: skip
            self._views[made.serial] = (*above, *range(slot, slot + node.tokens))
            self._serial += 1
            numbered.append(made)
        for made, written in zip(numbered, tokens, strict=True):
            self._first |= dict(enumerate(written, made.slot or 0))
        if numbered:
            self.tree.enter_level(numbered)
            self._flight.append((self._tick, numbered, tokens))
        self.fed += numbered
        return tuple(numbered)

    def _chunk_or(self, parent: int | None) -> int:
        """The parent, or for a later prompt chunk the one before."""
        return self._serial - 1 if parent is None else parent
