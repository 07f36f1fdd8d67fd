"""A hand-made chain of stages that yields events, for tests of what draws and counts them."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ppsd_cli.core.events import (
    Committed,
    Entered,
    Event,
    Finished,
    FinishReason,
    Flushed,
    Outcome,
    Span,
    Ticked,
    Verified,
)

TICK = 0.125
LAYERS = ((0, 10), (10, 20), (20, 30))
WORDS = ["The", " capital", " of", " France", " is", " Paris", ".", " It", " lies", " on", " the"]
WORDS += [" Seine", ",", " and", " has", " been", " a", " city", " for", " 2000", " years", ".", ""]
ANSWER = tuple(range(100, 100 + len(WORDS)))
WRONG = frozenset({3, 5, 13})


@dataclass
class Node:
    serial: int
    index: int
    """Index in the answer; -1 is the last prompt chunk, less is an earlier one."""
    entered: int
    live: bool = True
    right: bool = True


@dataclass
class Chain:
    """``answer`` ends with EOS; the guesses for the indices in ``wrong`` are wrong."""

    stages: int = 3
    answer: tuple[int, ...] = ANSWER
    wrong: frozenset[int] = WRONG
    chunks: tuple[int, ...] = (5,)
    drafting: bool = True

    def events(self) -> Iterator[Event]:
        self.flight: deque[Node] = deque()
        self.serial, self.fed, self.prompt = 0, -1, sum(self.chunks)
        last, tick = len(self.answer) - 1, 0
        while True:
            node = self.flight[0] if self.flight else None
            choice: int | None = None
            if node and node.entered + self.stages == tick:
                yield from self._verify(node, tick)
                if node.live and node.index >= -1:
                    chosen = node.index + 1
                    yield from self._commit(chosen, tick)
                    if chosen == last:
                        yield Finished(tick, FinishReason.STOP)
                        return
                    choice = chosen if self.fed < chosen else None
            yield from self._enter(tick, choice)
            begin = tick * TICK
            yield Ticked(tick, begin, begin + 0.25 * TICK, begin + 0.5 * TICK, begin + TICK)
            tick += 1

    def _verify(self, node: Node, tick: int) -> Iterator[Event]:
        self.flight.popleft()
        spans = tuple(
            Span(s, (node.entered + s) * TICK, (node.entered + s + 1) * TICK)
            for s in range(self.stages)
        )
        target = self._token(node.index + 1)
        yield Verified(tick, node.serial, target, node.live, spans)

    def _commit(self, index: int, tick: int) -> Iterator[Event]:
        token, position = self.answer[index], self.prompt + index
        guess = next((node for node in self.flight if node.live and node.index == index), None)
        if guess is None:
            yield Committed(tick, position, token, Outcome.UNDRAFTED)
        elif guess.right:
            yield Committed(tick, position, token, Outcome.ACCEPTED)
        else:
            yield Committed(tick, position, token, Outcome.CORRECTED, draft_id=7)
            for node in self.flight:
                node.live = False
            yield Flushed(tick, position, tuple(node.serial for node in self.flight))
            self.fed = index - 1

    def _enter(self, tick: int, choice: int | None) -> Iterator[Event]:
        if tick < len(self.chunks):
            index, position = tick - len(self.chunks), sum(self.chunks[:tick])
            yield Entered(tick, self._add(index, tick), position, None, self.chunks[tick], False)
        elif choice is not None:
            serial = self._add(choice, tick)
            yield Entered(tick, serial, self.prompt + choice, self.answer[choice], 1, False)
            self.fed = choice
        elif self.fed >= 0 and self.drafting:
            self.fed += 1
            serial = self._add(self.fed, tick, right=self.fed not in self.wrong)
            token = self._token(self.fed) if self.fed not in self.wrong else 7
            yield Entered(tick, serial, self.prompt + self.fed, token, 1, True)

    def _add(self, index: int, tick: int, *, right: bool = True) -> int:
        self.flight.append(Node(self.serial, index, tick, right=right))
        self.serial += 1
        return self.serial - 1

    def _token(self, index: int) -> int:
        return self.answer[index] if 0 <= index < len(self.answer) else 0


def with_text(events: Iterator[Event], words: list[str]) -> Iterator[tuple[Event, str | None]]:
    """Pair each commit with its word."""
    for event in events:
        committed = isinstance(event, Committed)
        yield event, words[event.token_id - ANSWER[0]] if committed else None
