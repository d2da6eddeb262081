"""The trace on disk: one typed definition of every column of a run.

A run is a folder ``traces/<run>/`` with ``manifest.json``, ``steps-<rows>.parquet`` and ``requests-<rows>.parquet``
(:mod:`sglang_margingate.trace.files`).
Writers and readers take names, types and meanings from here and from nowhere else. A change that an old reader
cannot survive, a changed meaning among them, raises :data:`SCHEMA_VERSION`'s first number; a new optional column
raises the second. Runs of schema 1.x are still read (:mod:`sglang_margingate.trace.upgrade`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from sglang_margingate.words import Guarantee, Reason

__all__ = [
    "REQUEST_COLUMNS",
    "REQUEST_SCHEMA",
    "SCHEMA_VERSION",
    "STEP_COLUMNS",
    "STEP_SCHEMA",
    "Column",
    "Guarantee",
    "Reason",
]

SCHEMA_VERSION = "2.4"

MANIFEST_NAME = "manifest.json"


class Column(NamedTuple):
    """One column: its name, Arrow type, unit and meaning."""

    name: str
    type: pa.DataType
    unit: str
    doc: str


_DICT = pa.dictionary(pa.int32(), pa.string())

_REQUEST = Column(
    "request",
    pa.int32(),
    "",
    "Number of the request, unique in the run: the key of both tables. A client may use one request id twice.",
)
_REQUEST_ID = "SGLang's request id (rid); the client's own where it sent one, so not unique."

STEP_COLUMNS: tuple[Column, ...] = (
    _REQUEST,
    Column("request_id", _DICT, "", _REQUEST_ID),
    Column("dataset", _DICT, "", "Dataset tag sent with the request (margingate_dataset); empty when none was sent."),
    Column("step", pa.int32(), "", "Index of the output token that this step chose, from 0 (chosen by the prefill)."),
    Column("position", pa.int32(), "", "Position t of the token that the step read; its logits choose token t+1."),
    Column("time", pa.timestamp("us", tz="UTC"), "UTC", "When the step's token was known."),
    Column("token", pa.int32(), "id", "The committed token."),
    Column("fast_token", pa.int32(), "id", "The fast path's argmax (lowest index among exact ties)."),
    Column("second_token", pa.int32(), "id", "The fast path's runner-up."),
    Column(
        "margin",
        pa.float32(),
        "logits",
        "Top-1 minus top-2 of the fast path's processed logits, in fp32; of a seeded request, of logits plus noise, and no more "
        "than the distance to the border of a filter that could change the token.",
    ),
    Column(
        "threshold",
        pa.float32(),
        "logits",
        "The request's threshold (tau); NaN only where its policy has none. A structural step has one, and no use for it.",
    ),
    Column(
        "triggered",
        pa.bool_(),
        "",
        "The margin was at or below the threshold at a decode step that is not structural.",
    ),
    Column("reason", _DICT, "", "Why the step was verified: none, margin, audit, always, resume, limit."),
    Column("verify_token", pa.int32(), "id", "The verify's argmax; null where the step was not verified."),
    Column("verify_margin", pa.float32(), "logits", "The verify's margin; null where the step was not verified."),
    Column("flipped", pa.bool_(), "", "The verify's token differs from the fast path's (a confirmed mismatch)."),
    Column(
        "repaired", pa.bool_(), "", "The verify's token and column(s) were put in place; false for a shadow verify."
    ),
    Column(
        "kv_delta_first",
        pa.float32(),
        "",
        "Max abs change of the step's K/V column in the first layer; null if unverified.",
    ),
    Column(
        "kv_delta_last",
        pa.float32(),
        "",
        "Max abs change of the step's K/V column in the last layer; null if unverified.",
    ),
    Column(
        "window_rows",
        pa.int32(),
        "rows",
        "Columns recomputed for this step's verify, itself included; 0 if unverified.",
    ),
    Column("batch_rows", pa.int32(), "rows", "Requests in the forward that ran the step."),
    Column(
        "padded_rows",
        pa.int32(),
        "rows",
        "Rows of the widest linear layer or bank of experts (M); others may have run at fewer. Of a prefill, rows are tokens. Null where not observed.",
    ),
    Column(
        "canonical",
        pa.bool_(),
        "",
        "This forward ran inside the canonical class, or alone on the canonical prefill grid, as observed.",
    ),
    Column(
        "structural", pa.bool_(), "", "The step and every column that it read ran inside the class: no margin decides."
    ),
    Column("prefill", pa.bool_(), "", "The step's logits came from a prefill (first token, or resume)."),
    Column(
        "step_ms",
        pa.float32(),
        "ms",
        "Time of the forward that ran the step and of its sampling, verify included; of this forward alone.",
    ),
    Column("verify_ms", pa.float32(), "ms", "Wall time of the verify passes that the step waited for."),
    Column(
        "hold_ms", pa.float32(), "ms", "Time the token was held back before it was shown (deferred schedule; 0 inline)."
    ),
    Column("token_text", pa.string(), "", "The token decoded alone; null unless the run records text."),
    Column(
        "forward", pa.int32(), "", "Number of the forward that ran the step, unique in the run: its rows ran together."
    ),
    Column(
        "fast_top_tokens",
        pa.list_(pa.int32()),
        "id",
        "The fast path's best five tokens: of verified steps, and of every step of a request with margingate_return_steps.",
    ),
    Column("fast_top_logprobs", pa.list_(pa.float32()), "ln p", "Their log-probabilities, of the processed logits."),
    Column("verify_top_tokens", pa.list_(pa.int32()), "id", "The verify's best five tokens; null where not verified."),
    Column("verify_top_logprobs", pa.list_(pa.float32()), "ln p", "Their log-probabilities."),
)

REQUEST_COLUMNS: tuple[Column, ...] = (
    _REQUEST,
    Column("request_id", pa.string(), "", _REQUEST_ID),
    Column("dataset", _DICT, "", "Dataset tag sent with the request; empty when none was sent."),
    Column("policy", _DICT, "", "Policy in force for this request: off, log, gate, always."),
    Column("repair", _DICT, "", "Repair in force: column or window."),
    Column("threshold", pa.float32(), "logits", "Threshold (tau) in force; NaN where the policy has none."),
    Column("time", pa.timestamp("us", tz="UTC"), "UTC", "When the request reached the scheduler."),
    Column("prompt_tokens", pa.int32(), "tokens", "Tokens of the prompt."),
    Column("cached_tokens", pa.int32(), "tokens", "Prompt tokens taken from the radix cache."),
    Column("floored_tokens", pa.int32(), "tokens", "Cached tokens given up to keep prefill chunks canonical."),
    Column("prefill_chunks", pa.int32(), "", "Forwards that prefilled the prompt."),
    Column("output_tokens", pa.int32(), "tokens", "Generated tokens."),
    Column("triggers", pa.int32(), "steps", "Steps that triggered."),
    Column("verified", pa.int32(), "steps", "Steps verified for any reason."),
    Column("audited", pa.int32(), "steps", "Untriggered steps verified at random."),
    Column("flips", pa.int32(), "steps", "Confirmed mismatches, missed ones included."),
    Column(
        "missed",
        pa.int32(),
        "steps",
        "Flips at steps that nothing but an audit or the policy always would have verified, structural ones included.",
    ),
    Column("structural", pa.int32(), "steps", "Structural steps."),
    Column(
        "ttft_ms", pa.float32(), "ms", "Time to first token, from arrival at the scheduler; null where none was seen."
    ),
    Column("tpot_ms", pa.float32(), "ms", "Mean time per output token after the first; null with one token."),
    Column("e2e_ms", pa.float32(), "ms", "From arrival at the scheduler to the last token."),
    Column("prefill_ms", pa.float32(), "ms", "Wall time of the forwards that prefilled the prompt."),
    Column("verify_ms", pa.float32(), "ms", "Wall time of verify passes that this request waited for."),
    Column("hold_ms", pa.float32(), "ms", "Time tokens were held back (deferred schedule; 0 inline)."),
    Column("overhead_ms", pa.float32(), "ms", "verify_ms + hold_ms: what the policy added to this request."),
    Column("overhead_share", pa.float32(), "1", "overhead_ms / e2e_ms."),
    Column("max_batch_rows", pa.int32(), "rows", "Largest batch that any of its decode steps ran in."),
    Column("retractions", pa.int32(), "", "Times the request was retracted and prefilled again."),
    Column("guarantee", _DICT, "", "structural, verified, gated or none."),
    Column("guarantee_note", pa.string(), "", "One sentence: what the guarantee stands on, or why there is none."),
    Column("finish_reason", _DICT, "", "stop, length or abort."),
    Column("prompt_text", pa.string(), "", "The prompt; null unless the run records text."),
    Column(
        "prompt_digest",
        pa.string(),
        "",
        "Equal for equal prompts, in any run: first 16 hex digits of SHA-256 of its tokens (int32, little-endian).",
    ),
    Column("output_digest", pa.string(), "", "The same of the answer's tokens: tells whether two are identical."),
    Column(
        "greedy",
        pa.bool_(),
        "",
        "Its tokens were to be the best ones (temperature 0), so that answers can be compared.",
    ),
    Column("steps", pa.int32(), "steps", "Steps that were observed, its rows in the table of steps; 0 where none was."),
    Column(
        "max_tokens", pa.int32(), "tokens", "Tokens that the request asked for at most; null where it set no limit."
    ),
    Column(
        "repeat",
        pa.int32(),
        "",
        "Which pass over the same prompts the request belongs to (margingate_repeat); null when none was sent.",
    ),
    Column(
        "logprobs",
        _DICT,
        "",
        "Log-probabilities in the answer: exact (the same bits in any batch) or batch; null when none were asked for.",
    ),
    Column("temperature", pa.float32(), "1", "The request's temperature; 0 of a greedy one."),
    Column(
        "seed",
        pa.int64(),
        "",
        "The seed that its tokens were drawn with, of a group's sample the derived one; null where none was used.",
    ),
)

STEP_SCHEMA = pa.schema([(c.name, c.type) for c in STEP_COLUMNS])
REQUEST_SCHEMA = pa.schema([(c.name, c.type) for c in REQUEST_COLUMNS])

README_BEGIN, README_END = "<!-- schema:begin -->", "<!-- schema:end -->"


def markdown() -> str:
    """Return the tables of all columns as Markdown, for ``traces/README.md``."""
    lines = [f"Schema version {SCHEMA_VERSION}."]
    for title, columns in (("Step rows", STEP_COLUMNS), ("Request rows", REQUEST_COLUMNS)):
        lines += ["", f"### {title}", "", "| column | type | unit | meaning |", "| --- | --- | --- | --- |"]
        for c in columns:
            kind = "category" if pa.types.is_dictionary(c.type) else str(c.type)
            lines.append(f"| `{c.name}` | {kind} | {c.unit} | {c.doc} |")
    return "\n".join(lines) + "\n"


def with_tables(readme: str) -> str:
    """Return the README's text with the tables between its two marks renewed."""
    head, _, rest = readme.partition(README_BEGIN)
    _, _, tail = rest.partition(README_END)
    return f"{head}{README_BEGIN}\n{markdown()}{README_END}{tail}"


if __name__ == "__main__":  # no argument: print the tables; a README's path: renew them there
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(markdown(), end="")
