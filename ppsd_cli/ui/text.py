"""Token ids to text that is safe to show, token by token."""

import re
from collections.abc import Callable

_REPLACEMENT = "\ufffd"
_TRIM_AT = 24
"""Tokens in the window before the oldest are dropped from it."""
_KEEP = range(6, 15)
"""Tokens kept when trimming; the first that gives the same text is taken."""
_PATIENCE = 64
"""Tokens after which text that ends in replacement characters is taken to be what it is."""
_PARTIAL = 3
"""A character of UTF-8 lacks its last byte after at most this many."""

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def escape_controls(text: str) -> str:
    r"""Return ``text`` with what could act on a terminal as visible escapes such as ``\x1b``.

    That is C0 but newline and tab, DEL, C1, line separators, bidirectional overrides and lone
    surrogates.
    """
    return _UNSAFE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Detokenizer:
    """Incremental decode over a bounded window of the last tokens.

    The window begins with tokens whose text is already out, because many tokenizers treat the
    first token specially (they strip its space). Text that ends in replacement characters may be
    an unfinished character and waits.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._out = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        ready = len(text.rstrip(_REPLACEMENT))
        overdue = len(self._window) > _PATIENCE
        if overdue:
            ready = max(ready, len(text) - _PARTIAL)
        new = text[self._out : ready]
        self._out = max(self._out, ready)
        if overdue or (ready == len(text) and len(self._window) > _TRIM_AT):
            self._trim(text)
        return new

    def finish(self) -> str:
        text = self._decode(self._window)
        new = text[self._out :]
        self._window, self._out = [], 0
        return new

    def _trim(self, text: str) -> None:
        """Shorten the window to a few tokens that decode to the end of the same text."""
        for keep in _KEEP:
            tail = self._decode(self._window[-keep:])
            gone = len(text) - len(tail)
            if text.endswith(tail) and gone <= self._out:
                self._window = self._window[-keep:]
                self._out -= gone
                return


class TextStream:
    """Text of an answer as its tokens arrive; ends before the first stop string.

    ``tokenizer_decode`` maps token ids to text and must not clean up spaces afterwards. Unfinished
    characters and anything that may be the beginning of a stop string are held back, so that text
    once given is never taken back. The work per token does not grow with the answer.
    """

    def __init__(
        self, tokenizer_decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()
    ) -> None:
        self._detokenizer = _Detokenizer(tokenizer_decode)
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; from then on there is no more text."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain, often empty."""
        return "" if self._stopped else self._release(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return what was held back; an unfinished character is a replacement character."""
        if self._stopped:
            return ""
        text = self._release(self._detokenizer.finish()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            # The first to be complete counts, so that it does not matter how text is cut in tokens.
            self._stopped, self._held = True, ""
            return text[: min(ends)[1]]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
