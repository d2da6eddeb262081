"""What servers show: hooks, self-test and map of ours, identity on it, the negative control on stock, and the cost of a step."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_margingate.bench.check.phases import CheckResult, Plan, run_check
from sglang_margingate.bench.check.verdict import FAIL, PASS, Verdict, judge, to_dict
from sglang_margingate.bench.doctor.findings import Finding, State, Table, not_checked
from sglang_margingate.bench.doctor.report import homeless
from sglang_margingate.bench.doctor.subject import too_large, write_weights
from sglang_margingate.bench.doctor.visit import Visit
from sglang_margingate.bench.servers.client import Client, Prompt, ServerError
from sglang_margingate.words import decode_sizes

OURS, STOCK = "canonical", "stock"
PHASES = ("alone", "together", "staggered")
RANDOM = "random:100-400"
"""Prompts of a model whose language is not known: lengths in tokens."""
BATCHES = {True: (1, 8), False: (1, 8, 32)}
CONTEXT = {True: 64, False: 512}
"""Prompt tokens where the cost of a step is measured; on a CPU, on a GPU."""
NEW = 96
REPEATS = 3
QUIET = 1.5
"""Repeats on a machine that does nothing else lie closer together than this factor."""
LATE = 0.2
"""A repeat with less than this share of the longest one's time was read late by the client."""


def start_ours(visit: Visit) -> Finding:
    """Start our server, or reach the one of ``--base-url``; say what its start-up found."""
    if visit.args.base_url:
        return _reach(visit, visit.args.base_url) or of_status(visit)
    for need, package in (("torch", "PyTorch"), ("sglang", "SGLang")):
        if find_spec(need) is None:
            return _without(visit, f"{package} is not installed")
    subject = visit.subject
    memory, where = _host() if visit.cpu or not visit.cards else _cards(visit)
    if large := too_large(subject, memory, where):
        return _without(visit, large)
    if not subject.path:
        visit.tell(f"writing {subject.name}", None)
        visit.subject = write_weights(subject, visit.folder, "cpu" if visit.cpu else "cuda")
    return _start(visit, OURS) or of_status(visit)


def start_stock(visit: Visit) -> Finding:
    """Stop our server and start stock SGLang with its own defaults, or reach the one of ``--control-url``."""
    reached = visit.client is not None
    visit.stop()
    if visit.args.base_url:
        if not visit.args.control_url:
            return _without(visit, "--base-url names a running server; name an ungated one with --control-url")
        trouble = _reach(visit, visit.args.control_url)
    elif not reached:
        return _without(visit, visit.why_none)
    else:
        trouble = _start(visit, STOCK)
    if trouble:
        return trouble
    assert visit.client is not None
    policy = _policy(visit.client)
    said = "stock SGLang" if policy in (None, "off") else f"policy {policy}"
    return Finding(State.NOTED, f"serves: {said}, which gates nothing", details={"policy": policy})


def _cards(visit: Visit) -> tuple[int, str]:
    """Return the memory of the GPUs that a server is spread over."""
    from sglang_margingate.bench.servers.process import flag_value

    over = flag_value(visit.args.server_flags, "--tp-size", "--tensor-parallel-size", "--tp") or "1"
    used = visit.cards[: int(over)] if over.isdigit() else visit.cards
    return sum(card.memory for card in used), f"{len(used)} GPU{'s' if len(used) > 1 else ''}"


def _host() -> tuple[int | None, str]:
    from sglang_margingate.bench.doctor.machine import host_memory

    return host_memory(), "this machine"


def _without(visit: Visit, why: str) -> Finding:
    visit.why_none = why
    return not_checked(why)


def _reach(visit: Visit, url: str) -> Finding | None:
    from sglang_margingate.bench.options import API_KEY_ENV
    from sglang_margingate.bench.servers.openai_client import connect

    client = connect(url, api_key=os.environ.get(API_KEY_ENV, ""))
    if not isinstance(client, Client):
        return _without(visit, f"{client.base_url} does not speak SGLang's API")
    visit.client = client
    return None


def _start(visit: Visit, mode: str) -> Finding | None:
    """Start a server; return what is wrong where it does not serve."""
    from sglang_margingate.bench.servers.process import serve
    from sglang_margingate.bench.side_by_side.modes import command

    flags = ["--model-path", visit.subject.path, *visit.subject.flags, *visit.args.server_flags]
    made = command(mode, visit.cpu, flags, [], visit.folder / "traces", None)
    timeout = max(1.0, visit.budget.left)
    visit.tell(f"starting {mode}", None)
    context = serve(
        made.flags, log=visit.folder / f"{mode}.log", module=made.module, timeout=timeout,
        progress=lambda _seconds, line: visit.tell(f"starting {mode}: {line[:40]}", None),
    )  # fmt: skip
    try:
        visit.client = visit.serve(context).client
    except ServerError as error:
        visit.why_none = f"the {mode} server did not start: {str(error).partition(' (log: ')[0]}"
        return Finding(State.FAILS, visit.why_none, details={"log": _tail(visit.folder / f"{mode}.log")})
    return None


def _tail(log: Path, lines: int = 25) -> list[str]:
    """Return the end of a server's log, home folders left out before lines are cut."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    return [line[:300] for line in homeless(text).splitlines()[-lines:]]


def _policy(client: Client) -> str | None:
    try:
        return str(client.status().get("policy"))
    except ServerError:
        return None


def of_status(visit: Visit) -> Finding:
    """Return what our server says of itself: hooks, self-test, map, and why it would claim nothing."""
    assert visit.client is not None
    status = visit.client.status()
    test, found = status.get("self_test") or {}, status.get("invariance")
    hooks = _hooks(status)
    parts = [f"{len(hooks)} hooks in place"] if hooks else []
    wrong = list(status.get("notes") or [])
    if test:
        parts.append(f"self-test {'passed' if test['passed'] else 'FAILED'} at {test['rows']} rows")
        wrong += [] if test["passed"] else [f"self-test: {test.get('broken_layer')}"]
    tables = []
    if found is None:
        parts.append("stock fast path, no map")
    else:
        prefill = found.get("prefill")
        parts.append(f"decode {'in class' if found['decode_ok'] else 'NOT in class'} {_brief(decode_sizes(found))}")
        parts.append(f"prefill {prefill or 'NOT repeatable'}")
        wrong += [] if found["decode_ok"] else ["decode is not in the verify's class: gated by margin"]
        wrong += [] if prefill else ["prefill is not the same bits each time"]
        tables.append(_layers(found))
    details = {
        name: status.get(name)
        for name in ("versions", "device", "dtype", "model", "self_test", "invariance", "fast_path", "notes", "logprobs",
                     "fingerprint", "test_knobs", "policy", "threshold")
    }  # fmt: skip
    said = ", ".join(parts) + (f"; {'; '.join(map(str, wrong))}" if wrong else "")
    return Finding(State.FAILS if wrong else State.HOLDS, said, tables, {**details, "hooks": hooks})


def _hooks(status: dict[str, Any]) -> list[str]:
    """Return the hooks that the scheduler found in place, as its run's manifest says."""
    path = (status.get("trace") or {}).get("path")
    try:
        return list(json.loads((Path(path or "") / "manifest.json").read_text())["hooks"])
    except (OSError, ValueError, KeyError):
        return []


def _brief(rows: Any, most: int = 60) -> str:
    text = str(rows)
    return text if len(text) <= most else text[: most - 4] + " ..."


def _layers(found: dict[str, Any]) -> Table:
    from sglang_margingate.bench.cmd_probe import render

    lines = render(found).splitlines()
    return Table("The server's map, as `margingate probe` shows it", (), [(line,) for line in lines])


def prompts_for(visit: Visit) -> list[Prompt]:
    """Return the prompts of the identity check: text for the embedded model, else random token ids."""
    from sglang_margingate.bench.prompts.chosen import prompts_of, rendered
    from sglang_margingate.bench.servers.openai_client import served_model

    assert visit.client is not None
    args, embedded = visit.args, visit.subject.embedded
    dataset = ["arith", "code", "story"] if embedded else [f"{RANDOM}:{args.max_tokens}"]
    limit = -(-args.prompts // 3) if embedded else args.prompts
    asked = argparse.Namespace(
        dataset=dataset, data=[], limit=limit, only=[], seed=0, field=None, server_flags=args.server_flags,
        vocab=args.vocab or visit.subject.vocab, no_template=False, tokenizer=None,
    )  # fmt: skip
    plain = prompts_of(argparse.Namespace(**{**vars(asked), "server_flags": []}))
    return rendered(asked, plain, served_model(visit.client), visit.client)[0]


def _check(visit: Visit, phases: tuple[str, ...]) -> CheckResult:
    from sglang_margingate.bench.servers.gauges import Gauge

    assert visit.client is not None
    args = visit.args
    plan = Plan(phases, repeats=1, concurrency=args.concurrency, max_tokens=args.max_tokens)
    prompts = prompts_for(visit)
    return run_check(
        visit.client,
        prompts,
        plan,
        Gauge(visit.client.base_url),
        lambda label, total: visit.tell(label, total),
        visit.done,
    )


def identity(visit: Visit) -> Finding:
    """Compare prompts alone with the same ones in batches, on our server."""
    if visit.client is None:
        return not_checked(visit.why_none)
    return of_check(_check(visit, PHASES), expect_fail=False)


def control(visit: Visit) -> Finding:
    """The same on stock, which must fail it: else these prompts, or this machine, cannot tell."""
    if visit.client is None:
        return not_checked(visit.why_none)
    return of_check(_check(visit, PHASES[:2]), expect_fail=True)


def of_check(result: CheckResult, expect_fail: bool) -> Finding:
    """Return what a check says; the negative control holds where outputs changed."""
    verdict = judge(result, expect_fail)
    claims = ", ".join(f"{k} {v:,}" for k, v in result.guarantees.most_common())
    said = verdict.reason + (f" (labels: {claims})" if claims and not expect_fail else "")
    if expect_fail:
        said = f"the ungated server: {said}"
        if verdict.code == FAIL:
            said += ": it could not be shown here that a batch changes anything"
    rows = [
        (p.name, p.requests, result.runs.against_first(p.name)[0], p.proof.largest if p.proof.by_rows else "-")
        for p in result.phases.values()
    ]
    title = "Negative control, phase by phase" if expect_fail else "Identity, phase by phase"
    table = Table(title, ("phase", "requests", "changed", "largest batch"), [*rows])
    details = to_dict(result, Verdict(*verdict), ["margingate", "check"], {})
    return Finding(_state(result, verdict, expect_fail), said, [table], details)


def _state(result: CheckResult, verdict: Verdict, expect_fail: bool) -> State:
    if verdict.code == PASS:
        return State.HOLDS
    if result.error and not result.runs.changed():
        return State.CUT if result.error == "interrupted" else State.NOT_CHECKED
    # A control that changes nothing proves nothing, and an unproven batch neither; only changed outputs of ours are wrong.
    return State.FAILS if verdict.code == FAIL and not expect_fail else State.NOT_CHECKED


def cost(visit: Visit) -> Finding:
    """Measure a decode step by batch size on the server that runs."""
    from sglang_margingate.bench.evidence import decode_cost

    if visit.client is None:
        return not_checked(visit.why_none)
    vocab = visit.args.vocab or visit.subject.vocab
    if vocab is None:
        return not_checked("the vocabulary is not known here; give its size with --vocab")
    cpu = visit.cpu
    to = decode_cost.Target(visit.client.base_url, vocab)
    batches = [b for b in BATCHES[cpu] if b <= visit.args.concurrency]
    visit.tell("decode steps", None)
    found = decode_cost.cost(to, ["stock"], batches, CONTEXT[cpu], NEW, REPEATS)["stock"]
    # Where no moment had every request decoding, the time between a request's tokens stands in.
    seen = {
        rows: [r["tpot_p50_ms"] if math.isnan(r["step_ms"]) else r["step_ms"] for r in runs]
        for rows, runs in found.items()
    }
    steps = {rows: sound(ms) for rows, ms in seen.items()}
    name = STOCK if OURS in visit.costs else OURS
    visit.costs[name] = steps
    said = ", ".join(f"{statistics.median(ms):.2f} ms at {rows}" for rows, ms in steps.items())
    details = {"context": CONTEXT[cpu], "new": NEW, "repeats": REPEATS, "step_ms": seen}
    if name == OURS:
        return Finding(State.NOTED, f"a decode step with our defaults: {said}", details=details)
    return compared(visit.costs, said, details)


def sound(ms: list[float]) -> list[float]:
    """Leave out repeats whose tokens came all at once: the client was late to read them, and that is no time of a step."""
    return [x for x in ms if x >= LATE * max(ms)]


def compared(costs: dict[str, dict[str, list[float]]], said: str, details: dict[str, Any]) -> Finding:
    """Return our step against stock's."""
    rows: list[tuple[object, ...]] = []
    ratios = {}
    for batch, stock in costs[STOCK].items():
        ours = costs[OURS][batch]
        ratios[batch] = statistics.median(ours) / statistics.median(stock)
        rows.append((batch, *(_span(ms) for ms in (ours, stock)), f"{ratios[batch]:.2f}"))
    table = Table("A decode step, ms (min to max)", ("batch", "ours", "stock", "of stock's"), rows)
    dropped = REPEATS * 2 * len(rows) - sum(len(ms) for steps in (costs[OURS], costs[STOCK]) for ms in steps.values())
    left_out = f"; {dropped} repeats whose tokens came all at once are left out" if dropped > 0 else ""
    if any(max(ms) > QUIET * min(ms) for steps in (costs[OURS], costs[STOCK]) for ms in steps.values()):
        left_out += "; repeats lie far apart, so something else used the machine meanwhile"
    text = ", ".join(f"{ratio:.2f} at {batch}" for batch, ratio in ratios.items())
    return Finding(
        State.NOTED, f"our step is {text} of stock's, by batch{left_out}", [table], {**details, "ratios": ratios}
    )


def _span(ms: list[float]) -> str:
    return f"{statistics.median(ms):.2f} ({min(ms):.2f} to {max(ms):.2f})"
