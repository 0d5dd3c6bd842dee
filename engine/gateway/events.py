"""Server-sent events on their way through: whole events only, and errors in the client's shape."""

from __future__ import annotations

import re

from engine.gateway.normalise import normalised_event

_END = re.compile(rb"\r\n\r\n|\n\n")
_ERROR = b'data: {"error"'


class EventBuffer:
    """Passes whole events on and keeps the beginning of one that is still coming.

    A client therefore never sees half an event followed by an error: what it has read is always whole.
    """

    __slots__ = ("_held", "_model", "failed")

    def __init__(self, model: str) -> None:
        self._model = model
        self._held = b""
        #: Whether the runner has told of a failure in mid-stream: such an answer is not charged.
        self.failed = False

    def feed(self, chunk: bytes) -> bytes:
        """The whole events up to now (possibly none), as the bytes that came."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith((b"\n\n", b"\r\n\r\n")):
            plain, carriage = chunk.rfind(b"\n\n"), chunk.rfind(b"\r\n\r\n")
            end = max(plain + 2 if plain >= 0 else 0, carriage + 4 if carriage >= 0 else 0)
            self._held = chunk[end:]
            chunk = chunk[:end]
        if _ERROR in chunk:
            self.failed = True
            return b"".join(normalised_event(event, self._model) for event in _split(chunk))
        return chunk

    def rest(self) -> bytes:
        """What came without an event's end, when the stream has ended in order."""
        held, self._held = self._held, b""
        return held


def _split(chunk: bytes) -> list[bytes]:
    events = []
    start = 0
    for match in _END.finditer(chunk):
        events.append(chunk[start : match.end()])
        start = match.end()
    if start < len(chunk):
        events.append(chunk[start:])
    return events
