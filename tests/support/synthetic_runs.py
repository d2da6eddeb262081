"""Made-up runs for tests and for the dashboard's own benchmark: right in form, invented in content.

Every manifest written here carries ``"synthetic": true`` and the dashboard says so on each page, so that nobody takes
these numbers for a measurement.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_margingate.trace.schema import MANIFEST_NAME, REQUEST_SCHEMA, SCHEMA_VERSION, STEP_SCHEMA

_BF16_GRID = 0.0625  # spacing of bf16 logits in [8, 16)
_START = datetime(2026, 1, 5, 9, 0, tzinfo=timezone.utc)

_TEXTS: dict[str, tuple[str, str]] = {
    "story": (
        "Write a short story about a duck named Penny who wants to see the sea.",
        "Once upon a time a small duck called Penny lived by the old harbor. Every morning she watched the boats and "
        "wondered how far the water went. “One day,” she said, “I will see where it ends!” Her friend Moss, a slow and "
        "careful bear, packed two apples and a map.\n\nThey walked past the windy hill, through the dark cave and over "
        "the long bridge. When the fog lifted, there it was: blue, wide and full of light. Penny laughed and swam. ",
    ),
    "arith": (
        "Noah has 24 pencils. He finds 21 more, then shares them equally among 5 children. How many does each get?",
        "Noah starts with 24 pencils. He finds 21 more, so he has 24 + 21 = 45 pencils. He shares 45 pencils among 5 "
        "children: 45 / 5 = 9. Check: 9 * 5 = 45.\nThe answer is 9.\n",
    ),
    "code": (
        "Write a Python function `max_times_3` that returns the largest of all numbers, each times 3.",
        "def max_times_3(numbers):\n    best = None\n    for n in numbers:\n        value = n * 3\n"
        "        if best is None"
        " or value > best:\n            best = value\n    return best\n\nprint(max_times_3([1, 5, 2]))  # 15\n",
    ),
}
_PIECE = re.compile(r"\n+|\s*\w+|\s*[^\w\s]|\s+")


@dataclass(frozen=True)
class SyntheticSpec:
    """What to make up; the same spec gives the same files."""

    requests: int = 48
    tokens: int = 160
    """Mean output tokens of a request."""
    datasets: tuple[str, ...] = ("story", "arith", "code")
    policy: str = "gate"
    mix: tuple[str, ...] = ()
    """Policies of one run in turn: each prompt is sent once under each, as `make demo` does; empty: `policy` alone."""
    structural: float = 0.0
    """Share of the requests whose decode steps all ran inside the class."""
    sampled: int = 0
    """Requests, the last ones, that were sampled: a row of their own and no steps."""
    threshold: float = 0.5
    audit_rate: float = 0.05
    perturbation: float = 0.09
    """Scale of the batch-induced change of a margin, in logits; 0 gives a run without flips."""
    slots: int = 8
    """Requests decoded at once."""
    text: bool = True
    files: int = 3
    seed: int = 0
    live: bool = False
    schema_version: str = SCHEMA_VERSION


def _vocabulary() -> tuple[list[str], dict[str, int]]:
    pieces: list[str] = []
    for _, body in _TEXTS.values():
        pieces += _PIECE.findall(body)
    words = sorted(set(pieces))
    return words, {word: index for index, word in enumerate(words)}


def _layout(
    spec: SyntheticSpec, rng: np.random.Generator, lengths: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return output lengths, first global step of each request, and the request of each step row in time order."""
    if lengths is None:
        lengths = np.maximum(4, rng.gamma(4.0, spec.tokens / 4.0, spec.requests).astype(np.int64))
    slot = np.arange(spec.requests) % spec.slots
    starts = np.zeros(spec.requests, dtype=np.int64)
    for s in range(spec.slots):
        mine = np.flatnonzero(slot == s)
        # Gaps between requests make the batch grow and shrink.
        gaps = rng.integers(0, max(2, spec.tokens // 2), mine.size)
        starts[mine] = np.cumsum(lengths[mine] + gaps) - lengths[mine]
    owner = np.repeat(np.arange(spec.requests), lengths)
    step = np.arange(owner.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    order = np.argsort(starts[owner] + step, kind="stable")
    return lengths, starts, np.stack([owner[order], step[order]])


def policies(spec: SyntheticSpec) -> np.ndarray:
    """Return each request's policy."""
    return np.array([spec.mix[i % len(spec.mix)] if spec.mix else spec.policy for i in range(spec.requests)])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_frames(spec: SyntheticSpec) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the step rows and request rows of a made-up run, with every column of the schema."""
    rng = np.random.default_rng(spec.seed)
    lengths, starts, (owner, step) = _layout(spec, rng)
    rows = owner.size
    ids = np.array([f"rid-{i:05d}" for i in range(spec.requests)])
    prompt = np.arange(spec.requests) // max(1, len(spec.mix))
    if spec.mix:
        lengths = lengths[prompt * len(spec.mix)]
        lengths, starts, (owner, step) = _layout(spec, rng, lengths)
        rows = owner.size
    dataset_code = prompt % len(spec.datasets)
    datasets = np.array(spec.datasets)[dataset_code]
    prompt_tokens = 18 + (np.arange(spec.requests) * 7) % 40

    tick = starts[owner] + step
    batch_rows = np.bincount(tick)[tick]
    centre = np.array([0.6, 1.3, 1.7, 1.0, 1.2])[dataset_code % 5][owner]
    # The drawn stream depends on the seed alone, so that two policies on one seed share their margins (Compare).
    raw = np.exp(rng.normal(centre, 1.0, rows))
    margin = np.round(raw / _BF16_GRID) * _BF16_GRID
    perturbation = spec.perturbation * np.abs(rng.standard_t(2, rows)) * (batch_rows > 1)
    audit_draw = rng.random(rows)
    prefill = step == 0
    flips_if_seen = (margin < perturbation) & ~prefill

    policy = policies(spec)[owner]
    structural = (owner < spec.structural * spec.requests) & ~prefill
    tau = np.where(policy == "off", np.nan, spec.threshold)
    triggered = ~(margin > tau) & ~prefill & ~structural & (policy != "off")
    audited = (audit_draw < spec.audit_rate) & ~triggered & ~prefill
    reason = np.where(
        (policy == "always") & ~prefill,
        "always",
        np.where(policy == "gate", np.where(triggered, "margin", np.where(audited, "audit", "none")), "none"),
    )
    verified = reason != "none"
    flipped = flips_if_seen & verified
    repaired = flipped & (triggered | (policy == "always"))

    words, index = _vocabulary()
    bodies = [np.array([index[p] for p in _PIECE.findall(_TEXTS.get(d, _TEXTS["story"])[1])]) for d in spec.datasets]
    canonical_token = np.empty(rows, dtype=np.int64)
    for code, body in enumerate(bodies):
        mine = dataset_code[owner] == code
        canonical_token[mine] = body[step[mine] % body.size]
    other = (canonical_token * 7 + 3) % len(words)
    fast = np.where(flips_if_seen, other, canonical_token)
    token = np.where(repaired, canonical_token, fast)
    second = np.where(flips_if_seen, canonical_token, other)

    step_ms = 9.0 + 0.35 * batch_rows + rng.gamma(2.0, 0.3, rows)
    ticks = int(tick.max()) + 1
    # A verify pass is shared by the step's whole batch: every row of the forward waited for it.
    verify_pass = np.zeros(ticks)
    np.maximum.at(verify_pass, tick, np.where(verified, 4.0 + 0.4 * batch_rows, 0.0))
    verify_ms = verify_pass[tick] * ~prefill
    step_ms = step_ms + verify_ms + np.where(prefill, 14.0, 0.0)
    times = pd.Timestamp(_START) + pd.to_timedelta((np.cumsum(np.full(ticks, 12.0))[tick]) * 1000, unit="us")
    delta = rng.gamma(2.0, 0.004, rows)
    text = np.array(words, dtype=object)[token] if spec.text else np.full(rows, None, dtype=object)

    steps = pd.DataFrame(
        {
            "request": owner + 1,
            "request_id": pd.Categorical.from_codes(owner, ids.tolist()),
            "dataset": pd.Categorical(datasets[owner]),
            "step": step,
            "position": prompt_tokens[owner] + step - 1,
            "time": times,
            "token": token,
            "fast_token": fast,
            "second_token": second,
            "margin": margin,
            "threshold": tau,
            "triggered": triggered,
            "reason": pd.Categorical(reason),
            "verify_token": pd.Series(np.where(flipped, canonical_token, fast), dtype="Int32").where(verified),
            "verify_margin": pd.Series(np.abs(margin - perturbation)).where(verified),
            "flipped": flipped,
            "repaired": repaired,
            "kv_delta_first": pd.Series(delta * 0.1).where(verified),
            "kv_delta_last": pd.Series(delta).where(verified),
            "window_rows": np.where(verified, np.minimum(step, 1 + (step % 9)), 0),
            "batch_rows": batch_rows,
            "padded_rows": np.maximum(8, 8 * ((batch_rows + 7) // 8)),
            "canonical": prefill | structural,
            "structural": structural,
            "prefill": prefill,
            "step_ms": step_ms,
            "verify_ms": verify_ms,
            "hold_ms": np.zeros(rows),
            "token_text": text,
            "forward": tick + 1,
            **_tops(fast, second, margin, np.where(flipped, canonical_token, fast), verified),
        }
    )
    requests = _request_rows(spec, steps, owner, triggered, ids, datasets, prompt_tokens, lengths, prompt)
    if spec.sampled:
        unseen = (requests.index >= spec.requests - spec.sampled).nonzero()[0]
        counts = ["triggers", "verified", "audited", "flips", "missed", "structural", "steps"]
        requests.loc[unseen, counts] = 0
        requests.loc[unseen, ["verify_ms", "overhead_ms", "overhead_share"]] = 0.0
        requests["guarantee"] = requests["guarantee"].astype(str)
        requests.loc[unseen, "guarantee"] = "none"
        requests.loc[unseen, "guarantee_note"] = "sampled at temperature 1 without a seed"
        requests.loc[unseen, "temperature"], requests.loc[unseen, "seed"] = np.float32(1), pd.NA
        requests["guarantee"] = pd.Categorical(requests["guarantee"])
        steps = steps[~np.isin(owner, unseen)].reset_index(drop=True)
    return steps, requests


def _tops(
    fast: np.ndarray, second: np.ndarray, margin: np.ndarray, verify: np.ndarray, verified: np.ndarray
) -> dict[str, list[object]]:
    """Return two best tokens of both paths at each verified step, with log-probabilities that fit the margin."""

    def pair(best: int, other: int, gap: float) -> tuple[list[int], list[float]]:
        first = -float(np.log1p(np.exp(-gap)))
        return [int(best), int(other)], [first, first - float(gap)]

    names = ("fast_top_tokens", "fast_top_logprobs", "verify_top_tokens", "verify_top_logprobs")
    found: dict[str, list[object]] = {name: [None] * fast.size for name in names}
    if fast.size > 200_000:
        return found  # for a benchmark of a million steps, lists of lists would take minutes
    for at in np.flatnonzero(verified):
        found[names[0]][at], found[names[1]][at] = pair(fast[at], second[at], margin[at])
        other = second[at] if verify[at] == fast[at] else fast[at]
        found[names[2]][at], found[names[3]][at] = pair(verify[at], other, margin[at])
    return found


def _request_rows(
    spec: SyntheticSpec,
    steps: pd.DataFrame,
    owner: np.ndarray,
    triggered: np.ndarray,
    ids: np.ndarray,
    datasets: np.ndarray,
    prompt_tokens: np.ndarray,
    lengths: np.ndarray,
    prompt: np.ndarray,
) -> pd.DataFrame:
    def total(values: pd.Series | np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=np.asarray(values, dtype=float), minlength=spec.requests)

    reason = steps["reason"].astype(str).to_numpy()
    flipped = steps["flipped"].to_numpy()
    decode_ms = total(np.where(steps["prefill"], 0.0, steps["step_ms"]))
    prefill_ms = total(np.where(steps["prefill"], steps["step_ms"], 0.0))
    queue_ms = 3.0 + (np.arange(spec.requests) * 13) % 29
    verify_ms = total(steps["verify_ms"])
    ttft = prefill_ms + queue_ms
    e2e = ttft + decode_ms
    policy = policies(spec)
    claim = {"gate": "gated", "always": "verified"}
    guarantee = np.array([claim.get(p, "none") for p in policy], dtype=object)
    structural = total(steps["structural"]).astype(int)
    guarantee[(structural > 0) & (policy == "gate")] = "structural"
    lowered = (np.arange(spec.requests) % 17 == 5) & (guarantee != "none")
    prompts = [f"{_TEXTS.get(d, _TEXTS['story'])[0]} (variant {prompt[i]})" for i, d in enumerate(datasets)]
    outputs = steps["token"].groupby(owner, sort=True).apply(lambda t: _digest(",".join(map(str, t))))
    why = np.where(guarantee == "none", "its policy verifies nothing", "every step below the threshold was verified")
    return pd.DataFrame(
        {
            "request": np.arange(spec.requests) + 1,
            "request_id": ids,
            "dataset": pd.Categorical(datasets),
            "policy": pd.Categorical(policy),
            "repair": pd.Categorical(["window"] * spec.requests),
            "threshold": np.where(policy == "off", np.nan, spec.threshold),
            "time": steps["time"].groupby(owner).min().to_numpy(),
            "prompt_tokens": prompt_tokens,
            "cached_tokens": np.where(np.arange(spec.requests) % 3 == 0, 16, 0),
            "floored_tokens": np.where(np.arange(spec.requests) % 3 == 0, 4, 0),
            "prefill_chunks": 1,
            "output_tokens": lengths,
            "triggers": total(triggered).astype(int),
            "verified": total(reason != "none").astype(int),
            "audited": total(reason == "audit").astype(int),
            "flips": total(flipped).astype(int),
            "missed": total(flipped & ~triggered).astype(int),
            "structural": structural,
            "ttft_ms": ttft,
            "tpot_ms": np.where(lengths > 1, decode_ms / np.maximum(1, lengths - 1), np.nan),
            "e2e_ms": e2e,
            "prefill_ms": prefill_ms,
            "verify_ms": verify_ms,
            "hold_ms": 0.0,
            "overhead_ms": verify_ms,
            "overhead_share": verify_ms / e2e,
            "max_batch_rows": steps["batch_rows"].groupby(owner).max().to_numpy(),
            "retractions": 0,
            "guarantee": pd.Categorical(np.where(lowered, "none", guarantee)),
            "guarantee_note": np.where(lowered, "a prefix hit from a stock radix cache", why),
            "finish_reason": pd.Categorical(np.where(np.arange(spec.requests) % 5 == 0, "length", "stop")),
            "prompt_text": prompts if spec.text else [None] * spec.requests,
            "prompt_digest": [_digest(p) for p in prompts],
            "output_digest": outputs.to_numpy(),
            "greedy": np.arange(spec.requests) < spec.requests - spec.sampled,
            "steps": lengths,
            "max_tokens": 4096,
            "repeat": np.arange(spec.requests) % max(1, len(spec.mix)),
            "logprobs": pd.Categorical(np.where(np.arange(spec.requests) % 4 == 1, "batch", None)),
            # Every fifth prompt is asked with a seed, the others greedily.
            "temperature": np.where(prompt % 5 == 3, 0.8, 0.0).astype(np.float32),
            "seed": pd.Series(1000 + prompt, dtype="Int64").where(prompt % 5 == 3),
        }
    )


def make_manifest(spec: SyntheticSpec) -> dict[str, object]:
    """Return a manifest for a made-up run."""
    now = datetime.now(timezone.utc).isoformat()
    manifest: dict[str, object] = {
        "schema_version": spec.schema_version,
        "synthetic": True,
        "model": "made-up/tiny-bf16",
        "dtype": "bfloat16",
        "policy": spec.policy,
        "repair": "window",
        "threshold": spec.threshold,
        "attention_backend": "torch_native",
        "device": "made-up CPU",
        "versions": {"sglang": "0.5.17", "torch": "2.9.1", "sglang-margingate": "0.1.0"},
        "created": _START.isoformat(),
        "heartbeat": now if spec.live else (_START + timedelta(minutes=5)).isoformat(),
        "flags": {
            "margingate": {"policy": spec.policy, "repair": "window", "audit_rate": spec.audit_rate},
            "sglang": {"dtype": "bfloat16", "attention_backend": "torch_native"},
        },
        "profile": None,
        "self_test": {"passed": True, "rows": 16, "trials": 6, "seconds": 0.4, "broken_layer": None},
        "notes": [],
    }
    if not spec.live:
        manifest["closed_at"] = (_START + timedelta(minutes=5)).isoformat()
    return manifest


def _table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        column = frame[field.name]
        value_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        array = pa.Array.from_pandas(column.astype(object) if value_type == pa.string() else column)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        columns.append(array.cast(value_type).cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def write_run(folder: Path, spec: SyntheticSpec | None = None) -> Path:
    """Write a made-up run into ``folder`` (made if missing) and return it."""
    spec = spec or SyntheticSpec()
    folder.mkdir(parents=True, exist_ok=True)
    steps, requests = make_frames(spec)
    bounds = np.linspace(0, len(steps), spec.files + 1).astype(int)
    for part, (start, stop) in enumerate(pairwise(bounds)):
        pq.write_table(_table(steps.iloc[start:stop], STEP_SCHEMA), folder / f"steps-{part:04d}.parquet")
    pq.write_table(_table(requests, REQUEST_SCHEMA), folder / "requests-0000.parquet")
    (folder / MANIFEST_NAME).write_text(json.dumps(make_manifest(spec), indent=2) + "\n")
    return folder
