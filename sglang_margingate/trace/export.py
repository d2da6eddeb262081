"""A run for other tools: CSV, and the Chrome trace format that chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_margingate.trace.errors import TraceError
from sglang_margingate.trace.reader import Run

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_STEP_FIELDS = ["step", "time", "token", "margin", "threshold", "reason", "flipped", "repaired", "batch_rows"]
_STEP_FIELDS += ["prefill", "step_ms", "verify_ms", "hold_ms"]


def export_csv(run: Run, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``steps.csv`` and ``requests.csv`` into `folder` (made if absent) and return their paths.

    Null and NaN are both empty fields; times are ISO 8601 with offset. Text that a spreadsheet would take for a formula
    gets an apostrophe in front (:func:`harmless`).

    Raises
    ------
    TraceError
        The folder cannot be written.
    """
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, frame in (("steps", run.steps), ("requests", run.requests)):
            harmless(frame).to_csv(out / f"{name}.csv", index=False)
    except OSError as e:
        raise TraceError(f"cannot write CSV in {out}: {e.strerror or e}; choose another folder") from None
    return [out / "steps.csv", out / "requests.csv"]


def harmless(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame for a spreadsheet: text that begins like a formula gets an apostrophe in front (OWASP's rule).

    Request ids and texts come from clients. Numbers are left alone.
    """
    import pandas as pd

    mended = {}
    for name in frame.columns:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            words = column.cat.categories
            if not any(str(word).startswith(_FORMULA) for word in words):
                continue
            column = column.astype(object)
        elif not (pd.api.types.is_object_dtype(column.dtype) or pd.api.types.is_string_dtype(column.dtype)):
            continue
        risky = column.map(lambda value: isinstance(value, str) and value.startswith(_FORMULA), na_action=None)
        if risky.any():
            mended[name] = column.astype(object).where(~risky.astype(bool), "'" + column.astype(str))
    return frame.assign(**mended)


def export_chrome_trace(run: Run, file: str | os.PathLike[str], *, request_ids: Collection[str] | None = None) -> Path:
    """Write the run as Chrome trace JSON and return its path.

    One track per request with its prefill, decode and verify slices; a request whose tokens were held back gets a
    second track below it, because holds overlap the next steps. Flips are instant marks. Times are microseconds from
    the run's first event.

    Parameters
    ----------
    run
        With at least the step columns request_id and the timing ones (``read_run`` without a selection has them).
    request_ids
        Requests to write; all by default. About 250 bytes a step: choose some of a long run.

    Raises
    ------
    TraceError
        Columns are missing or the file cannot be written.
    """
    missing = [c for c in ["request", "request_id", *_STEP_FIELDS] if c not in run.steps.columns]
    if missing:
        raise TraceError(f"the Chrome trace needs step column {missing[0]!r}; read the run without step_columns")
    out = Path(file)
    tmp = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tmp.open("w", encoding="utf-8") as f:
            f.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would build an encoder for each event
            for i, event in enumerate(chrome_events(run, request_ids)):
                f.write((",\n" if i else "") + encode(event))
            f.write("\n]}\n")
        os.replace(tmp, out)
    except OSError as e:
        raise TraceError(f"cannot write {out}: {e.strerror or e}; choose another file") from None
    return out


def chrome_events(run: Run, request_ids: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the run's trace events, request by request (see :func:`export_chrome_trace`)."""
    steps = run.steps
    if request_ids is not None:
        steps = steps[steps["request_id"].isin(list(request_ids))]
    yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": run.path.name}}
    if steps.empty:
        return
    arrival: dict[int, float] = {}
    if {"request", "time"} <= set(run.requests.columns):
        timed = run.requests[run.requests["time"].notna()]
        arrival = dict(zip(timed["request"].tolist(), _micros(timed["time"])))
    names = steps["request_id"].astype(str)
    shared = steps["request"].groupby(names).transform("nunique") > 1
    # One id may stand for several requests: then the track says which.
    steps = steps.assign(_name=names.where(~shared, names + " (request " + steps["request"].astype(str) + ")"))
    micros = _micros(steps["time"])
    # The first slice of the run begins at zero: Perfetto shows absolute microseconds badly.
    origin = float((micros - steps["step_ms"].fillna(0).to_numpy() * 1000.0).min())
    origin = min([origin, *(arrival[n] for n in steps["request"].unique().tolist() if n in arrival)])
    steps = steps.assign(_us=micros - origin).sort_values("step", kind="stable")
    for column in ("step_ms", "verify_ms", "hold_ms"):
        steps[column] = steps[column].fillna(0.0)
    tid = 0
    for number, rows in steps.groupby("request", sort=False)[[*_STEP_FIELDS, "_us", "_name"]]:
        tid += 2
        name = rows["_name"].iloc[0]
        yield {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        if rows["hold_ms"].gt(0).any():
            yield {"ph": "M", "pid": 1, "tid": tid + 1, "name": "thread_name", "args": {"name": f"{name} (held)"}}
        if number in arrival:
            yield _mark("arrived", tid, max(arrival[number] - origin, 0.0), {})
        yield from _request_events(rows, tid)


def _request_events(rows: Any, tid: int) -> Iterator[dict[str, Any]]:
    """Yield one request's events; its rows are in the order of steps."""
    end = 0.0  # slices of one track may touch but not overlap
    shown = ("step", "token", "margin", "threshold", "reason", "batch_rows")
    columns = {name: rows[name].tolist() for name in rows.columns}
    for i, done in enumerate(columns["_us"]):
        verify, hold = columns["verify_ms"][i] * 1000.0, columns["hold_ms"][i] * 1000.0
        start = max(done - columns["step_ms"][i] * 1000.0, end)
        split = max(done - verify, start)
        flipped = columns["flipped"][i] is True
        args = {k: _plain(columns[k][i]) for k in shown}
        yield _slice("prefill" if columns["prefill"][i] is True else "decode", tid, start, split, args)
        if verify > 0:
            args = {**args, "flipped": flipped, "repaired": columns["repaired"][i] is True}
            # A step waits for the verifies of its companions, too: that is no verify of its own.
            own = columns["reason"][i] not in ("none", "", None)
            yield _slice("verify" if own else "wait for others' verify", tid, split, done, args)
        if flipped:
            yield _mark("flip", tid, done, args)
        if hold > 0:
            yield _slice("hold", tid + 1, done, done + hold, {"step": args["step"]})
        end = max(end, done)


def _slice(name: str, tid: int, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    dur = round(max(end - start, 0.0), 3)
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": round(start, 3), "dur": dur, "args": args}


def _mark(name: str, tid: int, at: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "i", "s": "t", "pid": 1, "tid": tid, "name": name, "ts": round(at, 3), "args": args}


def _micros(times: Any) -> Any:
    """Return times as float64 microseconds since the epoch."""
    return times.dt.as_unit("us").astype("int64").to_numpy().astype("float64")


def _plain(value: Any) -> Any:
    """Return a JSON value; nulls of pandas, NaN and inf become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str)) else None  # pandas' NA among nullable integers
