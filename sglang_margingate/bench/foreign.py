"""Runs of other engines: JSON lines with tokens, in the shape of OpenAI's answers or plainer, become a run of ours.

One request a line: ``prompt`` or ``prompt_token_ids`` or ``messages``; ``token_ids`` or ``tokens`` (ids) of the answer;
``text``; ``finish_reason``; and, where there are any, ``id``, ``dataset``, ``repeat``, ``batch``, ``ttft_ms``,
``e2e_ms`` and ``logprobs``: of each token its text, id and the best alternatives. An OpenAI answer has these in ``choices[0]``.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_margingate.bench.options import UsageError
from sglang_margingate.gate.request import digest

MOST_LINE = 64 * 1024 * 1024


def import_run(file: Path, trace_dir: Path, model: str | None = None) -> tuple[Path, int]:
    """Write a run of the answers in a file and return its folder and the number of its requests.

    Raises
    ------
    UsageError
        The file cannot be read, or a line is not an answer; it names the line and what it lacks.
    TraceError
        The run cannot be written.
    """
    from sglang_margingate.trace import TraceWriter

    rows = list(_answers(file))
    if not rows:
        raise UsageError(f"{file}: no answer in it; give JSON lines, one request a line")
    named = model or next((str(row["model"]) for row in rows if row.get("model")), file.stem)
    about = {"model": named, "policy": "off", "notes": ["imported from another engine: nothing was gated or observed by us"],
             "imported_from": file.name}  # fmt: skip
    with TraceWriter(trace_dir, about, seconds_per_file=3600) as writer:
        for number, row in enumerate(rows, 1):
            writer.add_steps(_steps(number, row))
            writer.add_request(_request(number, row))
    return writer.path, len(rows)


def _answers(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE), ""), 1):
                if line.strip():
                    yield _answer(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _answer(line: str, where: str) -> dict[str, Any]:
    """Return one answer with its fields at one level.

    Raises
    ------
    UsageError
        It has no tokens.
    """
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("a JSON object was expected")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {str(error).splitlines()[0][:120]}") from None
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    row = {**found, **choice}
    message = row.get("message")
    if isinstance(message, dict) and "text" not in row:
        row["text"] = message.get("content")
    tops = _tops(row.get("logprobs"))
    tokens = row.get("token_ids", row.get("tokens"))
    if tokens is None and tops:
        tokens = [top["token_id"] for top in tops]
    if not (isinstance(tokens, list) and all(type(t) is int and 0 <= t < 2**31 for t in tokens)):
        raise UsageError(f"{where}: no token_ids (the ids of the answer's tokens); ask the engine to return them")
    return {**row, "token_ids": tokens, "tops": tops if len(tops) == len(tokens) else []}


def _tops(logprobs: Any) -> list[dict[str, Any]]:
    """Return token, id and best alternatives of each token, from the shape of chat answers; empty for others."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = []
    for entry in content if isinstance(content, list) else []:
        if not isinstance(entry, dict):
            return []
        best = [
            t
            for t in entry.get("top_logprobs") or []
            if isinstance(t, dict) and isinstance(t.get("logprob"), (int, float))
        ]
        best.sort(key=lambda t: -t["logprob"])
        margin = best[0]["logprob"] - best[1]["logprob"] if len(best) > 1 else math.nan
        second = best[1].get("token_id") if len(best) > 1 else None
        found.append(
            {"token_id": entry.get("token_id"), "text": entry.get("token"), "margin": margin, "second": second}
        )
    return found


def _steps(number: int, row: Mapping[str, Any]) -> dict[str, list[Any]]:
    tokens, tops = row["token_ids"], row["tops"]
    count = len(tokens)
    batch = row.get("batch")
    return {
        "request": [number] * count,
        "request_id": [_id(number, row)] * count,
        "dataset": [str(row.get("dataset") or "")] * count,
        "step": list(range(count)),
        "position": list(range(count)),
        "time": [_time(row)] * count,
        "token": tokens,
        "fast_token": tokens,
        "second_token": [top["second"] if isinstance(top["second"], int) else None for top in tops] or [None] * count,
        "margin": [top["margin"] for top in tops] or [math.nan] * count,
        "threshold": [math.nan] * count,
        "triggered": [False] * count,
        "reason": ["none"] * count,
        "flipped": [False] * count,
        "repaired": [False] * count,
        "window_rows": [0] * count,
        "batch_rows": [batch if type(batch) is int else None] * count,
        "prefill": [i == 0 for i in range(count)],
        "token_text": [top["text"] if isinstance(top["text"], str) else None for top in tops] or [None] * count,
    }


def _request(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    ids, text = row.get("prompt_token_ids"), row.get("prompt")
    if text is None and row.get("messages") is not None:
        text = json.dumps(row["messages"], ensure_ascii=False, sort_keys=True)
    known = isinstance(ids, list) and all(type(t) is int and 0 <= t < 2**31 for t in ids)
    prompt = digest(ids) if isinstance(ids, list) and known else None
    if prompt is None and isinstance(text, str):
        prompt = hashlib.sha256(text.encode()).hexdigest()[:16]  # equal for equal texts, within imported runs
    times = {n: row[n] for n in ("ttft_ms", "tpot_ms", "e2e_ms") if isinstance(row.get(n), (int, float))}
    batch, repeat = row.get("batch"), row.get("repeat")
    return {
        "request": number,
        "request_id": _id(number, row),
        "dataset": str(row.get("dataset") or ""),
        "policy": "off",
        "time": _time(row),
        "prompt_tokens": len(ids) if isinstance(ids, list) and known else None,
        "cached_tokens": 0,
        "output_tokens": len(row["token_ids"]),
        "triggers": 0, "verified": 0, "audited": 0, "flips": 0, "missed": 0, "structural": 0,
        "max_batch_rows": batch if type(batch) is int else None,
        "guarantee": "none",
        "guarantee_note": "imported from another engine: nothing was observed",
        "finish_reason": str(row.get("finish_reason") or "unknown"),
        "prompt_text": text if isinstance(text, str) else None,
        "prompt_digest": prompt,
        "output_digest": digest(row["token_ids"]),
        "greedy": True,
        "steps": len(row["token_ids"]),
        "repeat": repeat if type(repeat) is int else None,
        **times,
    }  # fmt: skip


def _id(number: int, row: Mapping[str, Any]) -> str:
    return str(row.get("id") or row.get("request_id") or f"request-{number}")


def _time(row: Mapping[str, Any]) -> float:
    created = row.get("created")
    return float(created) if isinstance(created, (int, float)) and 0 < created < 2**33 else time.time()
