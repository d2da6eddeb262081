"""Settings, request parameters and profiles: round trips, and errors that name the field and the fix."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_margingate.config import (
    CONFIG_ENV,
    DEFAULT_THRESHOLD,
    ConfigError,
    Keep,
    MarginGateConfig,
    Policy,
    parse_keep,
)
from sglang_margingate.gate.profile import (
    DatasetThreshold,
    Profile,
    enough_evidence,
    load_profile,
    parse_profile,
    too_small,
)
from sglang_margingate.gate.request import RequestRules
from sglang_margingate.serving.launcher_hooks import before_killing


def profile(**changes: Any) -> dict[str, Any]:
    good = Profile(
        "m", "bfloat16", "torch_native", "cpu", "0.5.17", "2.13.0", "2026-11-22", "window", 0.3,
        {"arith": DatasetThreshold(0.1, 20_000, 40), "story": DatasetThreshold(0.2, 20_000)},
    ).to_dict()  # fmt: skip
    return {**good, **changes}


def test_config_survives_json() -> None:
    config = MarginGateConfig(policy=Policy.ALWAYS, threshold=0.25, profile=profile(), notes=("n",))
    assert MarginGateConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("policy", "maybe", "--margingate-policy"),
        ("repair", "all", "--margingate-repair"),
        ("radix", "yes", "--margingate-radix"),
        ("threshold", -0.1, "--margingate-threshold"),
        ("threshold", float("nan"), "--margingate-threshold"),
        ("threshold", "low", "--margingate-threshold"),
        ("audit_rate", 1.1, "--margingate-audit-rate"),
        ("max_miss", -1, "--margingate-max-miss"),
        ("verify_rows", 0, "--margingate-verify-rows"),
        ("verify_rows", 2.5, "--margingate-verify-rows"),
        ("chunk", 0, "--margingate-chunk"),
        ("window", 0, "--margingate-window"),
        ("window", True, "--margingate-window"),
        ("threshold", float("inf"), "--margingate-threshold"),
        ("threshold", 10**400, "--margingate-threshold"),
        ("audit_rate", float("nan"), "--margingate-audit-rate"),
        ("audit_rate", 10**400, "--margingate-audit-rate"),
        ("trace", "yes", "--margingate-trace"),
        ("map_dir", 3, "--margingate-map-dir"),
        ("profile", [], "--margingate-profile"),
        ("trace_keep", "30", "--margingate-trace-keep"),
        ("trace_keep", 30, "--margingate-trace-keep"),
    ],
)
def test_wrong_settings_name_flag_and_value(field: str, value: Any, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MarginGateConfig(**{field: value})
    assert flag in str(caught.value)
    assert repr(value)[:30] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_miss": 0.01}, "--margingate-audit-rate"),
        ({"max_miss": 0.01, "audit_rate": 0.1, "policy": "always"}, "--margingate-policy gate"),
        ({"max_miss": 0.01, "audit_rate": 0.1, "policy": "log"}, "--margingate-policy gate"),
    ],
)
def test_a_limit_of_missed_flips_needs_something_to_measure(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"--margingate-max-miss: 0.01 .*{says}"):
        MarginGateConfig(**given)
    assert MarginGateConfig(max_miss=0.01, audit_rate=0.1).max_miss == 0.01


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("30d,20GB", Keep(30 * 86_400, 20 * 10**9)), ("20gb, 30D", Keep(30 * 86_400, 20 * 10**9)), ("12h", Keep(43_200)),
        ("2w", Keep(14 * 86_400)), ("500MB", Keep(None, 500 * 10**6)), ("off", Keep()),
    ],
)  # fmt: skip
def test_what_is_kept_of_the_traces(text: str, keep: Keep) -> None:
    assert parse_keep(text) == keep
    assert parse_keep(str(keep)) == keep


@pytest.mark.parametrize(
    "text", ["", "0d", "30", "d", "30d,40d", "30d,", "-1d", "1.5GB", "30m", "9999999d", "30d,20GB,1h"]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--margingate-trace-keep: .*30d,20GB, or off"):
        parse_keep(text)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"threshold": NaN}',
        '{"chunk": 1, "chunk": 2}',
        "[" * 100_000,
        '{"chunk": ' + "9" * 401 + "}",
        "1e999",
    ],
)
def test_a_broken_configuration_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="MARGINGATE_CONFIG") as caught:
        MarginGateConfig.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_configuration_travels_in_a_private_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    many = {f"dataset-{i:04}": DatasetThreshold(0.1, 20_000).__dict__ for i in range(2000)}
    config = MarginGateConfig(profile=profile(datasets=many))
    with config.handed_over() as path:
        assert len(os.environ[CONFIG_ENV]) < 200
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        assert MarginGateConfig.from_env() == config
        code = (
            "from sglang_margingate.config import MarginGateConfig as C; print(len(C.from_env().profile['datasets']))"
        )
        assert (
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "2000\n"
        )
    assert not path.parent.exists()
    assert MarginGateConfig.from_env() is None


def test_a_launcher_that_is_about_to_be_killed_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    with MarginGateConfig().handed_over() as path:
        before_killing(os.getpid(), include_parent=False)
        before_killing(os.getppid())
        before_killing(None)
        assert path.exists(), "this process goes on"
        before_killing(os.getpid())
        assert not path.parent.exists()
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "mine.json"))
    before_killing(os.getpid())
    assert (tmp_path / "mine.json").exists(), "not a folder that we made"


def test_a_configuration_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"cannot read .*gone.*No such file"):
        MarginGateConfig.from_env()


def test_unknown_config_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="tau"):
        MarginGateConfig.from_json('{"tau": 1}')


def test_thresholds_come_from_request_then_profile_then_flag_then_default() -> None:
    rules = RequestRules(MarginGateConfig(threshold=0.7, profile=profile()))
    assert rules.parse({"margingate_dataset": "arith", "margingate_threshold": 0.9}).threshold == 0.9
    assert rules.parse({"margingate_dataset": "arith"}).threshold == 0.1
    assert rules.parse({"margingate_dataset": "other"}).threshold == 0.7
    assert RequestRules(MarginGateConfig(profile=profile())).parse({}).threshold == DEFAULT_THRESHOLD
    assert RequestRules(MarginGateConfig(profile=profile(default_threshold=0.8))).parse({}).threshold == 0.8
    assert RequestRules(MarginGateConfig()).parse(None).threshold == DEFAULT_THRESHOLD


def small(**entries: DatasetThreshold) -> dict[str, Any]:
    return profile(default_threshold=0.0, datasets={k.replace("untagged", ""): v.__dict__ for k, v in entries.items()})


def test_a_profile_that_says_nothing_does_not_win() -> None:
    """A warm-up request of 7 steps, and a calibration of 6 prompts of 24 tokens, once gated everybody at 0."""
    given = small(untagged=DatasetThreshold(0.0, 7), arith=DatasetThreshold(0.0, 138, 1))
    rules = RequestRules(MarginGateConfig(profile=given))
    assert rules.threshold_for("") == rules.threshold_for("arith") == rules.threshold_for("other") == DEFAULT_THRESHOLD
    assert RequestRules(MarginGateConfig(profile=given, threshold=0.7)).threshold_for("arith") == 0.7
    assert rules.thresholds() == {"arith": DEFAULT_THRESHOLD}
    lines = parse_profile(given).ignored()
    assert len(lines) == 2
    assert "untagged traffic takes the default threshold" in lines[0]
    assert "138 steps, 1 flips" in lines[1]


def test_the_untagged_entry_never_shadows_the_default() -> None:
    given = small(untagged=DatasetThreshold(0.0, 10**6, 500), arith=DatasetThreshold(0.25, 20_000, 20))
    rules = RequestRules(MarginGateConfig(profile={**given, "default_threshold": 0.25}))
    assert (rules.threshold_for(""), rules.threshold_for("arith"), rules.threshold_for("other")) == (0.5, 0.25, 0.5)
    assert RequestRules(MarginGateConfig(profile=given, threshold=0.7)).threshold_for("") == 0.7


def test_a_dataset_whose_sample_is_too_small_beside_one_that_is_not() -> None:
    given = small(arith=DatasetThreshold(0.25, 20_000, 20), code=DatasetThreshold(0.0, 100))
    rules = RequestRules(MarginGateConfig(profile={**given, "default_threshold": 0.25}))
    assert (rules.threshold_for("arith"), rules.threshold_for("code")) == (0.25, DEFAULT_THRESHOLD)


def test_traffic_that_was_not_calibrated_is_not_gated_at_anothers_threshold() -> None:
    """A profile of arithmetic alone once gated stories at 0.008: one in 24 changed with the batch, labelled `gated`."""
    given = small(arith=DatasetThreshold(0.008, 20_000, 20))
    rules = RequestRules(MarginGateConfig(profile={**given, "default_threshold": 0.008}))
    assert (rules.threshold_for("arith"), rules.threshold_for("story"), rules.threshold_for("")) == (0.008, 0.5, 0.5)


def test_foreign_custom_params_are_left_alone() -> None:
    assert RequestRules(MarginGateConfig()).parse({"thinking_budget": 5}).policy is Policy.GATE


@pytest.mark.parametrize(
    "custom",
    [
        {"margingate_policy": "maybe"}, {"margingate_threshold": "x"}, {"margingate_threshold": float("nan")},
        {"margingate_dataset": 3}, {"margingate_dataset": "x" * 65}, {"margingate_return_steps": 1}, {"margingate_typo": 1}, {"margingate_repeat": -1}, {"margingate_repeat": True}, {"margingate_repeat": "1"},
    ],
)  # fmt: skip
def test_wrong_request_parameters_name_their_field(custom: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="custom_params." + next(iter(custom))):
        RequestRules(MarginGateConfig()).parse(custom)


def test_a_request_cannot_be_gated_by_a_server_without_a_verifier() -> None:
    with pytest.raises(ConfigError, match="--margingate-policy gate"):
        RequestRules(MarginGateConfig(policy=Policy.LOG)).parse({"margingate_policy": "always"})


def test_profile_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    original = parse_profile(profile())
    original.save(path)
    assert load_profile(path) == original
    assert original.mismatches(device="gpu", repair="window") == ["device: profile 'cpu', server 'gpu'"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"schema": "margingate-profile/9"}, "schema"),
        ({"tau": 1}, "tau"),
        ({"default_threshold": -1}, "default_threshold"),
        ({"datasets": {"a": {}}}, "datasets.a"),
        ({"datasets": {"a": {"threshold": "x"}}}, "datasets.a.threshold"),
        ({"datasets": {"a": {"threshold": 1, "tau": 2}}}, "tau"),
        ({"datasets": []}, "datasets"),
        ({"datasets": {"a": {"threshold": 1, "steps": "many"}}}, "datasets.a.steps: 'many'"),
        ({"datasets": {"a": {"threshold": 1, "steps": -1}}}, "datasets.a.steps: -1"),
        ({"datasets": {"a": {"threshold": 1, "steps": 1.5}}}, "datasets.a.steps: 1.5"),
        ({"datasets": {"a": {"threshold": 1, "steps": True}}}, "datasets.a.steps: True"),
        ({"datasets": {"a": {"threshold": True}}}, "datasets.a.threshold: True"),
        ({"datasets": {"a": {"threshold": "1"}}}, "datasets.a.threshold: '1'"),
        ({"datasets": {"a": {"threshold": 1, "trigger_rate": float("nan")}}}, "datasets.a.trigger_rate: nan"),
        ({"datasets": {"a": {"threshold": 1, "miss_upper_95": 1.5}}}, "datasets.a.miss_upper_95: 1.5"),
        ({"datasets": {"a": {"threshold": float("inf")}}}, "datasets.a.threshold: inf"),
        ({"datasets": {"a": {"threshold": 1, "flips": 3, "steps": 2}}}, "datasets.a: 0 missed of 3 flips of 2 steps"),
        ({"datasets": {"a": {"threshold": 10**400}}}, "datasets.a.threshold"),
        ({"default_threshold": float("inf")}, "default_threshold: inf"),
        ({"model": 3}, "model: 3"),
    ],
)
def test_wrong_profiles_name_the_place(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(names)) as caught:
        parse_profile(profile(**change))
    assert "\n" not in str(caught.value)
    assert "margingate calibrate" in str(caught.value) or "schema" in names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ' * 100_000, "nested too deeply"), ('{"model": "a", "model": "b"}', "'model' is given twice"),
        ('{"default_threshold": ' + "9" * 401 + "}", "401 digits"), ('{"default_threshold": NaN}', "NaN"),
        ('{"default_threshold": 1e999}', "too large"), ("[1]", "not a JSON object"), ("", "not valid JSON"),
    ],
)  # fmt: skip
def test_a_file_that_no_calibration_wrote_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_profile_without_a_field_or_file(tmp_path: Path) -> None:
    short = profile()
    del short["model"]
    with pytest.raises(ConfigError, match="model"):
        parse_profile(short)
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        load_profile(tmp_path / "nothing.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_profile(broken)


def test_profiles_are_plain_json() -> None:
    assert json.loads(json.dumps(profile()))["schema"] == "margingate-profile/1"


@pytest.mark.parametrize(
    ("steps", "flips", "enough"),
    [(7, 0, False), (144, 1, False), (2_999, 500, False), (3_000, 9, False), (3_000, 10, True), (9_999, 0, False),
     (10_000, 0, True)],
)  # fmt: skip
def test_a_threshold_needs_steps_and_flips(steps: int, flips: int, enough: bool) -> None:
    assert enough_evidence(steps, flips) is enough
    assert f"{steps:,} steps, {flips:,} flips" in too_small(steps, flips)
