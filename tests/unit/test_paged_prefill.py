"""Our prefill in the place of SGLang's paged wrapper: what reaches the kernel, what is refused, who gets it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from margingate_kernels import prefill_attention_reference

from sglang_margingate.config import ConfigError, MarginGateConfig, PrefillKind
from sglang_margingate.serving import attention_hooks as attention
from sglang_margingate.serving.attention_hooks import PagedPrefill

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 16, 40


@pytest.fixture
def prefill() -> PagedPrefill:
    return PagedPrefill(HEADS, KV_HEADS, DIM, "cpu")


def begin(prefill: PagedPrefill, new: list[int], contexts: list[int], slots: torch.Tensor, **more: Any) -> None:
    """Call it as SGLang's FlashInferIndicesUpdaterPrefill does."""
    qo, kv = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (new, contexts))
    last = torch.ones(len(new), dtype=torch.int32)
    usual: dict[str, Any] = {
        "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "custom_mask": None, "non_blocking": True,
        "fixed_split_size": None, "prefix_len_ptr": None, "token_pos_in_items_ptr": None, "token_pos_in_items_len": 0,
        "max_item_len_ptr": None,
    }  # fmt: skip
    prefill.begin_forward(qo, kv, slots, last, HEADS, KV_HEADS, DIM, more.pop("page_size", 1), **(usual | more))


def test_a_prefill_with_and_without_prefix_attends_to_its_own_columns(prefill: PagedPrefill) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    keys, values, q = draw(SLOTS, KV_HEADS, DIM), draw(SLOTS, KV_HEADS, DIM), draw(8, HEADS, DIM)
    slots = torch.randperm(SLOTS, generator=generator).int()  # more of them than columns, as SGLang's buffer
    begin(prefill, [3, 5], [9, 5], slots)
    out = prefill.forward(
        q, (keys, values), causal=True, sm_scale=0.25, window_left=-1, logits_soft_cap=0.0, k_scale=None
    )
    ends = torch.tensor([0, 3, 8]), torch.tensor([0, 9, 14])
    assert torch.equal(out, prefill_attention_reference(q, keys, values, *ends, slots, 0.25))
    for row, (first, length) in enumerate([(0, 7), (0, 8), (0, 9), *((9, n) for n in range(1, 6))]):
        own = slots[first : first + length].long()
        k, v = (x[own].float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
        weights = (torch.einsum("hd,thd->ht", q[row].float(), k) * 0.25).softmax(-1)
        torch.testing.assert_close(out[row].float(), torch.einsum("ht,thd->hd", weights, v), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"custom_mask": torch.ones(1)}, "custom_mask"), ({"token_pos_in_items_len": 3}, "token_pos_in_items_len"),
        ({"window_left": 128}, "window_left"), ({"page_size": 16}, "pages of 16"),
        ({"kv_data_type": torch.float8_e4m3fn}, "float8"),
    ],
)  # fmt: skip
def test_what_it_is_not_is_refused(prefill: PagedPrefill, odd: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        begin(prefill, [2], [2], torch.arange(4).int(), **odd)
    begin(prefill, [2], [2], torch.arange(4).int())
    with pytest.raises(ValueError, match="causal"):
        prefill.forward(torch.ones(2, HEADS, DIM), (torch.ones(1), torch.ones(1)), causal=False, sm_scale=1.0)


@pytest.mark.parametrize(("fits", "mis"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("hopper", [True, False])
def test_who_prefills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fits: bool, mis: bool, hopper: bool
) -> None:
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = lambda *_, **how: how["backend"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if hopper else (8, 0))
    monkeypatch.setattr(attention, "_shape", lambda _runner: (HEADS, KV_HEADS, DIM) if fits else None)
    ours = fits and not mis

    def prefills_with(set_up: Any) -> Any:
        backend = SimpleNamespace(
            skip_prefill=False, enable_mis=mis, use_paged=False, workspace_buffer=None, prefill_wrappers_paged=["SGLang's"]
        )  # fmt: skip
        set_up(None, backend, SimpleNamespace(device="cpu", dtype=torch.bfloat16))
        [wrapper] = backend.prefill_wrappers_paged
        assert backend.use_paged is (wrapper != "SGLang's")
        return "ours" if isinstance(wrapper, PagedPrefill) else wrapper

    assert prefills_with(attention.set_up_prefill) == ("ours" if ours else "SGLang's")
    assert prefills_with(attention.set_up) == ("ours" if ours else "fa3" if hopper else "SGLang's")
    assert ("not repeatable" in caplog.text) is (hopper and not ours)


def test_a_backend_that_pages_by_itself_still_gets_one_kernel_for_all_of_a_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``SGLANG_FLASHINFER_USE_PAGED=1`` sets what our prefill sets too, and says nothing about who prefills."""
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = lambda *_, **how: how["backend"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "_shape", lambda _runner: None)
    backend = SimpleNamespace(
        skip_prefill=False, enable_mis=False, use_paged=True, workspace_buffer=None, prefill_wrappers_paged=["SGLang's"]
    )  # fmt: skip
    attention.set_up(None, backend, SimpleNamespace(device="cpu", dtype=torch.bfloat16))
    assert backend.prefill_wrappers_paged == ["fa3"]


def set_up_prefill() -> Any:
    """Return what prefills on a GPU that is not Hopper's, after SGLang built its back end."""
    backend = SimpleNamespace(
        skip_prefill=False, enable_mis=False, use_paged=False, prefill_wrappers_paged=["SGLang's"]
    )
    attention.set_up_prefill(None, backend, SimpleNamespace(device="cpu", dtype=torch.bfloat16))
    [wrapper] = backend.prefill_wrappers_paged
    assert attention.prefill_kind(SimpleNamespace(attn_backend=backend)) == getattr(wrapper, "kind", FLASHINFER).value
    return wrapper


FLASHINFER = SimpleNamespace(value="flashinfer")


@pytest.mark.parametrize("how", ["right", "wrong", "broken"])
def test_a_kernel_that_is_wrong_on_this_machine_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    class Other(attention.PrefillAttention):
        def __call__(self, q: torch.Tensor, *rest: Any) -> torch.Tensor:
            out = super().__call__(q, *rest)
            if how == "broken":
                raise RuntimeError("out of resource: shared memory")
            if how == "wrong":
                out[-1, -1] += 0.1
            return out

    monkeypatch.setattr(attention, "PrefillAttention", Other)
    monkeypatch.setattr(attention, "_shape", lambda _runner: (HEADS, KV_HEADS, DIM))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert (set_up_prefill() == "SGLang's") is (how != "right")
    assert ("does not work here" in caplog.text) is (how != "right")


class Fa3(attention.PrefillAttention):
    """FlashAttention-3, played by ours."""

    def __init__(self, *of: Any, rows: int = 0) -> None:
        super().__init__(*of)
        self.rows = rows


@pytest.mark.parametrize("wanted", list(PrefillKind))
@pytest.mark.parametrize(
    ("has", "wrong", "changed", "says"),
    [
        (True, None, None, ""), (False, None, None, "there is none for this GPU"),
        (True, "off by 0.1", None, "off by 0.1"), (True, None, "companions at 700 columns", "depend on companions at 700"),
        (True, None, RuntimeError("out of memory"), "out of memory"),
    ],
)  # fmt: skip
def test_which_kernel_prefills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: PrefillKind, has: bool,
    wrong: str | None, changed: Any, says: str,
) -> None:  # fmt: skip
    def tried(_make: Any, *_: Any) -> Any:
        if isinstance(changed, Exception):
            raise changed
        return changed

    monkeypatch.setattr(attention, "Fa3PrefillAttention", Fa3)
    monkeypatch.setattr(attention, "fa3_available", lambda *_: has)
    monkeypatch.setattr(attention.attention_probe, "wrong", lambda make, *_: wrong if make is Fa3 else None)
    monkeypatch.setattr(attention.attention_probe, "changed", tried)
    monkeypatch.setattr(attention, "_shape", lambda _runner: (HEADS, KV_HEADS, DIM))
    config = MarginGateConfig(prefill_attention=wanted)
    monkeypatch.setattr(MarginGateConfig, "from_env", classmethod(lambda _cls: config))
    if wanted is PrefillKind.FA3 and says:
        with pytest.raises(ConfigError, match=f"--margingate-prefill-attention: fa3 cannot be used here: .*{says}"):
            set_up_prefill()
        return
    wrapper = set_up_prefill()
    assert wrapper.kind is (PrefillKind.TRITON if wanted is PrefillKind.TRITON or says else PrefillKind.FA3)
    assert isinstance(wrapper.make(), Fa3) is (wrapper.kind is PrefillKind.FA3)
    assert getattr(wrapper.make(40), "rows", 40) == 40
    tried_in_vain = wanted is PrefillKind.AUTO and has and bool(says)
    assert ("FlashAttention-3 does not prefill here" in caplog.text) is tried_in_vain
    assert not tried_in_vain or says in caplog.text
