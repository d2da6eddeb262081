"""Every number of every page, computed again with plain pandas from the Parquet files, on runs of every kind.

Nothing of the dashboard, the gate or the reader is used on the right-hand side of a comparison.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta

pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
pytest.importorskip("margingate_dashboard", reason="the package is not installed (pip install -e .)")

import pyarrow.parquet as pq
from dashboard_app import open_app
from margingate_dashboard.tables import MOST_FLIPS
from streamlit.testing.v1 import AppTest
from synthetic_runs import SyntheticSpec, write_run

SAMPLE = Path(__file__).resolve().parents[2] / "traces" / "sample"
RUNS: dict[str, SyntheticSpec | Path] = {
    "sample": SAMPLE,
    "demo": SyntheticSpec(requests=48, tokens=60, mix=("log", "log", "gate", "gate"), threshold=0.0625),
    "always": SyntheticSpec(requests=24, tokens=80, policy="always"),
    "log": SyntheticSpec(requests=12, tokens=80, policy="log"),
    "canonical": SyntheticSpec(requests=24, tokens=80, structural=1.0, perturbation=0.0, audit_rate=0.02),
    "mixed": SyntheticSpec(requests=36, tokens=80, mix=("gate", "always", "log"), structural=0.2, sampled=3),
    "million": SyntheticSpec(requests=5952, tokens=170, slots=64, files=20, mix=("gate", "always", "log"), seed=3),
}
COLOURS = {"gate": "#648FFF", "always": "#785EF0", "log": "#FFB000", "off": "#FE6100", "not observed": "#8C96A3"}
ORDER = ["gate", "always", "log", "off", "not observed"]


class Truth:
    """A run's rows, as Parquet holds them."""

    def __init__(self, folder: Path) -> None:
        steps, requests = (
            pd.concat(
                [pq.read_table(f).to_pandas() for f in sorted(folder.glob(f"{kind}-*.parquet"))], ignore_index=True
            )
            for kind in ("steps", "requests")
        )
        for name in ("dataset", "policy", "guarantee", "finish_reason"):
            requests[name] = requests[name].astype(str)
        requests.loc[(requests["steps"] == 0) & (requests["policy"] != "off"), "policy"] = "not observed"
        for name in ("triggered", "flipped", "repaired", "prefill", "structural"):
            steps[name] = steps[name].fillna(False).astype(bool)
        steps["reason"] = steps["reason"].astype(str)
        steps["dataset"] = steps["dataset"].astype(str)
        steps["policy"] = steps["request"].map(dict(zip(requests["request"], requests["policy"])))
        self.every, self.requests = steps, requests
        self.decode = steps[~steps["prefill"]]
        self.policy = next(p for p in ORDER if (requests["policy"] == p).any())

    def counts(self, policy: str, dataset: str | None = None) -> dict[str, Any]:
        steps, requests = self.decode, self.requests
        if dataset is not None:
            steps, requests = steps[steps["dataset"] == dataset], requests[requests["dataset"] == dataset]
        steps, requests = steps[steps["policy"] == policy], requests[requests["policy"] == policy]
        seen = steps["reason"] != "none"
        sample = steps[seen & ~steps["triggered"] & ~steps["reason"].isin(["resume", "limit"])]
        above = int(sample["flipped"].sum())
        return {
            "requests": len(requests),
            "output tokens": int(requests["output_tokens"].sum()),
            "decode steps": len(steps),
            "low margins": int(steps["triggered"].sum()),
            "verified": int(seen.sum()),
            "flips": int(steps["flipped"].sum()),
            "repaired": int((steps["flipped"] & steps["repaired"]).sum()),
            "above tau": above,
            "missed": int((sample["flipped"] & ~sample["repaired"]).sum()),
            "examined": len(sample),
            "untriggered": int((~steps["triggered"]).sum()),
            "bound": 100 * upper(above, len(sample)),
            "overhead": 100 * requests["overhead_ms"].sum() / requests["e2e_ms"].sum() if len(requests) else None,
            "median TTFT": requests["ttft_ms"].median(),
            "median TPOT": requests["tpot_ms"].median(),
            "claims": int(requests["guarantee"].isin(["structural", "verified", "gated"]).sum()),
        }


def upper(events: int, trials: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided bound, by scipy's own beta distribution."""
    return 1.0 if events >= trials else float(beta.ppf(confidence, events + 1, trials - events))


def figures(at: AppTest) -> dict[str, list[dict[str, Any]]]:
    """The traces of each figure of the page, by its key."""
    found = {}
    for chart in at.get("plotly_chart"):
        name = re.sub(r"^\$\$ID-[0-9a-f]+-(chart-)?", "", chart.proto.id)
        found[name] = [
            {**d, "x": numbers(d.get("x")), "y": numbers(d.get("y"))} for d in json.loads(chart.proto.spec)["data"]
        ]
    return found


def numbers(drawn: Any) -> Any:
    """A trace's values; Plotly packs arrays of numbers."""
    if isinstance(drawn, dict):
        flat = np.frombuffer(base64.b64decode(drawn["bdata"]), dtype=drawn["dtype"])
        return flat.reshape([int(n) for n in str(drawn.get("shape", -1)).split(",")]).tolist()
    return drawn


def bars(traces: list[dict[str, Any]]) -> dict[str, float]:
    """The sum of each bar trace, by the first word of its name."""
    return {str(d["name"]).split()[0]: float(np.nansum(d["y"])) for d in traces if d["type"] == "bar"}


class Shown:
    """What one page shows: cards as (value, sub) by label, and tables."""

    def __init__(self, at: AppTest) -> None:
        self.at = at
        body = "\n".join(h.proto.body for h in at.get("html"))
        found = re.findall(
            r'<div class="label">(.*?)</div><div class="value">(.*?)</div><div class="sub">(.*?)</div>', body, re.DOTALL
        )
        self.cards = {label: (html.unescape(value), html.unescape(sub)) for label, value, sub in found}
        self.said = body + "\n".join(c.value for c in at.caption)

    def table(self, *columns: str) -> pd.DataFrame:
        return next(t.value for t in self.at.dataframe if set(columns) <= set(t.value.columns))


def whole(text: str) -> list[int]:
    """The whole numbers of a text, in order."""
    return [int(n.replace(",", "")) for n in re.findall(r"(?<![\d.])\d[\d,]*(?![\d.]*\d*%)(?!\.\d)", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("numbers")
    for name, source in RUNS.items():
        if isinstance(source, Path):
            shutil.copytree(source, made / name)
        else:
            write_run(made / name, source)
    return made


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, Truth]:
    return {name: Truth(folder / name) for name in RUNS}


@pytest.fixture
def app(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    return open_app(folder, monkeypatch)


def visit(app: AppTest, page: str, run: str, **more: str) -> Shown:
    app.query_params["run"] = run
    for key, value in more.items():
        app.query_params[key] = value
    app.switch_page(f"{page}.py").run()
    assert not app.exception
    assert not app.error
    return Shown(app)


def same(shown: object, true: object) -> bool:
    if true is None or (isinstance(true, float) and np.isnan(true)):
        return shown is None or bool(pd.isna(shown))
    return float(shown) == pytest.approx(float(true), rel=1e-6)  # type: ignore[arg-type]


def bounds(shown: object, true: object) -> bool:
    """Whether a bound is shown with four places, rounded up."""
    if true is None or shown is None or pd.isna(shown):
        return same(shown, true)
    return bool(float(true) * (1 - 1e-9) <= float(shown) <= float(true) + 1.01e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("run", RUNS)
def test_overview(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    truth, page = truths[run], visit(app.run(), "overview", run)
    policy = truth.policy
    true = truth.counts(policy)
    assert page.cards["Requests finished"][0] == f"{true['requests']:,}"
    assert whole(page.cards["Requests finished"][1])[0] == true["output tokens"]
    low = page.cards["Would trigger" if policy == "log" else "Trigger rate"]
    assert whole(low[1])[:2] == [true["low margins"], true["decode steps"]]
    assert float(low[0].rstrip("%")) == pytest.approx(100 * true["low margins"] / true["decode steps"], abs=0.006)
    if policy in ("gate", "always"):
        assert page.cards["Flips"][0] == f"{true['flips']:,}"
        assert whole(page.cards["Repaired"][0] + " " + page.cards["Repaired"][1])[:3] == [
            true["repaired"],
            true["repaired"],
            true["flips"],
        ]
        assert page.cards["Missed flips"][0] in (f"{true['missed']:,}", "unknown", "n/a")
    if policy == "gate":
        assert whole(page.cards["Missed flips"][1])[:2] == [true["above tau"], true["examined"]]
        bound = float(re.findall(r"([\d.]+)%", page.cards["Missed flips"][1])[0])
        assert true["bound"] <= bound + 1e-9 < true["bound"] * 1.1 + 0.01, "rounded up, so that it stays a bound"
    if policy == "always":
        assert whole(page.cards["Missed flips"][1])[:2] == [true["above tau"], true["flips"]]
        assert page.cards["Missed flips"][0] == "0", "always misses none"
    assert float(page.cards["Overhead"][0].rstrip("%")) == pytest.approx(true["overhead"], abs=0.006)
    assert whole(page.cards["With a guarantee"][1])[:2] == [true["claims"], true["requests"]]
    policies = [p for p in ORDER if (truth.requests["policy"] == p).any()]
    if len(policies) > 1:
        table = page.table("policy", "audited", "low margins")
        assert table["policy"].tolist() == policies
        for _, row in table[~table.get("dataset", pd.Series(False, index=table.index)).astype(bool)].iterrows():
            compare_counts(row, truth.counts(row["policy"]))
    drawn, flips = figures(app), truth.decode[truth.decode["flipped"]]
    counted = bars(drawn["over-time"])
    assert sum(counted.values()) == len(flips)
    assert counted["repaired"] == int(flips["repaired"].sum())
    guarantees = {d["name"].split()[0]: d["x"][0] for d in drawn["guarantees"]}
    assert guarantees == truth.requests["guarantee"].value_counts().to_dict()
    reasons: dict[str, int] = {}
    for times, label in re.findall(r"([\d,]+) / [\d,]+ requests are (\w+):", page.said.replace("\\", "")):
        reasons[label] = reasons.get(label, 0) + int(times.replace(",", ""))
    assert reasons == guarantees, "each request's label is given with what it stands on, or why it has none"
    so_far = {d["name"]: d["y"][-1] for d in drawn["so-far"]}
    assert same(so_far["overhead"], true["overhead"]), "at the end it is that of the whole run"
    assert ("missed at most" in so_far) == (policy == "gate" and true["examined"] > 0)
    if "missed at most" in so_far:
        assert same(so_far["missed at most"], true["bound"])
    by_dataset = page.table("dataset", "policy", "decode steps")
    for _, row in by_dataset.iterrows():
        compare_counts(row, truth.counts(row["policy"], "" if row["dataset"] == "(untagged)" else row["dataset"]))
    assert by_dataset["requests"].sum() == len(truth.requests)


def compare_counts(row: pd.Series, true: dict[str, Any]) -> None:
    policy = row["policy"]
    verifies = policy in ("gate", "always")
    for name in (
        "requests",
        "output tokens",
        "decode steps",
        "low margins",
        "verified",
        "overhead",
        "median TTFT",
        "median TPOT",
    ):
        assert same(row[name], true[name]), (policy, name, row[name], true[name])
    for name in ("flips", "repaired", "above tau", "missed"):
        assert same(row[name], true[name] if verifies else None), (policy, name)
    steps = true["decode steps"]
    assert same(row["trigger rate"], 100 * true["low margins"] / steps if steps else None)
    assert same(row["flips per 1,000 steps"], 1000 * true["flips"] / steps if steps and verifies else None)
    assert bounds(row["missed at most (95%)"], true["bound"] if policy == "gate" and true["examined"] else None)
    if policy == "gate":
        assert whole(row["audited"]) == [true["examined"], true["untriggered"]]


@pytest.mark.parametrize("run", RUNS)
def test_identity(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    """The answer alone (or of the smallest batch) against every other answer of the same prompt, within a policy."""
    truth = truths[run]
    page = visit(app.run(), "overview", run)
    rows = truth.requests[truth.requests["policy"] != "not observed"].sort_values(
        ["max_batch_rows", "time"], kind="stable"
    )
    for policy, mine in rows.groupby("policy"):
        mine = mine.assign(answer=mine["output_digest"] + mine["finish_reason"])
        counts = mine.groupby("prompt_digest")["answer"].agg(["size", "nunique"])
        twice = counts[counts["size"] > 1]
        if twice.empty:
            continue
        table = page.table("policy", "all batches")
        shown = table.loc[table["policy"] == policy, "all batches"].iloc[0]
        # Every other answer equals the reference exactly where there is one answer.
        assert whole(shown) == [int((twice["nunique"] == 1).sum()), len(twice)], policy
        assert f"{policy} {shown}" in html.unescape(page.said)


@pytest.mark.parametrize("run", RUNS)
def test_runs_and_requests(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    truth = truths[run]
    true = truth.counts(truth.policy)
    page = Shown(app.run())
    requests = sum(len(t.requests) for t in truths.values())
    assert page.cards["Requests finished"][0] == f"{requests:,}"
    assert page.cards["Steps recorded"][0] == f"{sum(len(t.every) for t in truths.values()):,}"
    assert page.cards["Flips confirmed"][0] == f"{sum(int(t.decode['flipped'].sum()) for t in truths.values()):,}"
    seen = sum(int((t.decode["reason"] != "none").sum()) for t in truths.values())
    assert whole(page.cards["Flips confirmed"][1])[-1] == seen
    row = page.table("run", "rates of").set_index("run").loc[run]
    assert row["rates of"] == truth.policy
    assert row["requests"] == len(truth.requests)
    assert row["steps"] == len(truth.every)
    for shown, name in (
        ("decode steps", "decode steps"),
        ("triggers", "low margins"),
        ("verified", "verified"),
    ):
        assert row[shown] == true[name], shown
    assert same(row["flips"], true["flips"] if truth.policy in ("gate", "always") else None)
    assert same(row["overhead"], true["overhead"])
    if truth.policy == "gate":
        assert whole(row["missed (95% bound)"])[:2] == [true["missed"], true["examined"]]
    page = visit(app, "requests", run)
    assert whole(page.cards["Requests"][1]) == [len(truth.requests), len(truth.requests)]
    assert page.cards["Output tokens"][0] == f"{int(truth.requests['output_tokens'].sum()):,}"
    flipped = truth.decode.loc[truth.decode["flipped"], "request"]
    assert whole(page.cards["With a flip"][0] + " " + page.cards["With a flip"][1]) == [flipped.nunique(), len(flipped)]
    listed = page.table("number", "lowest margin").set_index("number")
    assert len(listed) == len(truth.requests)
    lowest = truth.decode.groupby("request")["margin"].min()
    every = truth.requests.set_index("request").loc[listed.index]
    assert (listed["policy"] == every["policy"]).all()
    for shown, true_values in (
        ("flips", every["flips"].where(every["policy"].isin(["gate", "always"]))), ("low margins", every["triggers"]), ("verified", every["verified"]),
        ("output tokens", every["output_tokens"]), ("cached", every["cached_tokens"]), ("TTFT", every["ttft_ms"]),
        ("TPOT", every["tpot_ms"]), ("end to end", every["e2e_ms"]), ("overhead", 100 * every["overhead_share"]),
        ("lowest margin", lowest.reindex(listed.index)), ("largest batch", every["max_batch_rows"]),
    ):  # fmt: skip
        assert listed[shown].astype(float).to_numpy() == pytest.approx(
            true_values.astype(float).to_numpy(), nan_ok=True
        ), shown


@pytest.mark.parametrize("run", RUNS)
def test_flips(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    truth, page = truths[run], visit(app.run(), "flips", run)
    steps = truth.decode[truth.decode["policy"].isin(["gate", "always"])]
    seen, flips = steps["reason"] != "none", steps["flipped"]
    above = steps[seen & ~steps["triggered"] & ~steps["reason"].isin(["resume", "limit"])]
    assert whole(page.cards["Flips"][0]) == [int(flips.sum())]
    assert whole(page.cards["Flips"][1])[-2:] == [int(seen.sum()), len(steps)]
    assert whole(page.cards["Repaired"][0]) == [int((flips & steps["repaired"]).sum())]
    assert whole(page.cards["Above tau"][0]) == [int(above["flipped"].sum())]
    assert whole(page.cards["Above tau"][1]) == [len(above)]
    touched = steps.loc[flips, "request"].nunique()
    assert whole(page.cards["Requests with a flip"][1]) == [touched, steps["request"].nunique()]
    if not flips.any():
        return
    listed = page.table("fast token", "above tau")
    assert len(listed) == min(int(flips.sum()), MOST_FLIPS)
    assert listed["margin"].tolist() == sorted(steps.loc[flips, "margin"], reverse=True)[:MOST_FLIPS]
    drawn = figures(app)
    for name in ("by-step", "by-class", "by-margin", "by-batch"):
        texts = next(d["text"] for d in drawn[name] if d.get("mode") == "text")
        assert sum(whole(t)[0] for t in texts) == int(flips.sum()), name
        assert sum(whole(t)[1] for t in texts) == len(steps), "a step where no flip can be seen is in no denominator"
    rates = dict(zip(*(next(d for d in drawn["by-batch"] if d.get("mode") == "text")[k] for k in ("y", "x"))))
    for label, rate in rates.items():
        ends = [int(n) for n in str(label).split("–")]
        inside = steps["batch_rows"].between(ends[0], ends[-1])
        assert same(rate, 1000 * float((flips & inside).sum()) / int(inside.sum())), label


@pytest.mark.parametrize("run", RUNS)
def test_latency(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    truth, page = truths[run], visit(app.run(), "latency", run)
    mine = truth.requests[truth.requests["policy"] == truth.policy]
    for label, column in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms")):
        assert float(page.cards[label][0].split()[0].replace(",", "")) == pytest.approx(mine[column].median(), abs=0.06)
        assert whole(page.cards[label][1])[:2] == [int(mine[column].notna().sum()), len(mine)]
    assert float(page.cards["Overhead"][0].rstrip("%")) == pytest.approx(
        truth.counts(truth.policy)["overhead"], abs=0.006
    )
    assert whole(page.cards["Requests with overhead"][1])[:2] == [int((mine["overhead_ms"] > 0).sum()), len(mine)]
    steps = truth.decode[truth.decode["policy"] == truth.policy]
    assert float(page.cards["Decode step"][0].split()[0]) == pytest.approx(steps["step_ms"].median(), abs=0.06)
    table = page.table("of", "p99")
    for _, row in table.iterrows():
        column, scale = {
            "TTFT, ms": ("ttft_ms", 1), "TPOT, ms": ("tpot_ms", 1), "end to end, ms": ("e2e_ms", 1),
            "overhead, ms": ("overhead_ms", 1), "overhead, %": ("overhead_share", 100),
        }[row["of"]]  # fmt: skip
        values = truth.requests.loc[truth.requests["policy"] == row["policy"], column].dropna() * scale
        assert row["requests"] == len(values)
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
            assert same(row[name], values.quantile(q)), (row["of"], row["policy"], name)
    drawn = figures(app)
    for figure, column, waited in (("step-time", "step_ms", False), ("verify-time", "verify_ms", True)):
        for line in (d for d in drawn[figure] if d["name"].endswith((", median", ", p95"))):
            policy, measure = line["name"].split(", ")
            those = truth.decode[(truth.decode["policy"] == policy) & ((truth.decode["verify_ms"] > 0) | (not waited))]
            q = those.groupby("batch_rows")[column].quantile(0.5 if measure == "median" else 0.95)
            assert line["x"] == q.index.tolist()
            assert line["y"] == pytest.approx(q.tolist(), rel=1e-5), (figure, policy, measure)
    for figure, column, scale in (("tpot", "tpot_ms", 1), ("ttft", "ttft_ms", 1), ("overhead", "overhead_share", 100)):
        for line in drawn[figure]:
            policy = line["name"].split(" (")[0]
            values = np.sort(truth.requests.loc[truth.requests["policy"] == policy, column].dropna() * scale)
            assert f"({len(values):,} requests" in line["name"]
            assert line["line"]["color"] == COLOURS[policy], "a policy's colour is the same in every run"
            assert (line["x"][0], line["x"][-1], line["y"][-1]) == pytest.approx((values[0], values[-1], 100))
            if len(values) <= 500:  # of many, some are drawn
                shares = {x: y for x, y in zip(line["x"], line["y"])}  # among equal ones the last
                assert list(shares.values()) == pytest.approx([100 * (values <= x).mean() for x in np.unique(values)])
    paid = truth.decode[(truth.decode["reason"] != "none") & (truth.decode["window_rows"] > 0)]
    cost = {d["name"]: dict(zip(d["x"], d["y"])) for d in drawn["verify-cost"]}
    if len(paid):
        assert cost["median"] == pytest.approx(paid.groupby("window_rows")["verify_ms"].median().to_dict(), rel=1e-5)
    assert bool(cost) == bool(len(paid))


@pytest.mark.parametrize("run", RUNS)
def test_margins(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    truth, page = truths[run], visit(app.run(), "margins", run)
    tau = float(truth.decode["threshold"].mode().iloc[0])
    assert float(page.cards["Threshold (tau)"][0]) == pytest.approx(tau), "the threshold in force can be chosen"
    gated = truth.decode["margin"].where(~truth.decode["structural"], np.inf)
    assert whole(page.cards["Would trigger"][1]) == [int((gated <= tau).sum()), len(truth.decode)]
    flips = truth.decode[truth.decode["flipped"]]
    missed = int(((flips["margin"] > tau) | flips["structural"]).sum())
    assert page.cards["Flips missed"][0] == f"{missed:,}"
    assert whole(page.cards["Flips caught"][1]) == [len(flips) - missed, len(flips)]
    by_dataset = page.table("would trigger", "known flips").set_index("dataset")
    for name, mine in truth.decode.groupby("dataset"):
        row, lost = (
            by_dataset.loc[name or "(untagged)"],
            mine["flipped"] & ((mine["margin"] > tau) | mine["structural"]),
        )
        assert [row[c] for c in ("decode steps", "would trigger", "known flips", "missed")] == [
            len(mine), int((gated[mine.index] <= tau).sum()), int(mine["flipped"].sum()), int(lost.sum()),
        ]  # fmt: skip
    leading = truth.decode[truth.decode["policy"] == truth.policy].assign(gated=gated)
    for name, mine in [(None, leading), *leading.groupby("dataset")]:
        true = missed_at_most(mine, tau)
        if name is not None:
            shown = by_dataset.loc[name or "(untagged)"]
            assert bounds(shown["missed at most (95%)"], 100 * true if true < 1 else None)
            complete = not (mine["reason"].eq("none") & (mine["gated"] > tau)).any()
            assert shown[f"known, policy {truth.policy}"] == ("exactly" if complete else "where verified")
        elif true < 1:
            said = float(re.search(r"at most ([\d.]+)%", page.cards["Flips missed"][1])[1])  # type: ignore[index]
            assert 100 * true <= said * 1.0000001, "rounded up"
            assert said == pytest.approx(100 * true, rel=0.11)
        else:
            assert "known ones only" in page.cards["Flips missed"][1]
    heights = sum(
        sum(row[0] for row in numbers(d["customdata"])[:-1]) for d in figures(app)["margins"] if "customdata" in d
    )
    assert heights == len(truth.decode), "every decode step is in one bin"


def missed_at_most(mine: pd.DataFrame, tau: float) -> float:
    """Bound at 95% of the flips that a threshold misses, per step: counted where verified, by the audited ones elsewhere."""
    above = mine[mine["gated"] > tau]
    chance = above[~above["triggered"] & (above["reason"] != "none") & ~above["reason"].isin(["resume", "limit"])]
    hidden = int((above["reason"] == "none").sum())
    if not hidden:
        return upper(int(above["flipped"].sum()), len(mine))
    if not len(chance):
        return 1.0
    known = int(above["flipped"].sum()) - int(chance["flipped"].sum())
    rate = upper(int(chance["flipped"].sum()), len(chance))
    return min(1.0, (known + rate * (len(chance) + hidden)) / len(mine))


TARGETS = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def choose(mine: pd.DataFrame, miss: float, confidence: float = 0.95) -> tuple[float, float, bool]:
    """Threshold, bound and whether the target is shown, of the sample alone."""
    n, allowed = len(mine), 0
    while miss and upper(allowed + 1, n, confidence) <= miss:
        allowed += 1
    shown = not miss or upper(0, n, confidence) <= miss
    at_flips = np.sort(mine.loc[mine["flipped"], "margin"].to_numpy())[::-1]
    tau = float(at_flips[allowed]) if allowed < at_flips.size else 0.0
    return tau, upper(allowed if shown else 0, n, confidence), shown


def knee(mine: pd.DataFrame) -> tuple[float, float]:
    """Threshold and bound furthest from the line between the dearest and the riskiest target, on a scale of logarithms."""
    every = [choose(mine, t, 1 - 0.05 / len(TARGETS)) for t in TARGETS]
    every = [(tau, bound) for tau, bound, shown in every if shown]
    x = np.array([float((mine["margin"] <= tau).mean()) for tau, _ in every])
    y = np.log10([bound for _, bound in every])
    if len(every) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return every[0]
    return every[int(np.argmin((x - x.min()) / np.ptp(x) + (y - y.min()) / np.ptp(y)))]


def price(steps: pd.DataFrame) -> tuple[float, int, np.ndarray, float, float]:
    """What a step without verifies takes, its rows, the line of a verify's time over its window, and the longest window."""
    timed = steps[steps["step_ms"].notna()]
    waited = timed["verify_ms"].fillna(0)
    fast, rows = float((timed["step_ms"] - waited).median()), max(1, int(timed["batch_rows"].median()))
    paid = timed[(timed["reason"] != "none") & (waited > 0) & (timed["window_rows"] > 0)]
    by_window = paid.groupby("window_rows")["verify_ms"].agg(["median", "size"])
    line = (
        np.polyfit(by_window.index, by_window["median"], 1, w=np.sqrt(by_window["size"]))
        if len(by_window) > 1
        else np.array([0.0, 0.0])
    )
    if line[0] <= 0:
        line = np.array([0.0, float(paid["verify_ms"].median())])
    return fast, rows, line, float(by_window.index.min()), float(by_window.index.max())


def predicted(paid: tuple[float, int, np.ndarray, float, float], share: float) -> tuple[float, float, float]:
    """Time of a step, share of it for verifies, and tokens a second, where this share of steps triggers."""
    fast, rows, line, shortest, longest = paid
    window = min(max(1 / share, shortest), longest) if share else 0.0
    step = fast + (1 - (1 - share) ** rows) * float(np.polyval(line, window)) * bool(share)
    return step, (step - fast) / step, 1000 * rows / step


@pytest.mark.parametrize("run", ["sample", "always", "mixed", "million"])
@pytest.mark.parametrize("target", ["knee", "none missed", "0.01"])
def test_tuning(app: AppTest, truths: dict[str, Truth], run: str, target: str) -> None:
    truth, page = truths[run], visit(app.run(), "tuning", run, target=target)
    steps = truth.decode[~truth.decode["structural"]]
    whole_requests = steps.groupby("request")["reason"].apply(lambda r: (r != "none").all())
    inside = steps["request"].isin(whole_requests[whole_requests].index)
    sample, outside = steps[inside], steps[~inside & steps["flipped"]]
    table = page.table("threshold", "known flips above").set_index("dataset")
    assert set(table.index) == set(sample["dataset"])
    for dataset, mine in sample.groupby("dataset"):
        row, n = table.loc[dataset], len(mine)
        miss = 0.0 if target in ("knee", "none missed") else float(target)
        tau, bound = knee(mine) if target == "knee" else choose(mine, miss)[:2]
        known = outside.loc[outside["dataset"] == dataset, "margin"]
        assert row["from the sample"] == pytest.approx(tau)
        tau = max(tau, float(known.max()) if len(known) else 0.0)  # a flip that is known of may not be missed
        assert row["threshold"] == pytest.approx(tau)
        assert (row["steps"], row["triggered"]) == (n, int((mine["margin"] <= tau).sum()))
        assert row["missed"] == int((mine["flipped"] & (mine["margin"] > tau)).sum())
        assert bounds(row["missed at most (95%)"], 100 * bound)
        assert row["known flips above"] == 0
    worst = max(float(v) for v in table["missed at most (95%)"])
    assert float(page.cards["Worst miss bound"][0].rstrip("%")) == pytest.approx(worst, rel=0.02, abs=0.011)
    least, most = re.findall(r"thresholds ([\d.e-]+) to ([\d.e-]+)", page.cards["Datasets"][1])[0]
    assert (float(least), float(most)) == pytest.approx((table["threshold"].min(), table["threshold"].max()), rel=1e-5)
    paid = price(truth.decode)
    for _, row in table.iterrows():
        step, overhead, speed = predicted(paid, row["trigger rate"] / 100)
        assert (row["ms a token"], row["overhead"], row["tokens/s"]) == pytest.approx(
            (step, 100 * overhead, speed), rel=1e-4
        )
    stars = [d for d in figures(app)["trade-off"] if d.get("marker", {}).get("size") == 15]
    drawn = sorted((d["x"][0], d["y"][0]) for d in stars)
    assert drawn == [
        pytest.approx(p, abs=1.01e-4)
        for p in sorted(zip(table["trigger rate"].tolist(), table["missed at most (95%)"].tolist()))
    ]
    for text in [c.value for c in app.code if "miss_upper_95" in c.value]:
        for name, entry in json.loads(text)["datasets"].items():
            assert bounds(table.loc[name, "missed at most (95%)"], 100 * entry["miss_upper_95"])
            assert entry["threshold"] == pytest.approx(table.loc[name, "threshold"])


def test_a_threshold_set_by_hand_below_a_known_flip_is_warned_of(app: AppTest, truths: dict[str, Truth]) -> None:
    page = visit(app.run(), "tuning", "sample", target="none missed", taus="arith:0.001,story:0.001")
    table = page.table("threshold", "known flips above").set_index("dataset")
    said = [w.value for w in app.warning]
    for name in ("arith", "story"):
        assert table.loc[name, "threshold"] == 0.001
        assert any(name in w and "set by hand" in w for w in said) == bool(table.loc[name, "known flips above"])
    assert table.loc["arith", "known flips above"] > 0


def test_compare(app: AppTest, truths: dict[str, Truth]) -> None:
    page = visit(app.run(), "compare", "mixed", other="demo")
    a, b = truths["mixed"], truths["demo"]
    table = page.table("policy_a", "policy_b", "identical")
    assert not [t for t in app.toggle if t.key == "only"], "all of them diverge: there is nothing to leave out"
    assert set(table["identical"]) <= {"yes", "no"}
    table = table.assign(identical=table["identical"] == "yes")
    assert not set(table["a"]) & set(a.requests.loc[a.requests["policy"] == "not observed", "request"]), (
        "it has no tokens to compare"
    )
    tokens = [t.every.sort_values("step").groupby("request")["token"].apply(tuple) for t in (a, b)]
    policies = [dict(zip(t.requests["request"], t.requests["policy"])) for t in (a, b)]
    for _, row in table.iterrows():
        x, y = tokens[0][row["a"]], tokens[1][row["b"]]
        assert row["identical"] == (x == y)
        assert (row["policy_a"], row["policy_b"]) == (policies[0][row["a"]], policies[1][row["b"]])
        first = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), None if x == y else min(len(x), len(y)))
        assert same(row["first"], None if first is None else float(first))
    assert whole(page.cards["Identical sequences"][1]) == [int(table["identical"].sum()), len(table)]
    apart = table.loc[~table["identical"], "first"].astype(float)
    assert page.cards["Median first divergence"][0] == f"step {np.median(apart):,.6g}"
    split = page.table("policy a", "policy b", "matched")
    counted = table.groupby(["policy_a", "policy_b"])["identical"].agg(["size", "sum"])
    for _, row in split.iterrows():
        size, equal = counted.loc[(row["policy a"], row["policy b"])].tolist()
        assert [row["matched"], row["identical"]] == [size, equal]
        assert bounds(row["differ at most (95%)"], 100 * upper(size - equal, size))
    times = page.table("of", "median of b − a").set_index("of")
    left, right = (t.requests.set_index("request") for t in (a, b))
    for name, column in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("end to end", "e2e_ms")):
        x, y = left.loc[table["a"], column].to_numpy(), right.loc[table["b"], column].to_numpy()
        known = np.isfinite(x) & np.isfinite(y)
        assert times.loc[name, "pairs"] == known.sum()
        shown = times.loc[name, ["median a", "median b", "median of b − a"]].astype(float).tolist()
        assert shown == pytest.approx([np.median(v[known]) for v in (x, y, y - x)], rel=1e-5)
        assert times.loc[name, "95% from"] <= times.loc[name, "median of b − a"] <= times.loc[name, "to"]


@pytest.mark.parametrize("run", ["sample", "mixed", "million"])
def test_request(app: AppTest, truths: dict[str, Truth], run: str) -> None:
    truth = truths[run]
    for number in (
        *truth.requests["request"].head(2),
        *truth.requests.loc[truth.requests["policy"] == "not observed", "request"].head(1),
    ):
        request = truth.requests[truth.requests["request"] == number].iloc[-1]
        page = visit(app.run(), "request", run, request=str(request["request_id"]), number=str(number))
        mine = truth.decode[truth.decode["request"] == number]
        if mine.empty:
            assert "No step of this request was observed" in page.said
            assert not app.warning, "it is in this run"
            continue
        low = page.cards.get("Triggered") or page.cards["Would trigger"]
        assert whole(low[0]) == [int(mine["triggered"].sum())]
        assert whole(page.cards["Flips"][0] + " " + page.cards["Flips"][1]) == [
            int(mine["flipped"].sum()),
            int((mine["reason"] != "none").sum()),
        ]
        assert float(page.cards["TTFT"][0].split()[0].replace(",", "")) == pytest.approx(request["ttft_ms"], abs=0.06)
        beyond = mine[(mine["reason"] != "none") & ~mine["triggered"] & ~mine["reason"].isin(["resume", "limit"])]
        repaired, lost = mine["flipped"] & mine["repaired"], beyond["flipped"] & ~beyond["repaired"]
        assert whole(page.cards["Repaired"][0]) == [int(repaired.sum())]
        assert whole(page.cards["Missed"][0] + " " + page.cards["Missed"][1]) == [
            int(lost.sum()), int(beyond["flipped"].sum()), len(beyond),
        ]  # fmt: skip
        share = 100 * request["overhead_ms"] / request["e2e_ms"]
        assert float(re.findall(r"([\d.]+)%", page.cards["Overhead"][1])[0]) == pytest.approx(share, abs=0.006)
        rows = truth.every[truth.every["request"] == number].sort_values("step")
        line = figures(app)[f"margins-{number}"][0]
        positive = rows["margin"] > 0
        assert line["x"] == rows["step"].tolist()
        assert np.array(line["y"])[positive] == pytest.approx(rows["margin"][positive].to_numpy(), rel=1e-6)
