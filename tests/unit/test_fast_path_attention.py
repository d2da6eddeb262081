"""The hooks that only run on a GPU, with SGLang's side played by hand: what is left out, who attends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from margingate_kernels import decode_attention_reference

from sglang_margingate.serving import attention_hooks as attention

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 40


def test_prefill_attention_sees_the_real_rows_only() -> None:
    seen = []

    def original(_backend: Any, q: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(len(q))
        return q * 2

    q = torch.ones(8, 6)
    out = attention.extend(original, None, q, None, None, None, SimpleNamespace(extend_num_tokens=5))
    assert seen == [5]
    assert torch.equal(out, torch.cat([torch.full((5, 6), 2.0), torch.zeros(3, 6)]))
    attention.extend(original, None, q, None, None, None, SimpleNamespace(extend_num_tokens=8))
    assert seen == [5, 8], "nothing padded, nothing cut"


def model_runner(**changes: Any) -> Any:
    config = SimpleNamespace(num_attention_heads=HEADS, head_dim=DIM, get_num_kv_heads=lambda _tp: KV_HEADS)
    pool = SimpleNamespace(store_dtype=torch.bfloat16, dtype=torch.bfloat16)
    runner = {
        "model_config": config, "token_to_kv_pool": pool, "sliding_window_size": None, "dtype": torch.bfloat16,
        "device": "cpu", "model": None, "server_args": SimpleNamespace(tp_size=1), **changes,
    }  # fmt: skip
    return SimpleNamespace(**runner)


def layer(**changes: Any) -> Any:
    plain = {
        "head_dim": DIM, "v_head_dim": DIM, "logit_cap": 0.0, "sliding_window_size": -1, "is_cross_attention": False,
        "k_scale": None, "v_scale": None, "k_scale_float": None, "v_scale_float": None, "xai_temperature_len": -1, "pos_encoding_mode": "NONE", "tp_q_head_num": HEADS, "layer_id": 0,
        "scaling": DIM**-0.5, "attn_type": SimpleNamespace(value="decoder"), **changes,
    }  # fmt: skip
    return SimpleNamespace(**plain)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(attention, "_decode", None)
    found = [layer()]
    monkeypatch.setattr(attention, "_attention_layers", lambda _model: found)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window_size": 4096},
        {"dtype": torch.float32},
        {"token_to_kv_pool": SimpleNamespace(store_dtype=torch.uint8, dtype=torch.float8_e4m3fn)},
    ],
)
def test_models_that_the_kernel_does_not_fit_decode_with_flashinfer(layers: list[Any], changes: dict[str, Any]) -> None:
    assert attention.prepare(model_runner(**changes), 8) == "flashinfer without K/V split"
    assert attention._decode is None


def test_a_rank_attends_with_its_share_of_the_heads() -> None:
    def shape(ranks: int, heads: int, kv_heads: int) -> tuple[int, int, int]:
        config = SimpleNamespace(
            num_attention_heads=heads, head_dim=DIM, get_num_kv_heads=lambda over: max(1, kv_heads // over)
        )
        return attention.attention_shape(model_runner(model_config=config, server_args=SimpleNamespace(tp_size=ranks)))

    assert shape(1, 40, 8) == (40, 8, DIM)
    assert shape(4, 40, 8) == (10, 2, DIM)
    assert shape(8, 32, 4) == (4, 1, DIM), "heads of keys and values are copied where there are fewer than ranks"


@pytest.mark.parametrize(
    "changes", [{"logit_cap": 30.0}, {"v_head_dim": 8}, {"k_scale": 0.5}, {"v_scale": torch.tensor(0.5), "v_scale_float": 0.5}, {"pos_encoding_mode": "ALIBI"},
     {"attn_type": SimpleNamespace(value="encoder_only")}],
)  # fmt: skip
def test_so_do_models_with_one_odd_layer(layers: list[Any], changes: dict[str, Any]) -> None:
    layers.append(layer(**changes))
    assert attention.prepare(model_runner(), 8) == "flashinfer without K/V split"


def test_quantised_weights_without_scales_of_keys_and_values_change_nothing(layers: list[Any]) -> None:
    one = torch.tensor(1.0)
    layers.append(layer(k_scale=one, v_scale=one, k_scale_float=1.0, v_scale_float=1.0))
    assert attention.prepare(model_runner(), 8) == "margingate"


def planned(*_: Any) -> None:
    """FlashInfer's plan."""
    raise AssertionError("a plan was made that nobody reads")


def test_decode_graphs_attend_with_our_kernel(layers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.prepare(model_runner(), 8) == "margingate"
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    keys, values = draw(SLOTS, KV_HEADS, DIM), draw(SLOTS, KV_HEADS, DIM)
    indptr = torch.tensor([0, 3, 10, 11, 0, 0], dtype=torch.int32)  # the buffer is longer than the batch
    indices = torch.randperm(SLOTS, generator=generator).int()
    wrapper = SimpleNamespace(is_cuda_graph_enabled=True, begin_forward=planned)
    backend = SimpleNamespace(
        forward_metadata=SimpleNamespace(decode_wrappers=[wrapper]),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda _layer: (keys, values), start_layer=0),
        kv_indptr=[indptr], cuda_graph_kv_indices=[indices],
    )  # fmt: skip
    q = draw(3, 2 * HEADS * DIM)[:, : HEADS * DIM]  # a slice of a projection, as in SGLang

    def original(*_: Any) -> torch.Tensor:
        raise AssertionError("FlashInfer was asked")

    slots = torch.tensor([5, 6, 0])
    noted: list[torch.Tensor] = []
    monkeypatch.setattr(attention.experts, "note_padding", noted.append)
    batch = SimpleNamespace(out_cache_loc=slots)
    out = attention.decode(original, backend, q, None, None, layers[0], batch)
    assert noted == [slots], "experts must know the padding"
    want = decode_attention_reference(q.reshape(3, HEADS, DIM), keys, values, indptr[:4], indices, DIM**-0.5)
    assert torch.equal(out, want.view(3, -1))
    wrapper.begin_forward(indptr, indices)  # as SGLang does before it replays the graph
    wrapper.is_cuda_graph_enabled = False
    with pytest.raises(AssertionError, match="FlashInfer was asked"):
        attention.decode(original, backend, q, None, None, layers[0], batch)


def test_on_the_stock_fast_path_only_the_verify_attends_with_our_kernel(layers: list[Any]) -> None:
    graph = [SimpleNamespace(is_cuda_graph_enabled=True, begin_forward=planned)]
    metadata = SimpleNamespace(decode_wrappers=graph)
    served, verify = SimpleNamespace(forward_metadata=metadata), SimpleNamespace(forward_metadata=metadata)
    assert attention.prepare_verify(model_runner(), verify, 8)
    assert attention._decode is None
    assert attention.decode(lambda *_: "SGLang's", served, None, None, None, layers[0], None) == "SGLang's"
    assert graph[0].begin_forward is planned, "SGLang's graphs keep their plan"
    with pytest.raises(AttributeError):  # ours: it asks the backend for its pool
        attention.decode(lambda *_: "SGLang's", verify, None, None, None, layers[0], None)
    layers.append(layer(logit_cap=30.0))
    assert not attention.prepare_verify(model_runner(), verify, 8)
    assert attention.decode(lambda *_: "SGLang's", verify, None, None, None, layers[0], None) == "SGLang's"


def test_on_the_canonical_fast_path_the_verify_shares_the_decode_graphs_kernel(layers: list[Any]) -> None:
    attention.prepare(model_runner(), 8)
    verify = SimpleNamespace()
    assert attention.prepare_verify(model_runner(), verify, 8)
    assert getattr(verify, attention.VERIFY) is attention._decode
