"""The writer: decode rows leave the scheduler's thread in one append, and reach disk from another.

``add_steps`` only appends the caller's object to a ring. A daemon thread drains the ring in small pieces (so that it
never holds the GIL for long), collects them into the open file's rows, writes a whole Parquet file every few seconds or
rows, and merges the small ones now and then. Under pressure the oldest step rows go and are counted. Nothing raises into the caller after start.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pyarrow as pa

from sglang_margingate.trace.compact import ClosedFiles
from sglang_margingate.trace.errors import TraceError
from sglang_margingate.trace.files import name_of, own_folder, shared_folder
from sglang_margingate.trace.manifest import HEARTBEAT_SECONDS, Manifest, utc_now, write_manifest
from sglang_margingate.trace.retention import Keep, limit_folder
from sglang_margingate.trace.ring import StepRing
from sglang_margingate.trace.schema import REQUEST_SCHEMA, SCHEMA_VERSION
from sglang_margingate.trace.tables import StepChunk, rows_table, steps_batch, write_whole

log = logging.getLogger(__name__)

LIMIT_SECONDS = 3600.0
"""How often the traces folder is held to its limits."""

PIECE_ROWS = 512
"""Rows converted at once: the scheduler never waits longer than this, under 1 ms, for the GIL."""

_POLL_SECONDS = 0.5  # seldom: each awakening finds cold caches and takes the GIL from the scheduler
_BAD_ROW = (ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException)


class TraceWriter:
    """Write one run below `run_dir_parent`, off the caller's thread.

    Parameters
    ----------
    run_dir_parent
        Folder of the runs; made if absent. The run gets ``<UTC time>-<model>-<policy>-<pid>`` in it (:attr:`path`).
    manifest
        First manifest fields; the writer adds schema_version, run, pid, created, heartbeat and totals.
    ring_rows
        Step rows that may wait for the writer thread; above it the oldest are dropped.
    rows_per_file, seconds_per_file
        A file is closed at that many step rows, or when its first row is that old. Once the run is closed, its files
        with fewer rows are merged.

    keep
        Limits of the folder (:mod:`sglang_margingate.trace.retention`), enforced at start and hourly; by default none.
    stamp
        ``TIME/PROCESS`` of a run that several writers share, each in a folder of its own; by default this writer's.
    part
        Which of them this is: 0 writes the run's own folder, others ``scheduler-N`` in it.

    Raises
    ------
    TraceError
        The folder cannot be made or written. The only error that a caller ever sees.
    """

    def __init__(
        self,
        run_dir_parent: str | os.PathLike[str],
        manifest: Manifest | Mapping[str, Any],
        *,
        ring_rows: int = 200_000,
        rows_per_file: int = 50_000,
        seconds_per_file: float = 5.0,
        keep: Keep | None = None,
        stamp: str | None = None,
        part: int = 0,
    ) -> None:
        if ring_rows < 1 or rows_per_file < 1 or seconds_per_file <= 0:
            raise TraceError("ring_rows, rows_per_file and seconds_per_file must be positive")
        self.step_rows = 0
        """Step rows in closed files."""
        self.request_rows = 0
        """Request rows in closed files."""
        self.dropped_requests = 0
        """Request rows lost: the disk failed for long, or a row does not fit the schema."""
        self.write_errors = 0
        """Failed attempts to write."""
        self._keep = keep
        self._limited_at = -math.inf
        self._rows_per_file, self._seconds = rows_per_file, seconds_per_file
        self._lost_rows = 0  # taken off the ring, but not written
        self._lock = threading.Lock()  # guards the manifest's fields
        self._ring = StepRing(ring_rows)
        self._requests: deque[Mapping[str, Any]] = deque()
        self._open: list[pa.RecordBatch] = []  # the open steps file
        self._open_rows = 0
        self._open_since: float | None = None  # monotonic time of the open file's first row, steps or requests
        self._files = ClosedFiles()
        self._failing = False
        self._bad_row_seen = False
        self._wake = threading.Event()
        self._closing = False
        self._closed = False
        self._flush_wanted = 0
        self._flush_done = 0
        self._flushed = threading.Condition()
        self._pid = os.getpid()
        self._manifest: dict[str, Any] = dict(manifest)
        self._stamp, self._part = stamp, part
        self.path = self._create(Path(run_dir_parent))
        """The run's folder."""
        self._beat_at = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="margingate-trace", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        # A forked multiprocessing child leaves by os._exit and skips atexit, but runs its finalizers.
        self._finalizer = Finalize(None, self.close, exitpriority=10)

    # -- the caller's side: cheap, never raises ------------------------------------------------------------------

    def add_steps(self, rows: StepChunk) -> None:
        """Hand over the rows of one decode step (one lock, one append; no copy).

        Parameters
        ----------
        rows
            Tuples in ``STEP_COLUMNS`` order; or a dict of equally long columns by name (absent columns are null); or
            :class:`~sglang_margingate.columns.LateColumns`, which the writer's thread alone asks for them. Plain Python values; None
            is null; ``time`` is float seconds since the epoch. The object belongs to the writer from now on.
        """
        self._ring.append(rows)

    def add_request(self, row: Mapping[str, Any]) -> None:
        """Hand over one finished request, by column name; never dropped for lack of room in the ring."""
        self._requests.append(row)

    def update_manifest(self, **fields: Any) -> None:
        """Set manifest fields; the writer thread puts them on disk at once."""
        with self._lock:
            self._manifest.update(fields)
            self._beat_at = -1e9
        self._wake.set()

    @property
    def dropped_rows(self) -> int:
        """Step rows lost: ring overflow, failed writes, rows that do not fit the schema."""
        return self._ring.dropped + self._lost_rows

    def totals(self) -> dict[str, int]:
        """Return the counters, as in the manifest's ``totals``."""
        return {
            "step_rows": self.step_rows,
            "request_rows": self.request_rows,
            "dropped_rows": self.dropped_rows,
            "dropped_requests": self.dropped_requests,
            "write_errors": self.write_errors,
            "files": len(self._files),
        }

    def flush(self, timeout: float = 10.0) -> bool:
        """Close the open files now; return whether everything handed over before was dealt with in time."""
        with self._flushed:
            self._flush_wanted += 1
            want = self._flush_wanted
            self._wake.set()
            return self._flushed.wait_for(lambda: self._flush_done >= want or self._closed, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Write what is left and mark the run closed; safe to call twice and at exit."""
        if self._closing or os.getpid() != self._pid:  # a forked child has no writer thread and must not end the run
            return
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("margingate trace: %s: last rows not written within %.0f s; left unclosed", self.path, timeout)
        atexit.unregister(self.close)
        self._finalizer.cancel()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the writer thread ---------------------------------------------------------------------------------------

    def _create(self, parent: Path) -> Path:
        model = Path(str(self._manifest.get("model") or "model").rstrip("/")).name
        parts = (model, str(self._manifest.get("policy") or "run"))
        slug = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", p).strip("._") or "x" for p in parts)
        now, _, of = (self._stamp or time.strftime("%Y%m%d-%H%M%S", time.gmtime())).partition("/")
        stem = f"{now}-{slug[:80]}-{of or self._pid}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = shared_folder(parent / stem, self._part) if self._stamp else own_folder(parent, stem)
            self._manifest.update(schema_version=SCHEMA_VERSION, run=path.name, pid=self._pid, created=utc_now())
            self._manifest.update(heartbeat=utc_now(), totals=self.totals())
            write_manifest(path, self._manifest)
        except OSError as e:
            raise TraceError(
                f"cannot write traces in {parent}: {e.strerror or e}; "
                "choose another folder with --margingate-trace-dir, or --margingate-trace off"
            ) from None
        return path

    def _loop(self) -> None:
        # pyarrow imports pandas at its first conversion, 0.2 s that the first request would pay.
        steps_batch([{"request_id": [""]}])
        while True:
            self._wake.wait(self._pause())
            self._wake.clear()
            closing, want = self._closing, self._flush_wanted
            try:
                self._drain()
                due = self._open_since is not None and time.monotonic() - self._open_since >= self._seconds
                if closing or due or want > self._flush_done:
                    self._rotate()
                if closing:
                    self.dropped_requests += len(self._requests)  # the disk still fails: there is no next file
                    with self._lock:
                        self._manifest["closed_at"] = utc_now()
                if closing or time.monotonic() - self._beat_at >= HEARTBEAT_SECONDS:
                    self._beat()
                if not closing:
                    self._files.merge_some(self.path)
                elif self._files.merge_small(self.path, self._rows_per_file):
                    self._beat()  # fewer files than it said
                self._limit(closing)
            except Exception:  # the thread must outlive anything: it is the only one that writes
                log.exception("margingate trace: unexpected error; tracing goes on")
            with self._flushed:
                self._flush_done = max(self._flush_done, want)
                self._closed = closing
                self._flushed.notify_all()
            if closing:
                return

    def _pause(self) -> float:
        """Return the seconds until there is something to do without being woken."""
        if self._files.merging:
            return 0.0
        if self._open_since is None:
            return min(_POLL_SECONDS, self._seconds)
        return min(_POLL_SECONDS, max(0.01, self._open_since + self._seconds - time.monotonic()))

    def _drain(self) -> None:
        while True:
            chunks, rows = self._ring.take(PIECE_ROWS)
            if rows:
                try:
                    self._open.append(steps_batch(chunks))
                    self._open_rows += rows
                except _BAD_ROW as e:
                    self._bad_rows(rows, e)
            if self._open_since is None and (self._open_rows or self._requests):
                self._open_since = time.monotonic()
            if self._open_rows >= self._rows_per_file:
                self._rotate()
            if not chunks:
                return
            time.sleep(0)  # who waits for the GIL gets it now; Python would let it wait for 5 ms

    def _bad_rows(self, rows: int, e: Exception) -> None:
        """Count step rows that do not fit the schema (a bug of the caller)."""
        self._lost_rows += rows
        self._say_bad(rows, e)

    def _say_bad(self, rows: int, e: Exception) -> None:
        if not self._bad_row_seen:
            self._bad_row_seen = True
            log.error("margingate trace: %d rows do not fit the schema and are dropped: %s", rows, e)

    @staticmethod
    def _fits(row: Mapping[str, Any]) -> bool:
        try:
            rows_table([row], REQUEST_SCHEMA)
        except _BAD_ROW:
            return False
        return True

    def _rotate(self) -> None:
        """Close the open files. Steps first: who sees a request's row then finds its steps too."""
        self._open_since = None
        batches, self._open, rows, self._open_rows = self._open, [], self._open_rows, 0
        requests = [self._requests.popleft() for _ in range(len(self._requests))]
        if batches:
            # One dictionary per file: pieces were encoded apart.
            table = pa.Table.from_batches(batches).unify_dictionaries().combine_chunks()
            if self._write("steps", table, self.step_rows):
                self.step_rows += rows
            else:
                self._lost_rows += rows
        if requests:
            self._write_requests(requests)

    def _write_requests(self, rows: list[Mapping[str, Any]]) -> None:
        try:
            table = rows_table(rows, REQUEST_SCHEMA)
        except _BAD_ROW as e:
            good = [row for row in rows if self._fits(row)]
            self.dropped_requests += len(rows) - len(good)
            self._say_bad(len(rows) - len(good), e)
            if good and len(good) < len(rows):
                self._write_requests(good)
            return
        if self._write("requests", table, self.request_rows):
            self.request_rows += len(rows)
            return
        # Few and precious: they wait for the disk to come back, up to the ring's size.
        self._requests.extendleft(reversed(rows))
        while len(self._requests) > self._ring.limit:
            self._requests.popleft()
            self.dropped_requests += 1

    def _write(self, kind: str, table: pa.Table, first: int) -> bool:
        """Write a kind's file that begins with row `first`; on failure warn once and return False."""
        span = (first, first + table.num_rows - 1)
        try:
            if not self.path.is_dir():  # removed under us: begin it anew
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.mkdir(mode=0o700, exist_ok=True)
                self._files.clear()
                self._beat()
            write_whole(table, self.path / name_of(kind, *span))
        except (OSError, pa.ArrowException) as e:
            self._failed(e)
            return False
        self._files.add(kind, span)
        if self._failing:
            self._failing = False
            log.warning("margingate trace: %s can be written again; %d step rows lost", self.path, self.dropped_rows)
        return True

    def _limit(self, closing: bool) -> None:
        """Remove runs beyond the folder's limits, once an hour; on a thread of its own, as that may take seconds."""
        if closing or self._part or self._keep is None or time.monotonic() - self._limited_at < LIMIT_SECONDS:
            return
        self._limited_at = time.monotonic()
        args = (self.path.parent, self._keep, self.path)
        threading.Thread(target=limit_folder, args=args, name="margingate-trace-keep", daemon=True).start()

    def _beat(self) -> None:
        """Renew the manifest with heartbeat and totals."""
        with self._lock:
            self._beat_at = time.monotonic()
            self._manifest.update(heartbeat=utc_now(), totals=self.totals())
            manifest = dict(self._manifest)
        try:
            write_manifest(self.path, manifest)
        except OSError as e:
            # A removed folder comes back with the next rows: an idle run must not resurrect it.
            if self.path.is_dir():
                self._failed(e)

    def _failed(self, e: Exception) -> None:
        self.write_errors += 1
        if not self._failing:
            self._failing = True
            log.warning(
                "margingate trace: cannot write %s: %s; serving goes on, step rows are dropped and counted until it "
                "can be written again",
                self.path,
                getattr(e, "strerror", None) or e,
            )
