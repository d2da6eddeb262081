"""The dashboard's data: loading by column, live runs, states, counts, and what is made of them."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
pytest.importorskip("margingate_dashboard", reason="the package is not installed (pip install -e .)")

from margingate_dashboard import align, bins, links, profiles, rates, states, summary, tables, tokens, whatif
from margingate_dashboard.context import flip_text
from margingate_dashboard.data import RunData, request_steps, still_live
from margingate_dashboard.facts.policies import with_policy
from margingate_dashboard.figures.flips import by_bucket, ranges
from margingate_dashboard.figures.latency import quantiles
from margingate_dashboard.figures.request import latency_parts
from margingate_dashboard.summary import STEP_COLUMNS, headline
from margingate_dashboard.theme import STATES
from synthetic_runs import SyntheticSpec, make_frames, make_manifest, write_run

from sglang_margingate.config import DEFAULT_THRESHOLD
from sglang_margingate.gate.columns import missed_rows, outcome_rows
from sglang_margingate.gate.policy import OUTCOMES, missed, outcome
from sglang_margingate.gate.profile import parse_profile
from sglang_margingate.trace import RunFollower, TraceError, TraceWriter
from sglang_margingate.words import Reason

SPEC = SyntheticSpec(requests=12, tokens=80)
ALWAYS = SyntheticSpec(requests=12, tokens=80, policy="always")
MIXED = SyntheticSpec(requests=24, tokens=80, mix=("log", "gate", "always", "gate"), sampled=2)


@pytest.fixture(scope="module")
def gated() -> pd.DataFrame:
    steps, _ = make_frames(SPEC)
    return with_derived(steps)


def with_derived(steps: pd.DataFrame, policy: str = "gate") -> pd.DataFrame:
    return steps.assign(
        state=states.classify(steps),
        triggered=states.triggered(steps),
        verified=states.verified(steps),
        examined=states.examined(steps),
        above=states.above(steps),
        policy=pd.Categorical([policy] * len(steps)),
    )


# states ------------------------------------------------------------------------------------------------------------


def one_step(**changes: object) -> pd.DataFrame:
    row = {"triggered": False, "reason": "none", "flipped": False, "repaired": False}
    return pd.DataFrame([{**row, **changes}])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "stable"),
        ({"reason": "audit"}, "stable"),
        ({"triggered": True, "reason": "margin"}, "triggered"),
        ({"triggered": True, "reason": "margin", "flipped": True, "repaired": True}, "repaired"),
        ({"triggered": True, "reason": "margin", "flipped": True}, "flipped"),
        ({"reason": "audit", "flipped": True}, "missed"),
        ({"reason": "always", "flipped": True, "repaired": True}, "repaired"),
        ({"triggered": True, "reason": "none"}, "would trigger"),
        ({"triggered": True, "reason": "always", "flipped": True, "repaired": True}, "repaired"),
        ({"reason": "resume", "flipped": True, "repaired": True}, "repaired"),
        ({"triggered": None, "flipped": None, "repaired": None}, "stable"),
    ],
)
def test_each_step_has_the_state_that_the_legend_says(changes: dict[str, object], name: str) -> None:
    assert states.classify(one_step(**changes))[0] == states.CODE[name]


@pytest.mark.parametrize("categorical", [True, False])
def test_what_became_of_a_step_is_one_definition(categorical: bool) -> None:
    cases = list(product(Reason, *[(False, True)] * 3))
    words = pd.Series([reason.value for reason, *_ in cases], dtype="category" if categorical else object)
    low, flip, repaired = (np.array([case[i] for case in cases]) for i in (1, 2, 3))
    found = [OUTCOMES[code] for code in outcome_rows(words, low, flip, repaired)]
    assert found == [outcome(*case) for case in cases]
    assert tuple(s.name for s in STATES) == OUTCOMES


@pytest.mark.parametrize("categorical", [True, False])
def test_missed_is_one_definition_for_one_step_and_for_columns(categorical: bool) -> None:
    cases = list(product(Reason, (False, True), (False, True)))
    words = pd.Series([reason.value for reason, *_ in cases], dtype="category" if categorical else object)
    low, flip = (np.array([case[i] for case in cases]) for i in (1, 2))
    assert missed_rows(words, low, flip).tolist() == [missed(*case) for case in cases]


def test_a_structural_step_that_flipped_under_audit_is_missed(tmp_path: Path) -> None:
    """The server counted it and the page showed none: its threshold is no reason to look away."""
    for old in (False, True):
        steps, _ = make_frames(SyntheticSpec(requests=2, tokens=30, audit_rate=0.0, perturbation=0.0))
        at = int(np.flatnonzero(~steps["prefill"])[-1])
        steps["triggered"], steps["structural"] = False, ~steps["prefill"]
        steps["reason"] = pd.Categorical(["audit" if i == at else "none" for i in range(len(steps))])
        steps["flipped"], steps["repaired"] = [i == at for i in range(len(steps))], False
        if old:
            steps["threshold"], steps["canonical"] = np.where(steps["structural"], np.nan, 0.5), True
            steps = steps.drop(columns=["request", "triggered", "structural"])
        folder = tmp_path / ("old" if old else "new")
        folder.mkdir()
        steps.to_parquet(folder / "steps-0000.parquet")
        found = headline(RunData(folder).steps(*STEP_COLUMNS))
        assert (found.missed, found.examined, found.untriggered) == (1, 1, found.steps)


def test_nulls_and_categories_of_reason() -> None:
    reason = pd.Series(pd.Categorical(["none", None, "audit", "always", ""]))
    assert states.verified(pd.DataFrame({"reason": reason})).tolist() == [False, False, True, True, False]
    assert states.verified(pd.DataFrame({"reason": reason.astype(object)})).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]


# loading -----------------------------------------------------------------------------------------------------------


def test_only_the_asked_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    start = RunFollower.__init__

    def spy(self: RunFollower, path: Path, *, step_columns: list[str], request_columns: list[str]) -> None:
        asked.extend(step_columns)
        start(self, path, step_columns=step_columns, request_columns=request_columns)

    monkeypatch.setattr(RunFollower, "__init__", spy)
    run = RunData(write_run(tmp_path / "a", SPEC))
    frame = run.steps("margin", "state")
    assert list(frame.columns) == ["margin", "state"]
    assert set(asked) == {"margin", *states.STATE_COLUMNS}
    run.steps("margin", "reason")
    assert len(asked) == len(set(asked)), "a column was read twice"


def test_a_live_run_grows_and_rows_stay_together(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", SPEC)
    live = tmp_path / "live"
    live.mkdir()
    run = RunData(live)
    parts = sorted(whole.glob("steps-*.parquet"))
    shutil.copy(parts[0], live)
    first = run.steps("request_id", "margin", "state")
    kept = run.memo("n", lambda: len(first))
    shutil.copy(parts[1], live)
    assert len(run.steps("step")) > len(first)
    assert run.memo("n", lambda: -1) == -1 != kept, "a count outlived the growth of the run"
    shutil.copy(parts[2], live)
    grown, expected = (
        run.steps("request_id", "margin", "step", "state"),
        RunData(whole).steps("request_id", "margin", "step", "state"),
    )
    pd.testing.assert_frame_equal(
        grown.assign(request_id=grown["request_id"].astype(str)),
        expected.assign(request_id=expected["request_id"].astype(str)),
    )
    assert isinstance(grown["request_id"].dtype, pd.CategoricalDtype)


def test_a_writer_that_died_is_not_shown_as_living(tmp_path: Path) -> None:
    """A page asks the manifest as it is now: the heartbeat of one that was killed only grows old."""
    run = write_run(tmp_path / "r", SyntheticSpec(requests=2, tokens=10, live=True))
    manifest = json.loads((run / "manifest.json").read_text())
    assert still_live(run)
    for change in ({"heartbeat": "2026-01-05T09:00:00Z"}, {"closed_at": manifest["heartbeat"]}):
        (run / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert not still_live(run), change
    (run / "manifest.json").unlink()
    assert not still_live(run)


def test_another_run_under_the_same_name_is_read_anew(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", SPEC)
    run = RunData(path)
    before = run.steps("margin", "state")
    shutil.rmtree(path)
    write_run(path, SyntheticSpec(requests=5, tokens=30, seed=9))
    after = run.steps("margin", "state")
    assert len(after) != len(before)
    assert len(after) == len(run.steps("request_id"))


def test_unknown_columns_and_missing_runs_are_errors_in_words(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="unknown column"):
        RunData(write_run(tmp_path / "a", SPEC)).steps("nonsense")


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", SyntheticSpec(requests=2, tokens=20, files=1))
    shutil.copy(path / "steps-0000.parquet", path / "steps-0001.parquet")
    steps = request_steps(path, 2)
    assert steps["step"].is_unique
    assert steps["step"].is_monotonic_increasing


# counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [SPEC, ALWAYS, *(SyntheticSpec(requests=12, tokens=80, policy=p) for p in ("off", "log")), MIXED]
)
def test_steps_and_requests_tell_the_same(spec: SyntheticSpec) -> None:
    steps, requests = make_frames(spec)
    from_steps, from_requests = summary.headline(with_derived(steps)), summary.from_requests(with_policy(requests))
    for name in (
        "steps", "triggered", "would", "verified", "examined", "untriggered", "flips", "repaired", "above", "missed", "structural",
    ):  # fmt: skip
        assert getattr(from_steps, name) == getattr(from_requests, name), name


def test_the_missed_bound_is_the_rule_of_three() -> None:
    found = summary.Headline(1000, 0, 0, 300, 300, 1000, 0, 0, 0, 0)
    assert found.miss_upper == pytest.approx(3 / 300, rel=0.01)
    assert not found.miss_known
    assert summary.Headline(10, 10, 0, 10, 0, 0, 0, 0, 0, 0).miss_upper == 1.0


def test_datasets_are_named_even_without_a_tag() -> None:
    column = pd.Series(pd.Categorical(["a", "", None, "b"]))
    assert summary.tags(column) == ["a", "b", "(untagged)"]
    assert summary.has_tag(column, {"(untagged)"}).tolist() == [False, True, True, False]
    assert summary.has_tag(column.astype(object), {"a"}).tolist() == [True, False, False, False]


def test_counts_by_dataset_add_up(gated: pd.DataFrame) -> None:
    _, requests = make_frames(SPEC)
    table, total = tables.by_dataset(gated, with_policy(requests)), summary.headline(gated)
    assert table["decode steps"].sum() == total.steps
    assert table["flips"].sum() == total.flips
    assert table["requests"].sum() == SPEC.requests


def test_rates_are_written_with_their_counts() -> None:
    assert rates.rate(421, 7383) == "5.70% (421 / 7,383)"
    assert rates.rate(0, 0) == "– (0 / 0)"
    assert rates.milliseconds(float("nan")) == "–"
    assert rates.milliseconds(12345.0) == "12.3 s"
    assert np.isnan(rates.number(pd.NA))


# margins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize(
    "margins",
    [np.zeros(0), np.zeros(3), np.array([1e-7]), np.arange(400) / 16, np.random.default_rng(0).exponential(1, 999), np.array([0.0, 1e4])],
    ids=["none", "ties", "tiny", "grid", "fp32", "far"],
)  # fmt: skip
def test_bins_rise_and_hold_every_margin(margins: np.ndarray, scale: str) -> None:
    found = bins.margin_bins(margins, scale)
    assert (np.diff(found.edges) > 0).all()
    assert (np.diff(found.drawn) > 0).all()
    assert found.edges.size == found.drawn.size == found.centres.size + 1
    assert bins.counts(found, np.sort(margins)).sum() == margins.size


def test_bins_follow_the_bf16_grid() -> None:
    margins = np.repeat(np.arange(64) / 16, 10)
    for scale in ("log", "linear"):
        found = bins.margin_bins(margins, scale)
        assert found.grid == 1 / 16
        # No edge on a grid point: each margin lies clearly inside one bin.
        inner = found.edges[1:-1] * 16
        assert np.abs(inner - np.round(inner)).min() > 0.4
    ties = bins.counts(bins.margin_bins(margins, "log"), np.sort(margins))[0]
    assert ties == 10, "exact ties share their bin with nothing"


def test_the_grid_is_read_off_low_margins() -> None:
    rng = np.random.default_rng(0)
    mixed = np.concatenate([rng.integers(0, 40, 500) / 256, rng.uniform(5, 15, 9000)])
    assert bins.margin_grid(mixed) == 1 / 256
    assert bins.margin_grid(rng.exponential(1, 5000)) == 0.0


def sample_of(steps: pd.DataFrame, own: np.ndarray | None = None) -> whatif.Sample:
    return whatif.make_sample(
        steps["margin"].to_numpy(), states.as_bool(steps["flipped"]), states.verified(steps), states.examined(steps),
        ~states.as_bool(steps["prefill"]), states.as_bool(steps["structural"]),
        np.ones(len(steps), dtype=bool) if own is None else own,
    )  # fmt: skip


def test_no_threshold_triggers_a_structural_step() -> None:
    steps = with_derived(make_frames(ALWAYS)[0])
    flip = int(np.flatnonzero(steps["flipped"])[0])
    steps["structural"] = np.arange(len(steps)) == flip
    steps["triggered"] &= ~steps["structural"]
    decode = int((~steps["prefill"]).sum())
    found = whatif.outcome(sample_of(steps), 1e9)
    assert (found.triggered, found.steps, found.missed) == (decode - 1, decode, 1), (
        "its flip is missed at any threshold"
    )
    assert found.complete
    assert np.isfinite(sample_of(steps).margins).all(), "what is drawn is what was measured"


def test_pages_follow_a_run_whose_files_are_merged(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, {}, seconds_per_file=60) as w:
        run, count = RunData(w.path), 0
        for k in range(30):
            w.add_steps({"request": [k // 10], "request_id": ["same"], "step": [k], "margin": [1.0]})
            assert w.flush()
            if k % 4 == 0:
                assert run.steps("step")["step"].tolist() == list(range(k + 1))
                assert len(run.steps("step", "margin")) == k + 1
                count = max(count, len(list(w.path.glob("steps-*"))))
    assert count > 3
    assert run.steps("step")["step"].tolist() == list(range(30))
    assert len(list(w.path.glob("steps-*"))) == 1
    assert run.warnings == [], "a merge is no damage"
    assert request_steps(w.path, 1)["step"].tolist() == list(range(10, 20))


def test_another_threshold_on_a_fully_verified_run_is_exact() -> None:
    steps = with_derived(make_frames(ALWAYS)[0])
    decode = steps[~steps["prefill"]]
    for tau in (0.0, 0.25, 0.5, 2.0, 1e9):
        found = whatif.outcome(sample_of(steps), tau)
        assert found.triggered == int((decode["margin"] <= tau).sum())
        assert found.missed == int((decode["flipped"] & (decode["margin"] > tau)).sum())
        assert found.complete


def test_another_threshold_on_a_gated_run_bounds_what_was_never_looked_at(gated: pd.DataFrame) -> None:
    truth = with_derived(make_frames(ALWAYS)[0])  # the same seed: the same flips, all of them seen
    for tau in (0.1, 0.5, 1.0):
        found = whatif.outcome(sample_of(gated), tau)
        real = int((truth["flipped"] & (truth["margin"] > tau)).sum())
        assert not found.complete
        assert found.missed <= real <= found.miss_upper * found.steps
    assert whatif.outcome(sample_of(gated), 1e9).missed == 0


def test_another_policys_steps_say_nothing_of_those_never_looked_at(gated: pd.DataFrame) -> None:
    """A run of both policies: what `always` verified is no sample of what the gate let pass."""
    both = pd.concat([gated, with_derived(make_frames(ALWAYS)[0])], ignore_index=True)
    mine = np.arange(len(both)) < len(gated)
    alone, beside = (whatif.outcome(s, 0.5) for s in (sample_of(gated), sample_of(both, mine)))
    assert (beside.miss_upper, beside.complete) == (alone.miss_upper, alone.complete)
    assert beside.missed > alone.missed, "known flips are counted under any policy"
    assert whatif.outcome(sample_of(both, ~mine), 0.5).complete


def test_only_steps_drawn_by_chance_tell_of_those_never_looked_at(gated: pd.DataFrame) -> None:
    """Steps verified since a request resumed, or a window was full, were not drawn; neither were those under `log`."""
    forced = gated.assign(reason=gated["reason"].astype(object))
    forced.loc[forced["reason"] == "audit", "reason"] = "limit"
    assert whatif.outcome(sample_of(gated), 0.5).miss_upper < 1.0
    assert whatif.outcome(sample_of(forced), 0.5).miss_upper == 1.0
    log = with_derived(make_frames(SyntheticSpec(policy="log"))[0])
    for tau in (0.0, 0.1, 1e3):  # below its own threshold, too: what would have triggered was not verified
        assert not whatif.outcome(sample_of(log), tau).complete or tau == 1e3


def test_samples_join() -> None:
    steps = with_derived(make_frames(ALWAYS)[0])
    parts = [sample_of(steps[summary.has_tag(steps["dataset"], {n})]) for n in ("arith", "code", "story")]
    assert whatif.outcome(whatif.join(parts), 0.5) == whatif.outcome(sample_of(steps), 0.5)


# tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [(" the", "word"), ("The", "word"), ("ing", "word piece"), (" 42", "number"), (",", "punctuation"), (" +", "punctuation"),
     ("\n", "white space"), ("  ", "white space"), (None, "no text"), ("", "no text"), ("日本", "word piece"), ("\x00", "other")],
)  # fmt: skip
def test_token_classes(text: object, name: str) -> None:
    assert tokens.token_class(text) == name


def test_classes_of_many_tokens_are_those_of_each() -> None:
    ids = pd.Series([5, 7, 5, 9, -1, 2**30], dtype="int32")
    texts = pd.Series([" a", "1", " a", None, None, "x"], dtype=object)
    known = tokens.vocabulary(ids, texts)
    assert known == {5: " a", 7: "1", 2**30: "x"}
    found = [tokens.CLASSES[i] for i in tokens.classes(ids, known)]
    assert found == ["word", "number", "word", "no text", "no text", "no text"]
    assert tokens.classes(ids, {}).tolist() == [tokens.CLASSES.index("no text")] * 6


def test_strips_escape_text_and_show_white_space() -> None:
    steps = with_derived(make_frames(SyntheticSpec(requests=1, tokens=12))[0])
    steps["token_text"] = ["<script>alert(1)</script>", " x", "\n", '"', "\x1b[31m", None] + ["y"] * (len(steps) - 6)
    found = tokens.strip(steps, selected=1)
    assert "<script" not in found
    assert "&lt;script&gt;" in found
    assert "·" in found
    assert "⏎" in found
    assert "\\u001b" in found
    assert 'class="id"' in found
    assert found.count(" sel") == 1


def test_a_flip_as_text_names_all_that_matters(gated: pd.DataFrame) -> None:
    flip = tables.flip_list(gated).iloc[0]
    mine = gated[gated["request_id"] == flip["request"]].reset_index(drop=True)
    text = flip_text("run", make_manifest(SPEC), flip["request"], mine, int(flip["step"]))
    for word in (
        "model",
        "versions",
        "fast path",
        "verify",
        "margin",
        "threshold",
        "batch",
        "K/V change",
        "tokens before",
    ):
        assert word in text
    assert "not recorded" in flip_text("run", {}, "r", mine, 10**6)


# compare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "first"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [], None), ([], [1], 0)],
)
def test_first_difference(a: list[int], b: list[int], first: int | None) -> None:
    assert align.first_difference(np.array(a), np.array(b)) == first


def test_runs_are_matched_by_the_strongest_evidence() -> None:
    _, requests = make_frames(SPEC)
    renamed = requests.assign(request_id=[f"x{i}" for i in range(len(requests))])
    assert "request id" in align.pair(requests, requests).how
    assert "digest" in align.pair(requests, renamed).how
    requests, renamed = (r.assign(prompt_digest=None) for r in (requests, renamed))
    by_text = align.pair(requests, renamed)
    assert "prompt text" in by_text.how
    assert len(by_text.table) == len(requests)
    blind = align.pair(requests.assign(prompt_text=None), renamed.assign(prompt_text=None))
    assert "may differ" in blind.how
    assert len(blind.table) == len(requests)
    assert align.pair(requests.iloc[:0], requests).table.empty


def test_divergences_find_what_was_changed() -> None:
    steps, requests = make_frames(SPEC)
    shuffled = steps.sample(frac=1, random_state=0)
    pairs = align.pair(requests, requests).table
    assert align.divergences(pairs, steps, shuffled)["identical"].all()
    where = (steps["request_id"] == "rid-00003") & (steps["step"] == 4)
    changed = steps.assign(token=steps["token"].where(~where, -1))
    table = align.divergences(pairs, steps, changed).set_index("a")
    assert table.loc[4, ["id_a", "first"]].tolist() == ["rid-00003", 4]
    assert table["identical"].sum() == len(requests) - 1


def test_two_answers_with_one_id_are_two_requests(tmp_path: Path) -> None:
    """A client may use a request id twice: everything is keyed by the request's number."""
    steps, requests = make_frames(SyntheticSpec(requests=4, tokens=20))
    lengths = requests["output_tokens"].tolist()
    steps["request_id"], requests["request_id"] = pd.Categorical(["same"] * len(steps)), "same"
    (tmp_path / "run").mkdir()
    steps.to_parquet(tmp_path / "run" / "steps-0000.parquet")
    requests.to_parquet(tmp_path / "run" / "requests-0000.parquet")
    assert [len(request_steps(tmp_path / "run", n)) for n in (1, 2, 3, 4)] == lengths
    pairs = align.pair(requests, requests).table
    assert (pairs["a"] == pairs["b"]).all(), "in order of arrival"
    found = align.divergences(pairs, steps, steps).sort_values("a")
    assert found["tokens_a"].tolist() == lengths
    assert found["identical"].all()
    flips = tables.flip_list(with_derived(make_frames(ALWAYS)[0].assign(request_id="same")))
    assert flips["number"].nunique() > 1


# flips, latency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [np.zeros(0, int), np.zeros(9, int), np.arange(1000), np.arange(12) ** 3, np.array([5, 5, 70_000])]
)
def test_ranges_hold_each_value_once(values: np.ndarray) -> None:
    found, labels = ranges(values)
    assert found.size == values.size
    assert len(labels) <= 11
    for which, value in zip(found, values):
        low, _, high = labels[which].partition("–")
        assert int(low) <= value <= int(high or low)


def test_buckets_count_flips_over_steps() -> None:
    state = np.array([states.CODE[n] for n in ("stable", "repaired", "missed", "triggered")])
    table = by_bucket(np.array([0, 0, 2, 2]), state, ["a", "b", "c"])
    assert table["label"].tolist() == ["a", "c"]
    assert table["flips"].tolist() == [1, 1]
    assert table["steps"].tolist() == [2, 2]


@pytest.mark.parametrize("size", [50, 20_000])
def test_quantiles_are_pandas_own(size: int) -> None:
    rng = np.random.default_rng(1)
    groups, values = rng.integers(1, 9, size).astype(np.int32), rng.exponential(5, size)
    values[::7] = np.nan
    table = quantiles(groups, values)
    expected = pd.Series(values).groupby(groups)
    np.testing.assert_allclose(table["median"], expected.median())
    np.testing.assert_allclose(table["p95"], expected.quantile(0.95))
    assert table["steps"].tolist() == expected.count().tolist()


def test_latency_parts_sum_to_the_whole() -> None:
    _, requests = make_frames(SPEC)
    for _, row in requests.iterrows():
        parts = latency_parts(row)
        assert sum(parts.values()) == pytest.approx(row["e2e_ms"])
        assert min(parts.values()) >= 0
    assert sum(latency_parts(pd.Series({"e2e_ms": None})).values()) == 0


# profiles ----------------------------------------------------------------------------------------------------------


def test_only_fully_verified_requests_calibrate(gated: pd.DataFrame) -> None:
    samples, taken, decode = profiles.calibration_samples(gated)
    assert (samples, taken) == ({}, 0)
    assert decode > 0
    steps = with_derived(make_frames(ALWAYS)[0])
    samples, taken, decode = profiles.calibration_samples(steps)
    assert set(samples) == {"arith", "code", "story"}
    assert taken == decode == sum(m.size for m, _ in samples.values())


def test_the_exported_profile_is_the_servers_format() -> None:
    from sglang_margingate.gate.calibration import trade_off

    steps = with_derived(make_frames(ALWAYS)[0])
    samples, _, _ = profiles.calibration_samples(steps)
    chosen = {name: trade_off(*sample, [0.5]).iloc[0] for name, sample in samples.items()}
    many = pd.concat([chosen["code"], pd.Series({"steps": 3_000, "flips": 10})]).groupby(level=0).last()
    chosen["code"], chosen["(untagged)"] = many, many
    chosen["story"] = pd.concat([many, pd.Series({"flips": 9})]).groupby(level=0).last()
    profile = profiles.make_profile(make_manifest(ALWAYS), "window", chosen)
    import json

    read = parse_profile(json.loads(profiles.to_json(profile)))
    assert read == profile
    assert list(read.datasets) == ["code"], "no sample that is too small, and untagged traffic takes the default"
    assert read.ignored() == []
    assert (read.threshold_for("code"), read.backed_default) == (0.5, 0.5)
    why = profiles.left_out(chosen)
    assert set(why) == {"arith", "story", "(untagged)"}
    assert why["story"].startswith("sample too small: 3,000 steps, 9 flips;")
    assert read.sglang_version == "0.5.17"
    assert read.dtype == "bfloat16"


def test_a_profile_without_a_large_sample_keeps_the_servers_default() -> None:
    row = pd.Series({"threshold": 0.0, "steps": 144, "flips": 0, "trigger_rate": 0.0, "missed": 0, "miss_upper": 0.02})
    profile = profiles.make_profile(make_manifest(ALWAYS), "window", {"arith": row, "(untagged)": row})
    assert (profile.datasets, profile.default_threshold) == ({}, DEFAULT_THRESHOLD)


# links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1", "1e3", "²", "9" * 12, "", None, "0x1"])
def test_bad_steps_are_no_steps(value: object) -> None:
    assert links.parse_step(value) is None


def test_links_quote_what_they_carry() -> None:
    assert links.href("request", "a b", "x&y=z", 3) == "request?run=a+b&request=x%26y%3Dz&step=3"
    assert links.known_run("../a", ["a"]) is None
    assert links.known_run(["a"], ["a"]) is None
    ids, numbers = ["a b", "x&y=1", "ü/ö", "plain"], [3, 1, 4, 1]
    assert links.hrefs("request", "r un", ids, numbers) == [
        links.href("request", "r un", rid, number=n) for rid, n in zip(ids, numbers)
    ]


def test_an_invariance_map_becomes_a_table_and_damage_is_left_out() -> None:
    layer = {
        "name": "o_proj",
        "shape": [4096, 2048],
        "count": 32,
        "head": False,
        "classes": [[1, 24, 0], [25, 31, 1], [32, 32, None]],
    }
    table = tables.map_table({"layers": [layer, {"name": "torn"}, "text"]})
    assert table["inputs"].tolist() == [2048]
    assert table["rows of each class"].tolist() == ["1–24: 0, 25–31: 1, 32: place matters"]
    assert tables.map_table(None).empty
    assert tables.map_table({"layers": 3}).empty


def test_steps_verified_whatever_their_margin_are_no_audit() -> None:
    """Windows that close at their limit would be taken for a sample of the steps that nobody verified."""
    words = ["none", "audit", "always", "limit", "resume", "margin", None]
    for reason in (pd.Series(words, dtype=object), pd.Series(words, dtype="category")):
        steps = pd.DataFrame({"reason": reason, "triggered": [w == "margin" for w in words]})
        assert states.examined(steps).tolist() == [False, True, True, False, False, False, False]
