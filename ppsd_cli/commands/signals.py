"""Ctrl-C and SIGTERM: the first ends the answer in good order, the second ends the process."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(BaseException):
    """A signal asked the run to end; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What the process returns: 128 and the signal's number."""
        return 128 + self.number


class Signals:
    """While entered, SIGINT and SIGTERM raise ``Interrupted`` once, then kill at once."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._seen = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._seen:
            os._exit(128 + number)
        self._seen = True
        raise Interrupted(number)
