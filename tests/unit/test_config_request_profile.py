"""Settings, request parameters and profiles: round trips, and errors that name the field and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_margingate.config import DEFAULT_THRESHOLD, ConfigError, MarginGateConfig, Policy
from sglang_margingate.gate.profile import (
    DatasetThreshold,
    Profile,
    enough_evidence,
    load_profile,
    parse_profile,
    too_small,
)
from sglang_margingate.gate.request import RequestRules


def profile(**changes: Any) -> dict[str, Any]:
    good = Profile(
        "m", "bfloat16", "torch_native", "cpu", "0.5.17", "2.13.0", "2026-11-22", "window", 0.3,
        {"arith": DatasetThreshold(0.1), "story": DatasetThreshold(0.2)},
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
    ],
)
def test_wrong_settings_name_flag_and_value(field: str, value: Any, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MarginGateConfig(**{field: value})
    assert flag in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_config_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="tau"):
        MarginGateConfig.from_json('{"tau": 1}')


def test_thresholds_come_from_request_then_profile_then_flag_then_default() -> None:
    rules = RequestRules(MarginGateConfig(threshold=0.7, profile=profile()))
    assert rules.parse({"margingate_dataset": "arith", "margingate_threshold": 0.9}).threshold == 0.9
    assert rules.parse({"margingate_dataset": "arith"}).threshold == 0.1
    assert rules.parse({"margingate_dataset": "other"}).threshold == 0.7
    assert RequestRules(MarginGateConfig(profile=profile())).parse({}).threshold == 0.3
    assert RequestRules(MarginGateConfig()).parse(None).threshold == DEFAULT_THRESHOLD


def test_foreign_custom_params_are_left_alone() -> None:
    assert RequestRules(MarginGateConfig()).parse({"thinking_budget": 5}).policy is Policy.GATE


@pytest.mark.parametrize(
    "custom",
    [
        {"margingate_policy": "maybe"}, {"margingate_threshold": "x"}, {"margingate_threshold": float("nan")},
        {"margingate_dataset": 3}, {"margingate_dataset": "x" * 65}, {"margingate_return_steps": 1}, {"margingate_typo": 1},
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
    ],
)
def test_wrong_profiles_name_the_place(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        parse_profile(profile(**change))


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
