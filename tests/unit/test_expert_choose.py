"""Which configurations a tuned table takes: the fastest class for decode, the fastest for prefill, the fastest of it for each M."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_margingate.bench.cmd_tune import render
from sglang_margingate.canonical.experts.choose import LARGEST, Measured, choose, ratios, united
from sglang_margingate.canonical.experts.table import BankShape, ExpertTable, TableError, kept_table
from sglang_margingate.cli import main


def one(name: int, bits: int | None, **us: float) -> Measured:
    config = {"BLOCK_SIZE_M": name, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    return Measured(config, bits, {int(rows[1:]): time for rows, time in us.items()})


def blocks(given: object) -> list[tuple[int, int]]:
    return [(most, config["BLOCK_SIZE_M"]) for most, config in given.steps]  # type: ignore[attr-defined]


def test_steps_of_decode_share_their_bits_though_another_class_wins_at_one_size() -> None:
    tried = [
        one(16, 1, r1=10, r64=30, r1024=200),
        one(32, 1, r1=20, r64=20, r1024=150),
        one(64, 2, r1=30, r64=15, r1024=80),  # fastest at 64, but slow at 1 and with other bits
        one(128, 2, r1=40, r64=40, r1024=70),
    ]
    found_table = choose(tried)
    assert blocks(found_table) == [(1, 16), (64, 32), (LARGEST, 128)]
    assert ratios(found_table, tried, {1: 10, 64: 15, 1024: 70}) == {1: 1.0, 64: 20 / 15, 1024: 1.0}


def test_one_class_may_serve_both() -> None:
    tried = [one(16, 1, r1=10, r1024=100), one(64, 2, r1=11, r1024=101)]
    assert blocks(choose(tried)) == [(LARGEST, 16)]


def test_what_depends_on_companions_or_does_not_fit_is_left_out() -> None:
    tried = [one(16, None, r1=1, r1024=1), one(32, 5), one(64, 2, r1=11, r1024=101)]
    assert blocks(choose(tried)) == [(LARGEST, 64)]


def test_nothing_that_holds_is_one_line() -> None:
    with pytest.raises(TableError, match="none of 1 configurations"):
        choose([one(16, None, r1=1)])


def test_what_came_out_is_said_in_a_few_lines() -> None:
    tried = [one(16, 1, r1=10, r1024=100), one(64, None, r1=11, r1024=101)]
    found_table = choose(tried)
    text = render(tried, {1: 1.0, 1024: 0.5}, {1: 10.0, 1024: 200.0}, found_table.describe())
    assert "1 of 2 give a row the same bits among all companions, in 1 classes" in text
    assert "table: 16/64/64/1" in text
    assert "0.50" in text


class Bank:
    """A bank whose configurations of 16 and 32 share their bits, and one of 64 that does not fit."""

    def __init__(self, shape: BankShape) -> None:
        self.fixed: list[object] = []

    def own_configs(self) -> list[object]:
        return [one(block, None).config for block in (16, 32, 64)]

    def measure(self, config: object) -> dict[int, float]:
        block = int(by_block(config))
        return {} if block == 64 else {1: float(block), 1024: 100.0 - block}

    def bits(self, configs: list[object]) -> list[int | None]:
        return [{16: 7, 32: 7}[int(by_block(each))] for each in configs]

    def fix(self, config: object, kernel_sum: bool = True) -> None:
        self.fixed.append((config, kernel_sum))

    def times(self, rows: object) -> dict[int, float]:
        assert self.fixed == [(None, False)]
        return {1: 20.0, 1024: 100.0}


def test_a_table_is_tuned_said_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, ended = BankShape(8, 32, 64, 2), SimpleNamespace(wait=lambda: 0, returncode=0)
    fake = SimpleNamespace(
        shape_in=lambda model: shape, publish=lambda model: None, Bank=Bank, candidates=list, TIMED=(1, 1024),
        compile_all=lambda model: [ended],
    )  # fmt: skip
    monkeypatch.setattr("sglang_margingate.serving.cpu.is_cpu_host", lambda: False)
    monkeypatch.setattr("sglang_margingate.serving.cpu.install_stand_ins", lambda: None)
    monkeypatch.setattr("sglang_margingate.machine.kernel_environment", lambda device: {"device": "A GPU"})
    monkeypatch.setitem(sys.modules, "sglang_margingate.serving.layers.tuning", fake)
    monkeypatch.setattr("sglang_margingate.serving.layers.tuning", fake, raising=False)
    assert main(["tune-experts", "--model-path", "m", "--margingate-map-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3/3 64/64/64/1: does not fit this GPU" in said
    assert "2 of 3 give a row the same bits among all companions, in 1 classes" in said
    found = kept_table(str(tmp_path), shape, {"device": "A GPU"})
    assert found is not None
    assert blocks(found) == [(1, 16), (LARGEST, 32)]
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["of_stock"] == {"1": 0.8, "1024": 0.68}

    ended.wait, ended.returncode = (lambda: 1), 1
    assert main(["tune-experts", "--model-path", "m", "--margingate-map-dir", str(tmp_path)]) == 2
    assert "a process that compiles ended with exit status 1" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune-experts", "--model-path", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("margingate tune-experts: error: no GPU is in use here")
    assert said.count("\n") == 1


def table(*steps: tuple[int, int]) -> ExpertTable:
    return ExpertTable(tuple((most, one(block, None).config) for most, block in steps), "SGLang's own choice")


def by_block(config: object) -> str:
    return str(config["BLOCK_SIZE_M"])  # type: ignore[index]


def test_a_choice_in_one_class_stays_as_it_is() -> None:
    given = table((1, 16), (32, 32), (256, 48), (1024, 64), (8192, 128))
    bits = {"16": 1, "32": 1, "48": 1, "64": 2, "128": 2}
    assert united(given, bits, by_block) == given


def test_what_has_other_bits_takes_its_neighbours_configuration() -> None:
    given = table((1, 16), (7, 32), (64, 48), (300, 64), (8192, 128))
    found = united(given, {"16": 9, "32": 1, "48": 1, "64": 3, "128": 2}, by_block)
    assert blocks(found) == [(7, 32), (256, 48), (8192, 128)]
    assert found.source == "SGLang's own choice"


def test_the_class_that_serves_most_doublings_wins() -> None:
    given = table((4, 16), (256, 32), (8192, 64))
    assert blocks(united(given, {"16": 1, "32": 2, "64": 2}, by_block)) == [(256, 32), (8192, 64)]
    given = table((64, 16), (256, 32), (8192, 64))
    assert blocks(united(given, {"16": 1, "32": 2, "64": 2}, by_block)) == [(256, 16), (8192, 64)]


def test_what_depends_on_companions_is_never_taken() -> None:
    given = table((250, 16), (8192, 64))
    assert blocks(united(given, {"16": None, "64": 2}, by_block)) == [(8192, 64)]
    with pytest.raises(TableError, match="1 rows and more"):
        united(given, {"16": None, "64": None}, by_block)
