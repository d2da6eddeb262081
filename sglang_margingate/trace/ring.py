"""The bounded ring between the scheduler's thread and the writer's: appending is all that the scheduler pays."""

from __future__ import annotations

import threading
from collections import deque

from sglang_margingate.trace.tables import StepChunk, chunk_len, chunk_tail


class StepRing:
    """Chunks of step rows, oldest first, at most `limit` rows; above it the oldest rows are dropped and counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        """Rows dropped for lack of room."""
        self._chunks: deque[StepChunk] = deque()
        self._rows = 0
        # Held for an append or for taking one piece, never over a conversion or I/O: neither side waits noticeably.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def append(self, chunk: StepChunk) -> None:
        """Add the newest rows, dropping the oldest above the limit; the chunk is kept, not copied."""
        n = chunk_len(chunk)
        with self._lock:
            self._chunks.append(chunk)
            self._rows += n
            if self._rows > self.limit:
                self._drop_oldest(self._rows - self.limit)

    def take(self, rows: int) -> tuple[list[StepChunk], int]:
        """Remove and return the oldest chunks until they hold at least `rows` rows, and their row count."""
        chunks: list[StepChunk] = []
        taken = 0
        with self._lock:
            while self._chunks and taken < rows:
                chunk = self._chunks.popleft()
                chunks.append(chunk)
                taken += chunk_len(chunk)
            self._rows -= taken
        return chunks, taken

    def _drop_oldest(self, excess: int) -> None:
        self._rows -= excess
        self.dropped += excess
        while excess > 0:
            n = chunk_len(self._chunks[0])
            if n > excess:
                self._chunks[0] = chunk_tail(self._chunks[0], excess)
                return
            self._chunks.popleft()
            excess -= n
