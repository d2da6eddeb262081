"""What a truth sweep holds against each answer: its label against its run alone, its counts against each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_margingate.bench.evidence.truth_client import Answer, Reply, key
from sglang_margingate.bench.evidence.truth_plan import NATIVE
from sglang_margingate.bench.servers.client import first_difference
from sglang_margingate.words import Guarantee

UNSEEN = "no summary"
STRICT = (Guarantee.STRUCTURAL.value, Guarantee.VERIFIED.value)
"""Labels under which no answer at all may differ from its run alone."""
ABOVE_NONE = (*STRICT, Guarantee.GATED.value)

COUNTS = ("steps", "triggers", "verified", "flips", "structural", "request")


@dataclass(frozen=True)
class Finding:
    """One reply beside the run alone."""

    id: str
    kind: str
    label: str
    same: bool | None
    """None: nothing to compare with."""
    at: int | None = None
    """First token (character, for the OpenAI API) that differs; None where only the finish reasons do."""
    finish: tuple[str, str] = ("", "")
    """In the sweep, and alone."""
    size: int = 0
    """Prompt and answer tokens: small ones are looked at first."""
    note: str = ""
    sent: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the difference in one line."""
        where = (
            f"finish reason {self.finish[0]}, alone {self.finish[1]}"
            if self.at is None
            else f"first differs at {self.at}"
        )
        return f"{self.id} {self.kind}, {self.label}: {where}; {self.size} tokens; note: {self.note or 'none'}"


def compare(answers: Sequence[Answer], references: dict[str, Reply]) -> list[Finding]:
    """Return one finding for every reply.

    An answer that ended early, as it was aborted, must be the beginning of its run alone.
    """
    out = []
    for answer in answers:
        want = references.get(key(answer)) if answer.replies else None
        for reply in answer.replies:
            out.append(_finding(answer, reply, want))
    return out


def _finding(answer: Answer, reply: Reply, want: Reply | None) -> Finding:
    case, summary = answer.case, reply.summary or {}
    label = str(summary.get("guarantee", UNSEEN))
    size = len(answer.sent.get("input_ids", ())) + len(reply.tokens)
    note = str(summary.get("guarantee_note") or "")
    if want is None:
        return Finding(case.id, case.kind, label, None, size=size, note=note, sent=answer.sent)
    got_all, want_all = (reply.tokens, want.tokens) if case.path == NATIVE else (reply.text, want.text)
    cut = reply.finish == "abort"
    at = first_difference(got_all, want_all[: len(got_all)] if cut else want_all)
    same = at is None and (cut or reply.finish == want.finish)
    return Finding(case.id, case.kind, label, same, at, (reply.finish, want.finish), size, note, answer.sent)


@dataclass
class Problems:
    """What does not fit, by sentence: how often, and where first."""

    by_text: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, where: str, text: str) -> None:
        """Note one."""
        self.by_text[text].append(where)

    def lines(self) -> list[str]:
        """Return one line for each sentence, the most frequent first."""
        ordered = sorted(self.by_text.items(), key=lambda item: -len(item[1]))
        return [f"{len(where)}: {text} (as {', '.join(where[:3])})" for text, where in ordered]

    def __len__(self) -> int:
        return sum(len(where) for where in self.by_text.values())


def check_answers(answers: Sequence[Answer], problems: Problems) -> None:
    """Check that every request was answered as it should be, and that each summary says what was seen."""
    numbers: Counter[int] = Counter()
    for answer in answers:
        case = answer.case
        where = f"{case.id} {case.kind}"
        if (answer.status == 400 and case.may_refuse) or answer.status == 0:
            continue
        if answer.status != 200 or answer.error:
            problems.add(where, f"HTTP {answer.status}: {answer.error}")
        for reply in answer.replies:
            if reply.summary is None:
                problems.add(where, "the answer has no summary" + ("" if case.path == NATIVE else " (OpenAI API)"))
                continue
            check_summary(answer, reply, lambda text, at=where: problems.add(at, text))  # type: ignore[misc]
            if isinstance(number := reply.summary.get("request"), int):
                numbers[number] += 1
    for number, times in numbers.items():
        if times > 1:
            problems.add(f"request {number}", "a number of a request is not unique")


def check_summary(answer: Answer, reply: Reply, say: Callable[[str], None]) -> None:
    """Check one summary against the answer that it came with and against itself."""
    summary, case = reply.summary or {}, answer.case
    if summary.get("guarantee") == "none" and set(summary) == {"guarantee", "guarantee_note"}:
        return  # it ended where nobody watched, such as in the queue: no counts, and it says so
    if missing := [name for name in COUNTS if not isinstance(summary.get(name), int)]:
        say(f"the summary has no number {', '.join(missing)}")
    label, note = summary.get("guarantee"), summary.get("guarantee_note")
    if label not in {g.value for g in Guarantee}:
        say(f"the label {label!r} is unknown")
    if not note or not isinstance(note, str):
        say(f"{label} has no note")
    count = {name: int(summary.get(name) or 0) for name in COUNTS}
    decode = max(0, count["steps"] - 1)
    seen = case.repeatable and case.asked_policy != "off"  # others decode as in stock SGLang, and nothing is observed
    if case.path == NATIVE and count["steps"] != len(reply.tokens) and (seen or count["steps"]):
        say("steps is not the number of tokens shown")
    if not 0 <= count["flips"] <= count["verified"] <= count["steps"]:
        say("not flips <= verified <= steps")
    if "structural" in summary and count["structural"] > decode:
        say("more structural steps than decode steps")
    # After a retraction one verify, itself in the class, recomputes what was prefilled again.
    if label == "structural" and count["structural"] + int(summary.get("repaired") or 0) < decode:
        say("structural, but not every decode step is, or was recomputed in the class")
    if label == "verified" and count["verified"] + count["structural"] < decode:
        say("verified, but not every decode step is")
    if label in ABOVE_NONE:
        if count["steps"] == 0 and "no token was asked for" not in str(note):
            say(f"{label} without any step")
        if count["steps"] == 1 and "prefill" not in str(note).lower():
            say(f"{label} of one token, and the note does not say that it stands on its prefill alone")
        if not case.repeatable:
            say(f"a sampled request says {label}")
        if case.asked_policy in ("off", "log"):
            say(f"a request with policy {case.asked_policy} says {label}")
        if reply.finish == "abort":
            say(f"an aborted answer says {label}")


def check_traces(answers: Sequence[Answer], steps: Any, requests: Any, problems: Problems) -> int:
    """Check a run's rows against the summaries, by the request's number; return how many requests were checked."""
    if "request" not in requests.columns:
        problems.add("the run", "rows are not keyed by the request's number (`request`)")
        return 0
    by_number = requests.set_index("request")
    groups = {number: rows for number, rows in steps.groupby("request")}
    checked = 0
    for answer in answers:
        for reply in answer.replies:
            number = (reply.summary or {}).get("request")
            if not isinstance(number, int):
                continue
            where = f"{answer.case.id} {answer.case.kind}"
            if number not in by_number.index:
                problems.add(where, "the trace has no row of an answered request")
                continue
            checked += 1
            row, rows = by_number.loc[number], groups.get(number, steps.iloc[:0])
            if answer.case.path == NATIVE and row["output_tokens"] != len(reply.tokens):
                problems.add(where, "trace: output_tokens is not the number of tokens shown")
            for text in row_problems(reply.summary or {}, row, rows):
                problems.add(where, text)
    return checked


def row_problems(summary: dict[str, Any], row: Any, steps: Any) -> list[str]:
    """Return where one request's trace does not say what its summary says."""
    out = [
        f"trace: {name} of the request's row is not the summary's"
        for name in ("triggers", "verified", "flips", "structural", "missed", "guarantee", "guarantee_note", "policy")
        if name in summary and name in row.index and row[name] != summary[name]
    ]
    if len(steps) != int(summary.get("steps", -1)):
        out.append("trace: not one step row for each step")
    for name, counted in (("structural", "structural"), ("triggered", "triggers")):
        if name in steps.columns and counted in summary and int(steps[name].sum()) != int(summary[counted]):
            out.append(f"trace: {name} step rows are not the summary's {counted}")
    seen = steps.dropna(subset=["padded_rows"])
    if (seen["padded_rows"] < seen["batch_rows"]).any():
        out.append("trace: padded_rows is less than batch_rows")
    if not steps["time"].is_monotonic_increasing:
        out.append("trace: time goes back")
    if list(steps["step"]) != list(range(len(steps))):
        out.append("trace: steps are not numbered from 0")
    if row["ttft_ms"] > row["e2e_ms"]:
        out.append("trace: ttft_ms is more than e2e_ms")
    return out
