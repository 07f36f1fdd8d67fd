"""The channel between the driver and one stage process: tagged byte messages, no pickling.

Loaded before torch, so that a stage process is watched from its first moment.
"""

import socket
import struct
import threading
from collections.abc import Iterator

BEAT, SETUP, READY, FAILED, PLAN, RESULT = range(6)
_HEAD = struct.Struct("<BI")
_READ_BYTES = 1 << 16


class Channel:
    """One end of a socket pair. Sending is safe from several threads, receiving is not."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._unread = bytearray()
        self.ended = False

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, tag: int, *parts: bytes) -> None:
        """Send one message. BrokenPipeError or ConnectionResetError when the other end is gone."""
        head = _HEAD.pack(tag, sum(map(len, parts)))
        with self._lock:
            self._socket.sendall(b"".join((head, *parts)))

    def beat(self) -> None:
        """Send a sign of life, or nothing where the other end has plenty of them unread."""
        with self._lock:
            try:
                self._socket.send(_HEAD.pack(BEAT, 0), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return

    def receive(self) -> tuple[int, bytes] | None:
        """The next message, waiting for it; None when the other end is gone."""
        while True:
            message = self._complete()
            if message is not None:
                return message
            self.take_in()
            if self.ended:
                return None

    def take_in(self) -> int:
        """Read once, blocking if nothing is there; the number of bytes (0: the end)."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except ConnectionResetError:
            data = b""
        self._unread += data
        self.ended = not data
        return len(data)

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """What has been read completely, without waiting."""
        while (message := self._complete()) is not None:
            yield message

    def close(self) -> None:
        """Close this end; the other one sees it."""
        self._socket.close()

    def _complete(self) -> tuple[int, bytes] | None:
        if len(self._unread) < _HEAD.size:
            return None
        tag, size = _HEAD.unpack_from(self._unread)
        end = _HEAD.size + size
        if len(self._unread) < end:
            return None
        body = bytes(self._unread[_HEAD.size : end])
        del self._unread[:end]
        return tag, body
