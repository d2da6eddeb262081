"""Kept invariance maps: used where they hold, and probed anew, with the reason, wherever they may not."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_margingate import machine
from sglang_margingate.canonical import map_store
from sglang_margingate.canonical.invariance import InvarianceMap, MapError
from sglang_margingate.canonical.linear_probe import LinearKind
from sglang_margingate.canonical.map_store import load, map_of, map_path, readable, save
from sglang_margingate.config import ConfigError, default_map_dir

ROWS = [*range(1, 17), 24, 32]
HERE = {"device": "NVIDIA H200", "driver": "570.1", "torch": "2.11.0"}


class Model:
    """Two layers and a head that sum row by row; up to ``split`` rows the first one sums in two parts."""

    def __init__(self, split: int = 0) -> None:
        self.split, self.calls = split, 0
        self.kinds = [
            LinearKind("first", self._weight(64), None, self._apply(0, True), False, "Plain", 3),
            LinearKind("second", self._weight(32), None, self._apply(1, False), False, "Plain"),
            LinearKind("lm_head", self._weight(48), None, self._apply(2, False), True, "matmul"),
        ]

    def _weight(self, outputs: int) -> torch.Tensor:
        return torch.nn.Parameter(torch.randn(outputs, 64).bfloat16(), requires_grad=False)

    def _apply(self, at: int, splits: bool) -> Callable[..., torch.Tensor]:
        def apply(x: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
            self.calls += 1
            products = x[:, None, :].float() * self.kinds[at].weight.float()
            if splits and len(x) <= self.split:
                return (products[..., :20].sum(-1) + products[..., 20:].sum(-1)).bfloat16()
            return torch.stack([row.sum(-1) for row in products]).bfloat16()

        return apply


def start(folder: Path | None, model: Model | None = None, keep: bool = True, **changes: Any) -> InvarianceMap:
    here = {**HERE, **changes}
    here = {name: value for name, value in here.items() if value is not None}
    return map_of((model or Model()).kinds, ROWS, here, None if folder is None else str(folder), keep=keep)


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_second_start_reads_what_the_first_one_probed(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    first = start(folder)
    assert (first.file, first.checked_seconds) == (str(the_file(folder)), None)
    again = Model()
    second = start(folder, again)
    assert second.checked_seconds is not None
    assert second.layers == first.layers
    assert second.environment == first.environment
    assert second.seconds == pytest.approx(first.seconds, abs=1e-3)
    assert again.calls <= 3 * 2 * len(ROWS)
    assert first.origin() == f"probed in {first.seconds:.1f} s, kept in {first.file}"
    assert second.origin().startswith(f"read from {first.file}, spot check ")


def test_the_file_is_named_after_the_device_and_readable(tmp_path: Path) -> None:
    start(tmp_path)
    path = the_file(tmp_path)
    assert path.name.startswith("nvidia-h200-")
    assert len(path.stem.removeprefix("nvidia-h200-")) == 12
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= map_store.WIDTH
    data = json.loads(text)
    assert data["schema"] == map_store.SCHEMA
    assert data["environment"] == HERE
    assert {"file", "checked_seconds"}.isdisjoint(data)


def test_a_start_without_a_folder_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = start(None)
    assert (found.file, list(tmp_path.iterdir())) == (None, [])
    assert found.origin().endswith("not kept")


def test_names_and_counts_come_from_the_model_that_is_served(tmp_path: Path) -> None:
    start(tmp_path)
    other = Model()
    other.kinds = [replace(kind, name=f"other.{kind.name}", count=9) for kind in other.kinds]
    found = start(tmp_path, other)
    assert found.checked_seconds is not None
    assert {(x.name, x.count) for x in found.layers} == {("other.first", 9), ("other.second", 9), ("other.lm_head", 9)}


@pytest.mark.parametrize(
    "change",
    [
        lambda kind: replace(kind, weight=torch.zeros(64, 32, dtype=torch.bfloat16)),
        lambda kind: replace(kind, weight=kind.weight.float()),
        lambda kind: replace(kind, bias=torch.zeros(64)),
        lambda kind: replace(kind, method="Fp8LinearMethod"),
        lambda kind: replace(kind, head=True),
    ],
)
def test_other_layers_have_another_file(change: Callable[[LinearKind], LinearKind]) -> None:
    kinds = Model().kinds
    path = map_path("d", kinds, ROWS, HERE)
    assert map_path("d", Model().kinds, ROWS, {**HERE, "torch": "9"}) == path
    assert map_path("d", [change(kinds[0]), *kinds[1:]], ROWS, HERE) != path
    assert map_path("d", kinds, ROWS[:-1], HERE) != path
    assert map_path("d", kinds, ROWS, {"device": "NVIDIA H100"}) != path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"driver": "580.2"}, "driver: stored '570.1', here '580.2'"),
        ({"driver": None}, "driver: stored '570.1', here not set"),
        ({"OMP_NUM_THREADS": "2"}, "OMP_NUM_THREADS: stored not set, here '2'"),
        ({"driver": "580.2", "torch": "2.13.0"}, "driver: stored '570.1', here '580.2'; torch: stored '2.11.0', here"),
    ],
)
def test_a_map_from_elsewhere_is_probed_anew_and_the_log_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], line: str
) -> None:
    start(tmp_path)
    assert not caplog.records
    found = start(tmp_path, **changes)
    assert found.checked_seconds is None
    (record,) = caplog.records
    assert line in record.message
    assert str(the_file(tmp_path)) in record.message
    assert start(tmp_path, **changes).checked_seconds is not None, "the file was not overwritten"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "damaged"),
        (lambda path: path.write_text("[" * 100_000), "damaged"),
        (lambda path: path.write_text("[]"), "schema"),
        (_edit(lambda d: d.update(schema="margingate-map/0")), "schema is 'margingate-map/0'"),
        (_edit(lambda d: d.pop("schema")), "schema is None"),
        (_edit(lambda d: d.pop("environment")), "'environment' is missing"),
        (_edit(lambda d: d["layers"][0].pop("classes")), "'classes' is missing"),
        (_edit(lambda d: d["layers"].pop()), "layers or rows"),
        (_edit(lambda d: d["layers"][0].update(shape=[1, 2])), "layers or rows"),
        (_edit(lambda d: d["layers"][0].update(probed=[[1, 16, 1]], classes=[[1, 16, 0]])), "layers or rows"),
    ],
)
def test_a_damaged_map_is_rebuilt_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], message: str
) -> None:
    good = start(tmp_path)
    damage(the_file(tmp_path))
    found = start(tmp_path)
    assert found.checked_seconds is None
    assert found.layers == good.layers
    (record,) = caplog.records
    assert message in record.message
    assert "\n" not in record.message
    assert start(tmp_path).checked_seconds is not None, "the file was not overwritten"


def test_a_map_that_no_longer_holds_fails_its_spot_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    healthy = start(tmp_path)
    assert set(healthy.layers[0].labels.values()) == {0}
    found = start(tmp_path, Model(split=4))
    assert found.checked_seconds is None
    assert found.layers[0].runs() == [(1, 4, 0), (5, 32, 1)]
    (record,) = caplog.records
    assert "spot check" in record.message
    assert "first at M = 5" in record.message
    assert "second" not in record.message
    assert start(tmp_path, Model(split=4)).checked_seconds is not None, "the file was not overwritten"
    assert start(tmp_path, Model(split=5)).checked_seconds is None, "a border that moved by one was not seen"


def test_a_model_broken_on_purpose_reads_but_never_writes(tmp_path: Path) -> None:
    healthy = start(tmp_path)
    before = the_file(tmp_path).read_bytes()
    broken = start(tmp_path, Model(split=4), keep=False)
    assert len(broken.layers[0].runs()) == 2
    assert broken.file is None
    assert the_file(tmp_path).read_bytes() == before
    assert start(tmp_path).layers == healthy.layers
    start(tmp_path / "other", keep=False)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_is_a_warning_that_names_the_flag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = start(tmp_path / "file" / "below")
    assert found.file is None
    assert len(found.layers) == 3
    line = caplog.records[-1].message
    assert "--margingate-map-dir" in line
    assert str(tmp_path / "file" / "below") in line


def test_a_write_that_fails_half_way_leaves_the_old_map_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = start(tmp_path)
    path = the_file(tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert save(path, found) is False
    assert the_file(tmp_path).read_bytes() == before
    assert "No space left on device" in caplog.text


def test_nothing_kept_is_no_reason_for_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        start(tmp_path)
    assert not caplog.records
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json", Model().kinds, ROWS, HERE)
    with pytest.raises(MapError, match="cannot be read"):
        load(tmp_path, Model().kinds, ROWS, HERE)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        [[1, 2, None]],
        {"a": ["x" * 200, "[ 1,  2 ]"], "b": [[k, k + 1, 0] for k in range(50)]},
        {"us": {rows: rows * 1.5 for rows in range(100)}, 'a "b"': {True: "x" * 200, None: 1}},
    ],
)
def test_readable_json_is_the_same_json(value: Any) -> None:
    assert json.loads(readable(value)) == json.loads(json.dumps(value))


# ---- what a map is bound to -------------------------------------------------------------------------------------------


def test_a_cpus_maps_are_bound_to_processor_threads_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = machine.kernel_environment("cpu")
    assert found["device"] == machine.device_name("cpu")
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert {"OMP_NUM_THREADS", "driver", "compute_capability"}.isdisjoint(found)
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.kernel_environment("cpu")["OMP_NUM_THREADS"] == "1"


def test_a_gpus_maps_are_bound_to_driver_cuda_and_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "570.1")
    monkeypatch.setattr(machine, "version", lambda name: f"version of {name}")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    found = machine.kernel_environment("cuda")
    assert (
        found.items()
        >= {
            "device": "NVIDIA H200",
            "driver": "570.1",
            "compute_capability": "9.0",
            "multiprocessors": "132",
            "cuda": "13.0",
            "cublas": "version of nvidia-cublas",
            "torch": "version of torch",
            "flashinfer-python": "version of flashinfer-python",
            "sglang": "version of sglang",
            "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        }.items()
    )
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\nGCC 12.3.0\n",
            "550.54.14",
        ),
    ],
)
def test_the_drivers_version_is_read_from_proc(tmp_path: Path, line: str, driver: str) -> None:
    (tmp_path / "version").write_text(line)
    assert machine.nvidia_driver(tmp_path / "version") == driver


@pytest.mark.parametrize(("script", "driver"), [("echo 580.65.06; echo 580.65.06", "580.65.06"), ("exit 9", None)])
def test_without_proc_nvidia_smi_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, driver: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_driver(tmp_path / "none") is None
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.nvidia_driver(tmp_path / "none") == driver


# ---- the flag ---------------------------------------------------------------------------------------------------------


def test_maps_lie_in_the_users_cache_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_margingate.serving.frontdoor import build_parser, parse

    def folder(*argv: str) -> str | None:
        return parse(["--device", "cpu", *argv])[0].map_dir

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert folder() == default_map_dir() == str(tmp_path / ".cache/margingate/maps")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder() == str(tmp_path / ".cache/margingate/maps")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == str(tmp_path / "xdg/margingate/maps")
    assert folder("--margingate-map-dir", "~/maps") == str(tmp_path / "maps")
    monkeypatch.chdir(tmp_path)
    assert folder("--margingate-map-dir", "here") == str(tmp_path / "here")
    assert folder("--margingate-map-dir", "off") is None
    with pytest.raises(ConfigError, match="--margingate-map-dir: ''"):
        folder("--margingate-map-dir", "")
    assert "--margingate-map-dir DIR" in build_parser().format_help()
    assert not (tmp_path / "xdg").exists(), "parsing must not write"


# ---- what `margingate probe` prints -----------------------------------------------------------------------------------


def test_the_probe_command_says_where_the_map_lies_and_how_it_was_come_by(tmp_path: Path) -> None:
    from sglang_margingate.bench.cmd_probe import render

    def printed(found: InvarianceMap, *without: str, prefill: str | None = "batched") -> str:
        data = {name: value for name, value in found.to_dict().items() if name not in without}
        return render({"map": data, "decode_ok": True, "prefill": prefill, "decode_rows": "1-32", "verify_rows": 16,
                       "graph_sizes": [], "notes": []})  # fmt: skip

    first = start(tmp_path)
    assert f"kept in {the_file(tmp_path)}" in printed(first)
    assert "1-32:a" in printed(first)
    assert f"read from {the_file(tmp_path)}, spot check" in printed(start(tmp_path))
    assert "one request at a time, on the grid" in printed(first, prefill="grid")
    assert "no response has a guarantee" in printed(first, prefill=None)
    assert "not kept" in printed(first, "file", "checked_seconds"), "a server of an earlier version"
