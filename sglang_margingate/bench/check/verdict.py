"""The check's verdict: one screen of text, JSON for scripts, JUnit for CI."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree as xml

from sglang_margingate.bench import tables
from sglang_margingate.bench.check.identity import Difference
from sglang_margingate.bench.check.phases import LOADED, CheckResult
from sglang_margingate.bench.check.recorded import RUN
from sglang_margingate.bench.servers.gauges import BatchProof
from sglang_margingate.gate.stats import Rate, percent

WIDTH = 80
CHECK_SCHEMA = "margingate-check/1"
PASS, FAIL, INVALID = 0, 1, 2


class Verdict(NamedTuple):
    """The outcome, and the words for it."""

    code: int
    word: str
    reason: str


def judge(result: CheckResult, expect_fail: bool = False) -> Verdict:
    """Return the outcome: a difference always counts; identity counts only where it was really put to the test."""
    runs = result.runs
    changed, prompts = len(runs.changed()), len(runs.by_prompt)
    company = result.company
    if changed:
        reason = f"{changed:,}/{prompts:,} prompts change with the batch"
        if result.stopped_at_first:
            reason = f"a prompt changed at output {runs.outputs:,} (stopped there)"
        if company is not None:
            reason += f"; {_company(company)}"
        return Verdict(PASS, "PASS (expected to fail)", reason) if expect_fail else Verdict(FAIL, "FAIL", reason)
    if result.error:
        return Verdict(INVALID, "INCOMPLETE", result.error)
    if runs.pairs()[1] == 0:
        return Verdict(INVALID, "INVALID", "no prompt ran twice: nothing was compared")
    if company is not None:
        return Verdict(INVALID, "INVALID", f"{_company(company)}: stop the other traffic and check again")
    if result.unproven:
        return Verdict(INVALID, "INVALID", f"no batch formed in {', '.join(result.unproven)}: nothing was tested")
    reason = f"{prompts:,}/{prompts:,} prompts gave the same output in every run"
    return Verdict(FAIL, "FAIL (expected to fail)", reason) if expect_fail else Verdict(PASS, "PASS", reason)


def _company(proof: BatchProof) -> str:
    """Say what the server's own gauge showed beside the phase `alone`."""
    what = "decode steps" if proof.unit == "steps" else "samples"
    return (
        f"alone was not alone: other requests ran in {proof.batched:,} of {proof.total:,} {what}, "
        f"largest batch {proof.largest}"
    )


def reproduce(command: list[str], difference: Difference | None) -> list[str]:
    """Return the command that repeats the failure: the same prompts, as companions matter, in the two phases only.

    Parameters
    ----------
    command
        The check's own command without ``--phases``.
    """
    if difference is None:
        return command
    phases = dict.fromkeys(o.run.split(" #")[0] for o in (difference.first, difference.second) if o.run != RUN)
    cut = command.index("--") if "--" in command else len(command)  # the server's own flags come last
    return [*command[:cut], "--phases", ",".join(phases), *command[cut:]]


def shell_lines(command: list[str]) -> list[str]:
    """Return a shell command in lines of at most 80 columns."""
    lines, line = [], ""
    words = [shlex.quote(w) for w in command]
    # A flag stays with its value.
    parts: list[str] = []
    for word in words:
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += " " + word
        else:
            parts.append(word)
    for part in parts:
        if line and len(line) + len(part) + 3 > WIDTH:
            lines.append(line + " \\")
            line = "    " + part
        else:
            line = f"{line} {part}" if line else part
    return [*lines, line]


def render(result: CheckResult, verdict: Verdict, command: list[str], server: Mapping[str, str]) -> str:
    """Return the verdict as text of at most 80 columns (a word longer than that, as a URL, is not broken)."""
    difference = result.runs.first()
    out: list[str] = []
    if difference is not None:
        out += shell_lines(reproduce(command, difference))
    out += _wrap(f"{verdict.word}: {verdict.reason}", "")
    if result.error and verdict.word != "INCOMPLETE":
        out += _wrap(f"the check ended early: {result.error}", "  ")
    out += _item("server", ", ".join(v for v in server.values() if v))
    if not result.runs.outputs:
        return "\n".join(out)
    different, pairs = result.runs.pairs()
    compared = f"{result.runs.by}; all pairs of runs: {different:,}/{pairs:,} differ"
    out += _item("compared", compared)
    out += _item("batches", _batches(result))
    missed = [n for n in ("cached", "prefix") if n in result.phases and not result.phases[n].cached_tokens]
    if missed:
        why = "the prefix cache is off, shares longer pieces than these prompts only, or the server does not tell"
        out += _item("cache", f"no hits in {', '.join(missed)}: {why}")
    if result.guarantees:
        claims = ", ".join(f"{k} {v:,}" for k, v in result.guarantees.most_common())
        out += _item("guarantee", f"{claims} (claimed by the server, per request)")
    rows = []
    for name, phase in result.phases.items():
        k, n = result.runs.against_first(name)
        largest = phase.proof.largest if phase.proof.by_rows else "-"
        rows.append([name, f"{phase.requests:,}", f"{k:,}/{n:,}", f"{phase.cached_tokens:,}", largest])
    table = tables.text(["phase", "requests", "changed", "cached tokens", "largest batch"], rows)
    out += ["", *(f"  {line}" for line in table.splitlines())]
    k, n = _changed_outputs(result)
    out += _item("changed", f"{Rate(k, n)} of outputs against the prompt's first")
    if difference is not None:
        a, b = difference.first, difference.second
        out += ["", *_item("first", f"{difference.prompt_id}: {a.run} against {b.run}, {difference.describe()}")]
        out += _excerpts(difference)
    return "\n".join(out)


def _changed_outputs(result: CheckResult) -> tuple[int, int]:
    counts = [result.runs.against_first(name) for name in result.phases]
    return sum(k for k, _ in counts), sum(n for _, n in counts)


def _batches(result: CheckResult) -> str:
    proof = result.proof
    if not any(name in LOADED for name in result.phases):
        return "none asked for: no phase with several requests was run"
    if not proof.source:
        return (
            "NOT PROVEN: the server shows no gauge of running requests (/margingate/status, /metrics, /v1/loads), "
            "so requests may have run one by one"
        )
    if not proof.total:
        return f"NOT PROVEN: {proof.source} showed no running request"
    share = percent(proof.batched / proof.total)
    what = "decode steps" if proof.unit == "steps" else "samples"
    return (
        f"{proof.batched:,}/{proof.total:,} {what} ({share}) had two or more rows, largest {proof.largest}"
        f" (from {proof.source})"
    )


def _excerpts(difference: Difference) -> list[str]:
    texts = [o.completion.text for o in (difference.first, difference.second)]
    if not any(texts):
        return _id_excerpts(difference)
    at = next((i for i, (p, q) in enumerate(zip(*texts)) if p != q), min(map(len, texts)))
    start = max(0, at - 30)
    lines = []
    for o, text in zip((difference.first, difference.second), texts):
        piece = repr(text[start : start + 54])[1:-1][:60]
        lines.append(f"    {o.run:<13} {'...' if start else ''}{piece}"[:WIDTH])
    return lines


def _id_excerpts(difference: Difference) -> list[str]:
    """Show token ids where a server without a tokenizer gave no text."""
    at = difference.position
    if at is None:
        return []
    start = max(0, at - 3)
    lines = []
    for o in (difference.first, difference.second):
        ids = " ".join(map(str, o.completion.tokens[start : start + 8]))
        lines.append(f"    {o.run:<13} {'...' if start else ''}{ids}"[:WIDTH])
    return lines


def _item(name: str, text: str) -> list[str]:
    return _wrap(text, f"  {name:<11}")


def _wrap(text: str, head: str) -> list[str]:
    import textwrap

    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head) if head else "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def to_dict(result: CheckResult, verdict: Verdict, command: list[str], server: Mapping[str, str]) -> dict[str, Any]:
    """Return everything for scripts, in plain types."""
    different, pairs = result.runs.pairs()
    k, n = _changed_outputs(result)
    first = result.runs.first()
    return {
        "schema": CHECK_SCHEMA,
        "verdict": verdict.word,
        "exit_code": verdict.code,
        "reason": verdict.reason,
        "error": result.error or None,
        "command": shlex.join(command),
        "reproduce": shlex.join(reproduce(command, first)) if first else None,
        "server": dict(server),
        "compared": result.runs.by,
        "prompts": {"changed": len(result.runs.changed()), "total": len(result.runs.by_prompt)},
        "pairs": {"different": different, "total": pairs},
        "outputs": {"changed": k, "total": n, "upper_95": Rate(k, n).upper() if n else None},
        "batches": {"proven": result.proof.largest > 1, **result.proof.to_dict()},
        "alone": result.company is None if "alone" in result.phases else None,
        "guarantees": dict(result.guarantees),
        "phases": [
            {
                "name": p.name,
                "requests": p.requests,
                "seconds": round(p.seconds, 3),
                "cached_tokens": p.cached_tokens,
                "flushed": p.flushed,
                "changed": result.runs.against_first(p.name)[0],
                "compared": result.runs.against_first(p.name)[1],
                "batches": p.proof.to_dict(),
            }
            for p in result.phases.values()
        ],
        "changed": [_changed_prompt(result, p) for p in result.runs.changed()],
    }


def _changed_prompt(result: CheckResult, prompt_id: str) -> dict[str, Any]:
    from sglang_margingate.bench.check.identity import first_difference, identity

    seen = result.runs.by_prompt[prompt_id]
    other = next(o for o in seen if identity(o.completion) != identity(seen[0].completion))
    difference = first_difference(seen[0], other)
    return {
        "prompt": prompt_id,
        "outputs": len(result.runs.groups(seen)),
        "runs": len(seen),
        "first": {"runs": [seen[0].run, other.run], "position": difference.position, "what": difference.describe()},
    }


def to_junit(result: CheckResult, verdict: Verdict, command: list[str], expect_fail: bool = False) -> str:
    """Return JUnit XML: a case per prompt; one case for the inverse test."""
    changed = set(result.runs.changed())
    errors = int(verdict.code == INVALID)
    if expect_fail:
        cases, failures = 1, int(verdict.code == FAIL)
    else:
        cases, failures = len(result.runs.by_prompt), len(changed)
    seconds = f"{sum(p.seconds for p in result.phases.values()):.3f}"
    totals = {"tests": str(cases + errors), "failures": str(failures), "errors": str(errors), "time": seconds}
    root = xml.Element("testsuites", totals)
    suite = xml.SubElement(root, "testsuite", {"name": "margingate check", **totals})
    if expect_fail:
        case = xml.SubElement(suite, "testcase", {"classname": "check", "name": "expected to fail"})
        if failures:
            xml.SubElement(case, "failure", {"message": verdict.reason})
    else:
        for prompt_id in result.runs.by_prompt:
            case = xml.SubElement(suite, "testcase", {"classname": "check", "name": prompt_id})
            if prompt_id in changed:
                first = _changed_prompt(result, prompt_id)["first"]
                message = f"{' against '.join(first['runs'])}: {first['what']}"
                xml.SubElement(case, "failure", {"message": message}).text = shlex.join(command)
    if errors:
        case = xml.SubElement(suite, "testcase", {"classname": "check", "name": "the check itself"})
        xml.SubElement(case, "error", {"message": verdict.reason})
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
