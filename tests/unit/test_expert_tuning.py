"""What is tried when experts are tuned: the shape in a model's configuration, SGLang's own configurations and a grid around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_moe

from sglang_margingate.canonical.experts.table import FIELDS, BankShape, ExpertTable, short
from sglang_margingate.serving.layers.tuning import candidates, config, shape_in


def model(folder: Path, **change: object) -> str:
    (folder / "config.json").write_text(json.dumps(tiny_moe.config(64) | change))
    return str(folder)


def test_the_shape_is_that_of_the_models_banks(tmp_path: Path) -> None:
    assert shape_in(model(tmp_path)) == BankShape(tiny_moe.EXPERTS, tiny_moe.INNER, tiny_moe.HIDDEN, 2)


def test_a_mixtrals_experts_have_its_intermediate_size(tmp_path: Path) -> None:
    given: dict[str, object] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
    }
    given |= {"intermediate_size": 96, "num_experts": None, "moe_intermediate_size": None}
    assert shape_in(model(tmp_path, **given)) == BankShape(8, 96, tiny_moe.HIDDEN, 2)


def test_a_dense_model_has_nothing_to_tune(tmp_path: Path) -> None:
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    with pytest.raises(ValueError, match="is no mixture of experts"):
        shape_in(str(tmp_path))


def test_the_grid_holds_what_sglang_chooses_from_and_each_configuration_once() -> None:
    own = [config(16, 256, 128, 1, 8, 3), config(16, 64, 64, 1, 4, 3)]  # the second is in the grid too
    tried = candidates(own)
    assert tried[:2] == own
    assert len({short(one) for one in tried}) == len(tried) > 20
    assert all(tuple(one) == FIELDS for one in tried)
    assert {one["BLOCK_SIZE_M"] for one in tried} == {16, 32, 64, 128}
    ExpertTable(tuple(enumerate(tried, 1)))  # a table would take every one of them
