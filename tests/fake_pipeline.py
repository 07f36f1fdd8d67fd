"""A pipeline without tensors: the model is a function of the prefix, the drafts are an argument."""

from collections import deque
from collections.abc import Callable, Sequence

from ppsd_cli.core.events import Outcome, Ticked
from ppsd_cli.core.plan import Bubble, Burst, Node, Plan, Prompt, Request, Target, TickResult
from ppsd_cli.core.tree import Tree

Model = Callable[[tuple[int, ...]], int]
VOCABULARY = 11


def hash_model(prefix: tuple[int, ...]) -> int:
    """A token that depends on every token before it."""
    value = 17
    for token in prefix:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def continuation(prompt: Sequence[int], count: int, model: Model = hash_model) -> list[int]:
    """What the model alone says."""
    text = list(prompt)
    for _ in range(count):
        text.append(model(tuple(text)))
    return text[len(prompt) :]


class FakeRunner:
    """Runs plans when they are submitted and answers up to ``lookahead`` plans late.

    Subclasses say what arrives at a boundary and what enters; both fill ``_flight`` with their own.
    """

    def __init__(self, stages: int, *, lookahead: int) -> None:
        self.stages, self.lookahead = stages, lookahead
        self.results: deque[TickResult] = deque()
        self.fed: list[Node] = []
        self._tick, self._serial = 0, 0
        self._request: Request | None = None

    @property
    def pending(self) -> int:
        return len(self.results)

    def submit(self, plan: Plan) -> None:
        assert self.pending <= self.lookahead, "asked further ahead than allowed"
        assert self._tick < 100_000, "the answer does not end"
        targets = self._boundary()
        nodes = self._enter(plan)
        now = float(self._tick)
        self.results.append(TickResult(Ticked(self._tick, now, now, now, now + 1), targets, nodes))
        self._tick += 1

    def collect(self) -> TickResult:
        return self.results.popleft()

    def close(self) -> None:
        self.results.clear()

    def _boundary(self) -> tuple[Target, ...]:
        raise NotImplementedError

    def _enter(self, plan: Plan) -> tuple[Node, ...]:
        raise NotImplementedError


class FakePipeline(FakeRunner):
    """A chain. ``right(index)``: whether the guess for that token of the answer is the model's.

    What is behind a wrong guess is guessed for the wrong text, as by a real head. The cache is one
    list by position, overwritten and never cleared.
    """

    def __init__(self, stages: int, *, lookahead: int = 0, right: Callable[[int], bool]) -> None:
        super().__init__(stages, lookahead=lookahead)
        self.right, self._tree = right, Tree()
        self.verified: list[tuple[int, int]] = []
        self._flight: deque[tuple[int, Node, int | None]] = deque()
        self._cache: dict[int, int] = {}

    def _boundary(self) -> tuple[Target, ...]:
        targets = []
        while self._flight and self._flight[0][0] <= self._tick - self.stages:
            _, node, target = self._flight.popleft()
            if target is not None:
                self._judge(node, target)
            targets.append(Target(node.serial, target, ()))
        return tuple(targets)

    def _judge(self, node: Node, target: int) -> None:
        verdict = self._tree.verify(node.serial, target)
        if verdict is not None and verdict.outcome is not Outcome.UNDRAFTED:
            behind = (n for n in self.fed if n.serial > node.serial)
            fed = next((n for n in behind if n.position == verdict.position), None)
            self.verified.append((-1 if fed is None else fed.token_id or 0, target))

    def _enter(self, plan: Plan) -> tuple[Node, ...]:
        if isinstance(plan, Bubble):
            return ()
        if isinstance(plan, Prompt):
            if plan.request is not None:
                self._request = plan.request
                self._tree.clear()
            node = Node(self._serial, plan.start, None, len(plan.token_ids), False, plan.last)
            return (self._feed(node, plan.token_ids),)
        guesses = plan.draft_length if isinstance(plan, Burst) else 0
        assert not guesses or not self._flight, "a burst enters an empty pipeline"
        nodes = [self._token() for _ in range(1 + guesses)]
        return tuple(node for node in nodes if node is not None)

    def _token(self) -> Node | None:
        assert self._request is not None
        position, due = self._tree.next_position(), self._tree.due
        if position >= self._request.feed_limit:
            return None
        token = self._guess(position) if due is None else due[1]
        node = Node(self._serial, position, token, 1, drafted=due is None, final=True)
        return self._feed(node, (token,))

    def _guess(self, position: int) -> int:
        assert self._request is not None
        assert self._request.drafting, "a guess was made although drafting is off"
        token = hash_model(self._prefix(position))
        return token if self.right(position - self._request.prompt_tokens) else token + 1

    def _feed(self, node: Node, tokens: Sequence[int]) -> Node:
        self._cache |= dict(enumerate(tokens, node.position))
        target = hash_model(self._prefix(node.position + node.tokens)) if node.final else None
        self._flight.append((self._tick, node, target))
        self._tree.enter(node)
        self.fed.append(node)
        self._serial += 1
        return node

    def _prefix(self, end: int) -> tuple[int, ...]:
        return tuple(self._cache[position] for position in range(end))
