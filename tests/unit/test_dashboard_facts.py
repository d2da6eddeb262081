"""What the dashboard says of identity, causes, prices, comparisons and lists of runs, on cases with known answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
pytest.importorskip("margingate_dashboard", reason="the package is not installed (pip install -e .)")

from margingate_dashboard import align, data, profiles, rates, states, summary
from margingate_dashboard.facts import course, differ, identity, notes, policies, price, quantiles, runlist, versus, why
from margingate_dashboard.figures import classes, overview, timeline
from margingate_dashboard.figures import request as request_figures
from margingate_dashboard.pages import flips, margins, runs, tuning
from synthetic_runs import SyntheticSpec, make_frames, write_run

from sglang_margingate.gate.calibration import threshold_for, trade_off
from sglang_margingate.trace.frames import to_frame
from sglang_margingate.trace.reader import request_table

# identity ----------------------------------------------------------------------------------------------------------


def answers(*rows: tuple[str, str, str, int], run: str = "r", **more: object) -> pd.DataFrame:
    """Answers as (policy, prompt, tokens, largest batch)."""
    frame = pd.DataFrame(
        [
            {
                "request": i + 1, "request_id": f"x{i}", "dataset": "d", "policy": policy, "prompt_digest": prompt,
                "output_digest": tokens, "max_tokens": 64, "finish_reason": "stop", "repeat": i, "max_batch_rows": batch,
                "cached_tokens": 0, "output_tokens": 9, "greedy": True, "steps": 9, "seed": None, "temperature": 0.0,
                "time": pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(seconds=i), **more,
            }
            for i, (policy, prompt, tokens, batch) in enumerate(rows)
        ]
    )  # fmt: skip
    return identity.answers(frame, run)


def test_what_the_demo_proves_is_counted() -> None:
    rows = []
    for prompt in range(24):
        for policy in ("log", "gate"):
            rows.append((policy, f"p{prompt}", "same", 1))
            rows.append((policy, f"p{prompt}", "same" if policy == "gate" or prompt < 12 else "other", 16))
    found = identity.matrix(identity.compared(answers(*rows)))
    assert found[("r", "log")][None] == (12, 24)
    assert found[("r", "gate")][None] == (24, 24)
    assert found[("r", "log")][("9–16", "cold")] == (12, 24)
    assert identity.sentence(found, ["r"]) == "gate 24 / 24 · log 12 / 24"


def test_one_different_answer_of_many_spoils_its_prompt() -> None:
    pairs = identity.compared(
        answers(("gate", "p", "a", 1), ("gate", "p", "a", 4), ("gate", "p", "b", 4), ("gate", "q", "c", 1))
    )
    assert identity.matrix(pairs)[("r", "gate")] == {None: (0, 1), ("2–4", "cold"): (0, 1)}
    assert pairs["ref_request"].tolist() == [1, 1], "the answer alone is the reference"


def test_another_policys_answers_may_be_the_reference() -> None:
    rows = answers(("gate", "p", "a", 1), ("log", "p", "b", 1), ("log", "p", "b", 8))
    own = identity.matrix(identity.compared(rows))
    assert own[("r", "log")][None] == (1, 1), "stock agrees with itself"
    against = identity.matrix(identity.compared(rows, ("r", "gate")))
    assert against[("r", "log")][None] == (0, 1), "and with nobody else"


def test_runs_are_compared_by_the_prompts_digest() -> None:
    rows = pd.concat(
        [answers(("off", "p", "a", 1), run="x"), answers(("gate", "p", "a", 8), ("gate", "q", "z", 1), run="y")]
    )
    found = identity.matrix(identity.compared(rows, ("x", "off")))
    assert found == {("y", "gate"): {None: (1, 1), ("5–8", "cold"): (1, 1)}}


@pytest.mark.parametrize(
    "change", [{"greedy": False}, {"finish_reason": "abort"}, {"prompt_digest": None}, {"output_digest": None}]
)
def test_what_cannot_be_compared_is_left_out(change: dict[str, object]) -> None:
    assert answers(("gate", "p", "a", 1), ("gate", "p", "b", 8), **change).empty


def test_seeded_answers_are_compared_seed_by_seed() -> None:
    rows = [answers(("gate", "p", out, b), greedy=False, seed=seed, temperature=0.7).assign(request=n) for n, (out, b, seed) in enumerate(
        [("a", 1, 3), ("a", 8, 3), ("b", 8, 4)])]  # fmt: skip
    assert identity.matrix(identity.compared(pd.concat(rows)))[("r", "gate")][None] == (1, 1)


def test_other_lengths_asked_for_are_other_prompts() -> None:
    rows = pd.concat(
        [answers(("gate", "p", "a", 1), max_tokens=8), answers(("gate", "p", "b", 8), max_tokens=64).assign(request=2)]
    )
    assert identity.compared(rows).empty


def test_a_run_without_digests_is_compared_by_its_texts_and_tokens() -> None:
    steps, requests = make_frames(SyntheticSpec(requests=8, tokens=30, mix=("log", "gate")))
    outputs = identity.digests(steps[["request", "step", "token"]])
    bare = policies.with_policy(requests.assign(prompt_digest=None, output_digest=None))
    found = identity.answers(bare, "old", requests.set_index("request")["prompt_text"], outputs)
    assert len(found) == 8
    assert identity.digests(steps.iloc[:0]).empty


# two answers -------------------------------------------------------------------------------------------------------


def test_answers_that_meet_again_are_realigned() -> None:
    a, b = [1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 9, 4, 5, 6, 7]
    found = differ.realign(a, b)
    assert found.first == 2
    assert found.a == ["same", "same", "diverged", "again", "again", "again", "again"]
    assert found.b == ["same", "same", "diverged", "only", "again", "again", "again", "again"]


@pytest.mark.parametrize(
    ("a", "b", "first"), [([], [], None), ([1], [1], None), ([1], [1, 2], 1), ([], [1], 0), ([1, 2, 3], [4, 5], 0)]
)
def test_every_token_has_a_mark(a: list[int], b: list[int], first: int | None) -> None:
    found = differ.realign(a, b)
    assert found.first == first
    assert (len(found.a), len(found.b)) == (len(a), len(b))


def test_settings_that_differ_are_shown_the_grave_ones_first() -> None:
    a = {"model": "x", "pid": 1, "flags": {"margingate": {"repair": "window"}}, "versions": {"torch": "1"}}
    b = {"model": "y", "pid": 2, "flags": {"margingate": {"repair": "column"}}, "versions": {"torch": "1"}}
    assert versus.settings(a, b)["field"].tolist() == ["model", "flags.margingate.repair"]
    assert versus.settings(a, a).empty


def test_mcnemar_is_the_exact_binomial() -> None:
    from scipy.stats import binomtest

    for only_a, only_b in ((0, 0), (1, 0), (3, 9), (12, 0), (5, 5)):
        truth = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert versus.Paired(2, only_a, only_b, 1).p_value == pytest.approx(truth)
    pairs = [
        pd.DataFrame({"prompt": list("aabc"), "same": s})
        for s in ([True, False, True, True], [True, True, True, False])
    ]
    assert versus.paired(*pairs) == (1, 1, 1, 0)


def test_deltas_bracket_a_shift() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(100, 20, 200)
    a, b = (
        pd.DataFrame({"request": range(200), "ttft_ms": v, "tpot_ms": np.nan, "e2e_ms": v})
        for v in (base, base + 7 + rng.normal(0, 1, 200))
    )
    found = versus.deltas(pd.DataFrame({"a": range(200), "b": range(200)}), a, b).set_index("of")
    assert list(found.index) == ["TTFT", "end to end"], "what was not measured is not told"
    assert found.loc["TTFT", "95% from"] < 7 < found.loc["TTFT", "to"]


# causes ------------------------------------------------------------------------------------------------------------


def flipped(**changes: object) -> pd.Series:
    row = {
        "reason": "margin", "flipped": True, "structural": False, "batch_rows": 1, "padded_rows": 1, "margin": 0.25, "window_rows": 1,
        "kv_delta_last": 0.5,
    }  # fmt: skip
    return pd.Series({**row, **changes}, dtype=object)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "one row alone, which is outside the class. The reference is not “alone” but the verify's own shape (16 rows)",
        ),
        ({"batch_rows": 8, "padded_rows": 16}, "8 requests shared the forward, its layers at up to 16 rows"),
        ({"reason": "resume"}, "was retracted"),
        ({"structural": True, "reason": "audit"}, "disproves the class"),
        ({"flipped": False}, "the same token"),
        ({"reason": "none", "flipped": False}, "not known"),
        ({"reason": "none", "flipped": False, "structural": True}, "inside the probed class"),
        ({"window_rows": 13}, "recomputed 13 columns"),
        ({"batch_rows": None, "padded_rows": None}, ""),
    ],
)
def test_a_flip_has_its_cause_in_words(changes: dict[str, object], said: str) -> None:
    assert said in why.cause(flipped(**changes), None, 16)


def test_a_prefix_hit_is_part_of_the_cause() -> None:
    assert "20 tokens of its prompt came from the prefix cache" in why.cause(
        flipped(), pd.Series({"cached_tokens": 20, "retractions": 0})
    )


def test_companions_are_the_rows_of_one_forward() -> None:
    steps, _ = make_frames(SyntheticSpec(requests=6, tokens=30))
    row = steps[~steps["prefill"]].iloc[40]
    found = why.companions(steps, row)
    assert len(found) == row["batch_rows"] - 1
    old = steps.assign(forward=pd.array([pd.NA] * len(steps), dtype="Int32"))
    pd.testing.assert_frame_equal(
        why.companions(old, row.drop("forward")).drop(columns="forward"), found.drop(columns="forward")
    )


def test_the_best_tokens_of_both_paths_stand_side_by_side() -> None:
    row = pd.Series(
        {
            "fast_top_tokens": [5, 6],
            "fast_top_logprobs": [-0.1, -3.0],
            "verify_top_tokens": [6, 7],
            "verify_top_logprobs": [-0.2, -2.0],
        }
    )
    found = why.best(row, {5: " a"}).set_index("id")
    assert found.loc[5, "fast path, place"] == 1
    assert found.loc[5, "token"] == "·a"
    assert (found.loc[6, "fast path, place"], found.loc[6, "verify, place"]) == (2, 1)
    assert found.loc[6, "verify, %"] == pytest.approx(100 * np.exp(-0.2))
    assert why.best(pd.Series({"fast_top_tokens": None}), {}).empty


# price -------------------------------------------------------------------------------------------------------------


def test_a_price_is_what_was_measured() -> None:
    window = np.repeat([1, 5, 9], 50)
    cost = 2.0 + 0.5 * window
    steps = pd.DataFrame(
        {
            "prefill": False, "step_ms": 10.0 + cost, "verify_ms": cost, "window_rows": window, "batch_rows": 1, "verified": True,
        }
    )  # fmt: skip
    found = price.measure(steps)
    assert found is not None
    assert (found.fast_ms, found.rows, found.windows) == (10.0, 1, (1, 9))
    assert (found.base_ms, found.column_ms) == pytest.approx((2.0, 0.5))
    assert found.predict(0.0).step_ms == 10.0
    assert found.predict(0.2).step_ms == pytest.approx(10 + 0.2 * (2 + 0.5 * 5))
    assert found.predict(0.001).step_ms == pytest.approx(10 + 0.001 * 6.5), (
        "a window longer than any measured one is not made up"
    )
    assert price.measure(steps.assign(verified=False)) is None


def test_a_step_waits_where_any_of_its_rows_triggers() -> None:
    found = price.Price(10.0, 16, 4.0, 0.0, (1, 1), 9)
    assert found.predict(0.1).step_ms == pytest.approx(10 + 4 * (1 - 0.9**16))
    costs = [found.predict(r).step_ms for r in (0, 0.01, 0.1, 0.5, 1.0)]
    assert all(a < b for a, b in pairwise(costs))
    assert found.predict(1.0).tokens_per_second == pytest.approx(1000 * 16 / 14)


def test_the_knee_is_where_a_smaller_risk_begins_to_cost_much() -> None:
    assert price.knee([0.9, 0.2, 0.1, 0.08], [1e-4, 2e-4, 4e-4, 1e-2]) == 1
    assert price.knee([0.5], [0.1]) == 0
    assert price.knee([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) == 0


def test_the_honest_bound_is_the_calibrations() -> None:
    rng = np.random.default_rng(0)
    margin = rng.exponential(2, 4000)
    flip = rng.random(4000) < 0.3 * np.exp(-margin / 0.1)
    found = threshold_for(margin, flip, target_miss=0.01, tail=False)
    at, higher, lower = (trade_off(margin, flip, [found.threshold * k]).iloc[0] for k in (1, 2, 0.5))
    assert profiles.honest(found, at) == found.miss_upper
    assert profiles.honest(found, higher) == found.miss_upper
    assert profiles.honest(found, lower) >= max(found.miss_upper, lower["miss_upper"])


def mixed_steps() -> pd.DataFrame:
    """Steps of a run with requests of both policies, as the pages have them."""
    steps, requests = make_frames(SyntheticSpec(requests=48, tokens=80, mix=("gate", "always"), audit_rate=0.2))
    named = dict(zip(requests["request"], requests["policy"].astype(str)))
    return steps.assign(verified=steps["reason"].astype(str) != "none", policy=steps["request"].map(named))


def test_a_flip_outside_the_sample_is_a_counterexample() -> None:
    steps = mixed_steps()
    known = profiles.known_flips(steps)
    gate = steps[(steps["policy"] == "gate") & steps["flipped"] & ~steps["prefill"]]
    assert set(known) == set(gate["dataset"].astype(str))
    for name, found in known.items():
        truth = gate[gate["dataset"] == name]["margin"]
        assert found.above(0.1) == int((truth > 0.1).sum())
        assert found.largest == truth.max()
    hidden = profiles.known_flips(steps, (steps["dataset"] == "story").to_numpy())
    assert set(hidden) == set(steps.loc[steps["flipped"], "dataset"].astype(str)), "a filter makes no flip unseen"


@pytest.mark.parametrize("target", [0.0, 1e-3, 1e-2])
def test_one_rule_of_veto_for_every_dataset_and_target(target: float) -> None:
    """A flip that was seen outside the sample raises a threshold below it; nothing else does, and nothing lowers one."""
    rng = np.random.default_rng(3)
    margin = rng.exponential(2, 4000)
    flip = rng.random(4000) < 0.3 * np.exp(-margin / 0.1)
    found = threshold_for(margin, flip, target_miss=target, tail=False)
    above, below = found.threshold + 0.25, found.threshold / 2
    for seen, tau in (([], found.threshold), ([below], found.threshold), ([below, above], above)):
        assert profiles.veto(found, profiles.KnownFlips(np.array(seen))) == tau
    assert profiles.veto(found, None) == found.threshold


# lists of runs -----------------------------------------------------------------------------------------------------


def test_a_run_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        write_run(tmp_path / f"r{i}", SyntheticSpec(requests=2, tokens=8, seed=i))
        os.utime(tmp_path / f"r{i}", (time.time() - 60,) * 2)
    read: list[str] = []
    info, rows = data.run_info, data.request_table
    monkeypatch.setattr(data, "run_info", lambda p: read.append(p.name) or info(p))
    monkeypatch.setattr(data, "request_table", lambda p, c: read.append(f"rows of {p.name}") or rows(p, c))
    infos = data.runs(tmp_path)
    assert len(data.counted(infos, 60.0)) == 4
    assert len(read) == 8
    read.clear()
    assert len(data.counted(data.runs(tmp_path), 60.0)) == 4
    assert read == []
    (tmp_path / "r1" / "notes.json").write_text("{}")
    assert [i.name for i in data.runs(tmp_path)]
    assert read == ["r1"], "the one that changed"


def test_a_look_at_the_folder_reads_no_closed_run_and_sees_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_run(tmp_path / f"r{i}", SyntheticSpec(requests=2, tokens=8, seed=i, live=i == 2))
    monkeypatch.setenv("MARGINGATE_TRACE_DIR", str(tmp_path))
    stamps, infos = runlist.stamps(tmp_path), data.runs(tmp_path)
    seen = runs.as_shown(stamps, infos)
    assert runs.state_of_folder(infos) == seen
    looked: list[str] = []
    real = data.read_manifest
    monkeypatch.setattr(data, "read_manifest", lambda path: looked.append(path.name) or real(path))
    assert runs.state_of_folder(infos) == seen
    assert looked == ["r2"], "the one that lives"
    manifest = tmp_path / "r2" / "manifest.json"
    living = manifest.read_text()
    for change, undo in (
        (lambda: (tmp_path / "r3").mkdir(), lambda: (tmp_path / "r3").rmdir()),
        (lambda: (tmp_path / "r0" / "notes.json").write_text("{}"), lambda: None),
        (lambda: manifest.write_text(living.replace('"heartbeat": "20', '"heartbeat": "19')), lambda: manifest.write_text(living)),
        (lambda: (tmp_path / "r2" / "steps-0002.parquet").unlink(), lambda: None),
    ):  # fmt: skip
        before = runs.state_of_folder(infos)
        change()
        assert runs.state_of_folder(infos) != before
        undo()


def test_a_look_reads_as_many_runs_as_fit_into_its_time() -> None:
    def slow(paths: Sequence[Path]) -> dict[Path, str]:
        time.sleep(0.02)
        return {path: path.name for path in paths}

    paths = [Path(f"p{i}") for i in range(50 * runlist.TOGETHER)]
    found = runlist.within(0.05, paths, slow)
    assert runlist.TOGETHER <= len(found) < len(paths)
    assert list(runlist.within(0.0, paths, slow)) == paths[: runlist.TOGETHER], "each look gets on"
    assert runlist.within(60.0, paths[:30], slow) == {path: path.name for path in paths[:30]}


def test_many_runs_are_counted_as_each_alone(tmp_path: Path) -> None:
    """Runs of all kinds in one frame: none lends another its policies, its tags, or a threshold."""
    specs = (
        SyntheticSpec(requests=6, tokens=30, policy="off"),
        SyntheticSpec(requests=9, tokens=30, mix=("log", "gate", "always"), sampled=2, threshold=0.0625),
        SyntheticSpec(requests=5, tokens=30, policy="log", datasets=("code",)),
        SyntheticSpec(requests=7, tokens=30, structural=1.0, perturbation=0.0, datasets=("",)),
        SyntheticSpec(requests=8, tokens=60, policy="always", perturbation=1.0),
    )
    tables = {i: request_table(write_run(tmp_path / f"r{i}", spec), runlist.COLUMNS) for i, spec in enumerate(specs)}
    tables[len(specs)] = tables[0].slice(0, 0)
    together = runlist.count_together(tables)
    for i, table in tables.items():
        assert runlist.count_together({i: table})[i] == together[i]
        rows = policies.with_policy(to_frame(table))
        first = policies.leading(rows["policy"])
        mine = summary.from_requests(rows[(rows["policy"] == first).to_numpy()])
        every = summary.from_requests(rows)
        found = together[i]
        assert [found[n] for n in ("decode steps", "triggers", "verified", "flips", "all flips", "all verified")] == [
            mine.steps, mine.low, mine.verified, mine.flips if first in ("gate", "always") or not len(rows) else None,
            every.flips, every.verified,
        ]  # fmt: skip
        if len(rows):
            assert (found["rates of"], found["policies"]) == (first, ", ".join(policies.present(rows["policy"])))
            assert found["datasets"] == ", ".join(summary.tags(rows["dataset"]))
        assert found["missed (95% bound)"] == runlist.missed_words(mine, first)
        added, whole = summary.overhead(rows[(rows["policy"] == first).to_numpy()])
        assert found["overhead"] == (pytest.approx(100 * added / whole) if whole else None)
    assert together[len(specs)]["policies"] == together[len(specs)]["datasets"] == "–"
    assert together[0]["trigger rate"] is None, "off has no threshold, whatever the run before it had"
    assert runlist.count_together({}) == {}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("", "abc"),
        ("qwen", "ab"),
        ("-qwen", "c"),
        ("qwen -nightly", "a"),
        ("hidden", "d"),
        ("- q", ""),
        ("no such", ""),
    ],
)
def test_runs_are_found_left_out_and_hidden_by_words(words: str, kept: str) -> None:
    frame = pd.DataFrame(
        {
            "run": list("abcd"), "model": ["qwen", "qwen", "llama", "qwen"], "datasets": "arith", "note": [None, "", "", "x"],
            "tags": ["", "nightly", "", "old, hidden"], "status": "closed",
        }
    )  # fmt: skip
    assert "".join(frame["run"][runs.matching(frame, words)]) == kept


def test_notes_lie_beside_a_run(tmp_path: Path) -> None:
    note = notes.Note("why <b>this</b>", ("baseline", "a"))
    notes.write_note(tmp_path, note)
    assert notes.read_note(tmp_path) == note
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.json"]
    notes.write_note(tmp_path, notes.Note())
    assert not list(tmp_path.iterdir())
    for text in ("[]", "{", '{"note": 1}', '{"note": "x", "tags": [1, "y"]}', "[" * 5000):
        (tmp_path / "notes.json").write_text(text)
        assert notes.read_note(tmp_path) in (notes.Note(), notes.Note("x", ("y",)))
    (tmp_path / "notes.json").unlink()
    (tmp_path / "elsewhere").write_text(json.dumps({"note": "secret", "tags": []}))
    (tmp_path / "notes.json").symlink_to(tmp_path / "elsewhere")
    assert notes.read_note(tmp_path) == notes.Note(), "no link is followed"


def test_annotations_stand_at_a_request_or_a_step(tmp_path: Path) -> None:
    note = notes.Note("n", ("t",)).marked(7, 3, "<i>odd</i>").marked(7, None, "slow").marked(2, 0, "x")
    notes.write_note(tmp_path, note)
    found = notes.read_note(tmp_path)
    assert found == note
    assert [(m.step, m.text) for m in found.of(7)] == [(None, "slow"), (3, "<i>odd</i>")]
    assert (found.at(7, 3), found.at(7, 4), found.at(2, None)) == ("<i>odd</i>", "", "")
    assert found.marked(7, 3, "anew").at(7, 3) == "anew"
    assert notes.Note().marked(1, 1, "a").marked(1, 1, "") == notes.Note(), "no words, no annotation"
    for marks in ("x", [1], [{"request": "1", "text": "a"}], [{"step": 1}], {"a": 1}):
        (tmp_path / "notes.json").write_text(json.dumps({"note": "n", "tags": [], "marks": marks}))
        assert notes.read_note(tmp_path).marks == ()
    (tmp_path / "notes.json").write_text(json.dumps({"note": "of an older version", "tags": []}))
    assert notes.read_note(tmp_path) == notes.Note("of an older version")


# a run so far -------------------------------------------------------------------------------------------------------


def test_overhead_and_bound_so_far_are_those_of_all_before() -> None:
    steps, requests = make_frames(SyntheticSpec(requests=30, tokens=60, mix=("gate", "log"), audit_rate=0.2))
    named = dict(zip(requests["request"], requests["policy"].astype(str)))
    steps = steps.assign(
        policy=steps["request"].map(named), verified=states.verified(steps), examined=states.examined(steps), above=states.above(steps)
    )  # fmt: skip
    table = course.so_far(steps, requests, "gate", points=20)
    began = steps["time"].min()
    mine = requests[requests["policy"] == "gate"]
    end = mine["time"] + pd.to_timedelta((1000 * mine["e2e_ms"]).astype("int64"), unit="us")
    gate = steps[(steps["policy"] == "gate") & ~steps["prefill"]]
    for _, row in table.iterrows():
        now = began + pd.to_timedelta(row["seconds"] + 1e-7, unit="s")
        done, seen = mine[end <= now], gate[gate["time"] <= now]
        audited = seen[~seen["triggered"] & (seen["reason"] == "audit")]
        assert row["requests"] == len(done)
        if len(done):
            assert row["overhead"] == pytest.approx(100 * done["overhead_ms"].sum() / done["e2e_ms"].sum())
        assert (row["examined"], row["above"]) == (len(audited), int(audited["flipped"].sum()))
        if len(audited):
            assert row["bound"] == pytest.approx(100 * rates.upper_95(int(audited["flipped"].sum()), len(audited)))
    assert table["bound"].notna().any()
    assert table["overhead"].iloc[-1] == pytest.approx(100 * mine["overhead_ms"].sum() / mine["e2e_ms"].sum())
    assert course.so_far(steps, requests, "log")["bound"].isna().all(), "under log nothing is audited"
    assert course.so_far(steps.iloc[:0], requests.iloc[:0], "gate").empty
    assert overview.so_far(table, "gate").data
    assert not overview.so_far(course.so_far(steps.iloc[:0], requests.iloc[:0], "gate"), "gate").data


def test_the_newest_flips_come_first() -> None:
    steps, _ = make_frames(SyntheticSpec(requests=30, tokens=60, policy="always"))
    steps = steps.assign(state=states.classify(steps), policy="always")
    found = course.newest_flips(steps, {})
    every = steps[steps["flipped"]].sort_values(["time", "request"], ascending=[False, True], kind="stable")
    assert len(every) > course.TICKER == len(found)
    assert (
        found[["number", "step"]].to_numpy().tolist()
        == every[["request", "step"]].head(course.TICKER).to_numpy().tolist()
    )
    assert (found["fast token"] != found["verify token"]).all()
    assert course.newest_flips(steps[~steps["flipped"]], {}).empty


# compared runs -----------------------------------------------------------------------------------------------------


def asked(*rows: tuple[str, str]) -> pd.DataFrame:
    """Requests as (id, digest of the prompt)."""
    return pd.DataFrame(
        {
            "request": range(1, len(rows) + 1), "request_id": [r for r, _ in rows], "prompt_digest": [d for _, d in rows],
            "dataset": "d", "policy": "gate", "steps": 9, "max_batch_rows": 2, "prompt_tokens": 5,
            "time": pd.date_range("2026-01-01", periods=len(rows), freq="s", tz="UTC"),
        }
    )  # fmt: skip


def test_one_id_with_another_prompt_is_no_match() -> None:
    """A client that counts its requests gives the same ids to other prompts, whose answers say nothing of each other."""
    a = asked(("r0", "A"), ("r1", "B"), ("r2", "C"))
    same = align.pair(a, asked(("r0", "A"), ("r1", "B"), ("r2", "C")))
    assert (len(same.table), same.how) == (3, "Matched by request id.")
    one = align.pair(a, asked(("r0", "A"), ("r1", "B"), ("r2", "X")))
    assert one.table[["id_a", "id_b"]].to_numpy().tolist() == [["r0", "r0"], ["r1", "r1"]]
    assert "1 with one id and different prompts are left out" in one.how
    moved = align.pair(a, asked(("r0", "C"), ("r1", "A"), ("r2", "B")))
    assert dict(zip(moved.table["id_a"], moved.table["id_b"])) == {"r0": "r1", "r1": "r2", "r2": "r0"}
    assert "digest" in moved.how
    assert align.pair(a, asked(("r0", "X"), ("r1", "Y"))).table.empty


# figures -----------------------------------------------------------------------------------------------------------


def test_requests_in_one_lane_do_not_overlap() -> None:
    steps, requests = make_frames(SyntheticSpec(requests=30, tokens=40))
    table = timeline.spans(steps.assign(policy="gate", flip=steps["flipped"]))
    assert len(table) == 30
    for _, mine in table.groupby("lane"):
        ordered = mine.sort_values("begin")
        assert (ordered["begin"].to_numpy()[1:] > ordered["end"].to_numpy()[:-1]).all()
    assert table["lane"].max() + 1 <= steps["batch_rows"].max(), "no more lanes than requests at once"
    assert table.set_index("request")["flips"].to_dict() == requests.set_index("request")["flips"].to_dict()
    assert timeline.timeline(table).data
    assert timeline.spans(steps.iloc[:0].assign(policy="gate", flip=False)).empty


def test_a_heat_map_shows_each_class_and_survives_what_is_no_map() -> None:
    found = {
        "layers": [
            {"name": "qkv", "shape": [8, 4], "count": 2, "classes": [[1, 16, 0], [17, 64, 1]]},
            {"name": "bad"},
            7,
        ]
    }
    z = np.asarray(classes.heat_map(found).data[0].z, dtype=float)
    assert z.shape == (1, 64)
    assert len(set(z[0, :16])) == len(set(z[0, 16:])) == 1
    assert z[0, 0] != z[0, 16]
    twins = [{**found["layers"][0], "shape": [8, k], "name": "experts_of_a_very_long_name"} for k in (4, 6)]  # type: ignore[dict-item]
    names = list(classes.heat_map({"layers": twins}).data[0].y)
    assert len(set(names)) == 2, "two of one name are told apart"
    assert all(len(n) < 40 for n in names), "a phone has room for the map"
    for bad in (
        None,
        3,
        {},
        {"layers": "x"},
        {"layers": [{"name": "a", "shape": [1, 1], "count": 1, "classes": [[1, 10**9, 0]]}]},
    ):
        assert not classes.heat_map(bad).data


def test_quantiles_are_of_one_policy_each() -> None:
    _, requests = make_frames(SyntheticSpec(requests=24, tokens=40, mix=("log", "gate"), sampled=2))
    table = quantiles.quantile_table(policies.with_policy(requests))
    assert set(table["policy"]) == {"gate", "log", "not observed"}
    assert table.groupby("of")["requests"].sum().eq(24).all()


def test_no_low_margin_is_thinned_away() -> None:
    rng = np.random.default_rng(2)
    margin = rng.exponential(3, 30_000)
    margin[12_345], margin[7] = 0.0, np.nan
    step, lowest = request_figures.envelope(np.arange(30_000), margin)
    assert step.size <= request_figures.BUCKETS
    assert 12_345 in step
    assert lowest.min() == 0.0
    assert (margin[step] == lowest)[np.isfinite(lowest)].all()


@pytest.mark.parametrize(
    ("policy", "decode", "structural", "said"),
    [
        ("gate", 0, 90, "inside the probed class"), ("gate", 0, 0, "one output token"), ("log", 50, 0, "policy is log"),
        ("gate", 50, 10, "only low margins"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_calibrate_says_why(policy: str, decode: int, structural: int, said: str) -> None:
    assert said in tuning.why_not(policy, decode, structural)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verified": 300}, "of such steps do (95%)"), ({"steps": 0, "others": 40, "policies": ["log"]}, "its policy is log"),
        ({"structural": 100}, "inside the probed class"), ({"steps": 0, "structural": 0}, "one output token"),
        ({}, "none was drawn for the audit"),
    ],
)  # fmt: skip
def test_a_run_without_flips_says_why(changes: dict[str, object], said: str) -> None:
    base: dict[str, object] = {
        "steps": 100, "others": 0, "verified": 0, "examined": 0, "above": 0, "structural": 0, "policies": ["gate"], "states": {},
        "requests": 1, "touched": 0, "table": pd.DataFrame(), "figures": {},
    }  # fmt: skip
    assert said in flips.why_none(flips.Found(**{**base, **changes}))  # type: ignore[arg-type]


def test_the_threshold_in_force_is_a_stop_of_the_slider() -> None:
    for start, top, grid in (
        (0.5, 24.15, 0.0625),
        (0.0625, 0.25, 0.0078125),
        (0.3, 9.0, 0.0),
        (0.0, 1.0, 0.0),
        (0.1, 50.0, 0.0625),
    ):
        step = margins.slider_step(start, top, grid)
        assert abs(start / step - round(start / step)) < 1e-6
        assert top / step <= 801


@pytest.mark.parametrize(
    ("text", "found"),
    [("a:0.5,b%3Ac:1", {"a": 0.5, "b:c": 1.0}), (None, {}), ("x", {}), ("a:-1,b:nan,c:inf,d:2", {"d": 2.0})],
)
def test_thresholds_of_a_link(text: object, found: dict[str, float]) -> None:
    assert tuning.by_hand(text) == found
