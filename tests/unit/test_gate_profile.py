"""What requests get, and what profiles and requests that are wrong are answered, word by word."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_margingate.config import DEFAULT_THRESHOLD, ConfigError, MarginGateConfig, Policy
from sglang_margingate.gate.profile import DatasetThreshold, Profile, load_profile, parse_profile, too_small
from sglang_margingate.gate.request import RequestParams, RequestRules


def profile(**changes: Any) -> dict[str, Any]:
    good = Profile(
        "m", "bfloat16", "torch_native", "cpu", "0.5.17", "2.13.0", "2026-11-22", "window", 0.3,
        {"arith": DatasetThreshold(0.1, 20_000, 40), "story": DatasetThreshold(0.2, 20_000)},
    ).to_dict()  # fmt: skip
    return {**good, **changes}


def small(**entries: DatasetThreshold) -> dict[str, Any]:
    return profile(default_threshold=0.0, datasets={k.replace("untagged", ""): v.__dict__ for k, v in entries.items()})


def test_what_a_request_gets_that_asks_for_nothing() -> None:
    found = RequestRules(MarginGateConfig()).parse({})
    assert found == RequestParams(Policy.GATE, DEFAULT_THRESHOLD, "", False, None)
    asked = {"margingate_dataset": "d" * 64, "margingate_return_steps": True, "margingate_repeat": 0,
             "margingate_policy": "log", "margingate_threshold": 0.25}  # fmt: skip
    assert RequestRules(MarginGateConfig()).parse(asked) == RequestParams(Policy.LOG, 0.25, "d" * 64, True, 0)
    assert RequestRules(MarginGateConfig()).thresholds() == {}
    assert RequestRules(MarginGateConfig(profile=profile())).thresholds() == {"arith": 0.1, "story": 0.2}


def test_a_server_that_verifies_nothing_still_records() -> None:
    rules = RequestRules(MarginGateConfig(policy=Policy.LOG))
    assert [rules.parse({"margingate_policy": name}).policy for name in ("log", "off")] == [Policy.LOG, Policy.OFF]


@pytest.mark.parametrize("repeat", [1, 2**31 - 1])
def test_a_repeat_is_a_number_of_31_bits(repeat: int) -> None:
    rules = RequestRules(MarginGateConfig())
    assert rules.parse({"margingate_repeat": repeat}).repeat == repeat
    with pytest.raises(ConfigError, match="2147483648 is not a whole number from 0 to"):
        rules.parse({"margingate_repeat": 2**31})


@pytest.mark.parametrize(
    ("custom", "line"),
    [
        (
            {"margingate_tau": 1},
            "custom_params.margingate_tau: unknown; known are margingate_policy, margingate_threshold, ",
        ),
        (
            {"margingate_policy": "x"},
            "custom_params.margingate_policy: 'x' is unknown; use one of off, log, gate, always",
        ),
        ({"margingate_threshold": -1}, "custom_params.margingate_threshold: -1"),
    ],
)
def test_what_a_wrong_parameter_is_answered(custom: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RequestRules(MarginGateConfig()).parse(custom)
    assert str(caught.value).startswith(line)


def test_entries_that_set_no_threshold_are_named() -> None:
    given = small(
        untagged=DatasetThreshold(0.0, 10**6, 500), a=DatasetThreshold(0.0, 5), b=DatasetThreshold(0.1, 10**5)
    )
    assert parse_profile(given).ignored() == [
        "datasets.(untagged) is not used: untagged traffic takes the default threshold",
        "datasets.a is not used: " + too_small(5, 0),
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"model": 3, "dtype": 4, "device": 5},
            "profile: model: 3: input should be a valid string (2 more like it); make ",
        ),
        ({"model": 3, "dtype": 4}, "profile: model: 3: input should be a valid string (1 more like it); make "),
        ({"model": 3}, "profile: model: 3: input should be a valid string; make "),
        ({"model": {}}, "profile: model: input should be a valid string; make "),
        (
            {"datasets": {"d" * 1001: {"threshold": 1}}},
            f"profile: datasets.{'d' * 191}: '{'d' * 59}: string should have",
        ),
        ({"datasets": {"a": {}}}, "profile: datasets.a.threshold: field required; make "),
    ],
)
def test_the_first_thing_that_is_wrong_and_how_many_more(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_profile(profile(**change))
    assert str(caught.value).startswith(line)


def test_a_profile_of_something_else() -> None:
    with pytest.raises(ConfigError, match=r"^profile: not a JSON object; make one with `margingate calibrate`$"):
        parse_profile([])
    body = profile()
    del body["schema"]
    with pytest.raises(ConfigError, match=r"^here: schema None is not 'margingate-profile/1'; calibrate again"):
        parse_profile(body, "here")


def test_a_profile_file_is_text_that_a_person_reads(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    parse_profile(profile()).save(path)
    assert path.read_text() == json.dumps(profile(), indent=2) + "\n"
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} is not UTF-8 text; name a profile$"):
        load_profile(path)
    with pytest.raises(
        ConfigError, match=f"^--margingate-profile: cannot read {re.escape(str(tmp_path))}: Is a directory$"
    ):
        load_profile(tmp_path)
