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
    """While entered, the first SIGINT or SIGTERM is noted, the second ends the process at once.

    The first raises ``Interrupted`` too, unless ``raising`` is false: then whoever works has to
    look at ``number``.
    """

    def __init__(self, *, raising: bool = True) -> None:
        self._previous: dict[int, Any] = {}
        self._raising = raising
        self.number: int | None = None

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
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        if self._raising:
            raise Interrupted(number)
