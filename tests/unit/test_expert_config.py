"""Tables of configurations for banks of experts: what they choose, what is kept on disk, and what of it is used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_margingate.canonical.experts.table import (
    BankShape,
    ExpertTable,
    TableError,
    kept_table,
    save_table,
    table_of,
    table_path,
)

HERE = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}
SHAPE = BankShape(128, 768, 2048, 8)


def config(rows: int = 16, **more: int) -> dict[str, int]:
    return {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, **more}


TABLE = ExpertTable(((64, config(16)), (16384, config(64))), "tuned")


@pytest.mark.parametrize(("rows", "block"), [(1, 16), (64, 16), (65, 64), (16384, 64), (99999, 64)])
def test_a_table_chooses_by_rows_and_its_last_step_has_no_end(rows: int, block: int) -> None:
    assert TABLE.at(rows)["BLOCK_SIZE_M"] == block


def test_a_table_says_what_it_does_but_not_where_it_is_from() -> None:
    assert TABLE.describe() == "16/128/64/1/4 to 64, 64/128/64/1/4"


def test_somebodys_choice_becomes_a_table_that_chooses_the_same() -> None:
    tuned = {1: config(16), 32: config(16), 64: config(32), 256: config(64)}

    def nearest(rows: int) -> dict[str, int]:
        return tuned[min(tuned, key=lambda m: abs(m - rows))]

    table = table_of(nearest, range(1, 513), "SGLang's own choice")
    assert [most for most, _ in table.steps] == [48, 160, 512]  # 48 is as near to 32 as to 64: the first wins
    assert all(table.at(rows) == nearest(rows) for rows in range(1, 513))


def test_what_a_configuration_says_beyond_the_kernel_is_left_out() -> None:
    assert "USE_TMA" not in table_of(lambda rows: config() | {"USE_TMA": 1}, [1], "x").at(1)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], "do not rise"),
        ([[64, config()], [32, config()]], "do not rise"),
        ([[64, config()], [64, config()]], "do not rise"),
        ([[0, config()]], "do not rise"),
        ([[8, {**config(), "BLOCK_SIZE_M": -16}]], "up to 8 rows.*BLOCK_SIZE_M"),
        ([[8, {**config(), "BLOCK_SIZE_M": True}]], "BLOCK_SIZE_M"),
        ([[8, {**config(), "SPLIT_K": 2}]], "SPLIT_K"),
        ([[8, {"BLOCK_SIZE_M": 16}]], "BLOCK_SIZE_N"),
        ([[8, 5]], "missing or wrong"),
        (5, "missing or wrong"),
    ],
)
def test_a_wrong_table_is_one_line(steps: Any, says: str) -> None:
    with pytest.raises(TableError, match=says) as error:
        ExpertTable.from_dict({"source": "x", "steps": steps})
    assert "\n" not in str(error.value)


def test_a_kept_table_comes_back_on_this_machine(tmp_path: Path) -> None:
    path = table_path(str(tmp_path), SHAPE, HERE)
    assert path.name == "nvidia-h100-80gb-hbm3-experts-128-8-2048-768-bfloat16.json"
    save_table(path, SHAPE, TABLE, HERE, measured={"us": {"1": 40}})
    found = kept_table(str(tmp_path), SHAPE, HERE)
    assert found is not None
    assert found.steps == TABLE.steps
    assert str(path) in found.source
    assert json.loads(path.read_text())["measured"] == {"us": {"1": 40}}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_nothing_kept_is_no_table(tmp_path: Path) -> None:
    assert kept_table(None, SHAPE, HERE) is None
    assert kept_table(str(tmp_path), SHAPE, HERE) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "margingate-experts/0"}, "schema"),
        ({"shape": vars(BankShape(64, 768, 2048, 8))}, "shape"),
        ({"environment": HERE | {"torch": "2.14"}}, "torch: stored '2.14', here '2.11.0'"),
        ({"environment": None}, "tuned elsewhere"),
        ({"steps": []}, "do not rise"),
        ({"source": 0, "steps": 1}, "missing or wrong"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], says: str
) -> None:
    path = table_path(str(tmp_path), SHAPE, HERE)
    save_table(path, SHAPE, TABLE, HERE)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert kept_table(str(tmp_path), SHAPE, HERE) is None
    (record,) = caplog.records
    assert says in record.message
    assert path.name in record.message


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 10_000])
def test_a_damaged_file_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    table_path(str(tmp_path), SHAPE, HERE).write_text(text)
    assert kept_table(str(tmp_path), SHAPE, HERE) is None
    assert len(caplog.records) == 1
