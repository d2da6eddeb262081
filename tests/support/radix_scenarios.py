# ruff: noqa: E402 (SGLang is imported after its stand-ins)
"""Plays scenes on the canonical radix cache over SGLang's real tree and allocator, and prints what each one found.

A program of its own: importing SGLang leaves its stand-ins to the process.
"""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace
from typing import Any

from sglang_margingate.serving.cpu import install_stand_ins

install_stand_ins()

import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_margingate.config import MarginGateConfig
from sglang_margingate.runtime.namespaces import namespace
from sglang_margingate.runtime.state import ATTRIBUTE
from sglang_margingate.serving.radix import CanonicalRadixCache

CHUNK, SLOTS = 4, 400


class World:
    """A tree, its memory, and requests that run through it as SGLang's scheduler has them do."""

    def __init__(self) -> None:
        self.rows = ReqToTokenPool(size=32, max_context_len=64, device="cpu", enable_memory_saver=False)
        self.memory = TokenToKVPoolAllocator(SLOTS, torch.bfloat16, "cpu", SimpleNamespace(), need_sort=False)
        params = CacheInitParams(
            disable=False, req_to_token_pool=self.rows, token_to_kv_pool_allocator=self.memory, page_size=1
        )
        self.tree = CanonicalRadixCache(params, MarginGateConfig(chunk=CHUNK))
        self.free, self.next_row = self.memory.available_size(), 0

    def open(self, prompt: list[int], key: str | None, seen: bool = True) -> Any:
        """Return a request as it stands after prefill; ``hit`` is what it found in the tree."""
        req: Any = SimpleNamespace(
            origin_input_ids=array("q", prompt), output_ids=array("q"), extra_key=key, priority=0, last_node=None,
            req_pool_idx=self.next_row, cache_protected_len=0,
        )  # fmt: skip
        req.get_fill_ids = lambda: req.origin_input_ids + req.output_ids
        if seen:
            setattr(req, ATTRIBUTE, SimpleNamespace(ledger=SimpleNamespace(gated=True, notes=[]), floored_tokens=0))
        self.next_row += 1
        self.match(req)
        return req

    def match(self, req: Any) -> None:
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(req.get_fill_ids(), req.extra_key), req=req))
        req.prefix_indices, req.last_node = found.device_indices, found.last_device_node
        req.hit = req.cache_protected_len = len(found.device_indices)
        self.tree.inc_lock_ref(req.last_node)
        self.rows.write((req.req_pool_idx, slice(0, req.hit)), found.device_indices)
        self.extend(req, req.hit, len(req.get_fill_ids()))

    def extend(self, req: Any, start: int, end: int) -> None:
        if end > start:
            self.rows.write((req.req_pool_idx, slice(start, end)), self.memory.alloc(end - start).to(torch.int32))

    def decode(self, req: Any, tokens: list[int]) -> None:
        start = len(req.get_fill_ids())
        req.output_ids.extend(tokens)
        self.extend(req, start, start + len(tokens))

    def finish(self, req: Any) -> None:
        self.tree.cache_finished_req(req, kv_len_to_handle=len(req.get_fill_ids()))

    def run(self, prompt: list[int], key: str | None, generated: tuple[int, ...] = (), seen: bool = True) -> int:
        req = self.open(prompt, key, seen)
        self.tree.cache_unfinished_req(req)
        self.decode(req, list(generated))
        self.finish(req)
        return req.hit

    def leaked(self) -> int:
        """Return the slots that nobody holds once everything was evicted."""
        assert self.tree.protected_size() == 0
        self.tree.evict(EvictParams(num_tokens=SLOTS))
        return self.free - self.memory.available_size()


PROMPT, GENERATED = list(range(10)), (90, 91, 92, 93, 94, 95)
LONGER = [*PROMPT, *GENERATED]


def forged(clients_key: str, gated: bool) -> dict[str, int]:
    """One side fills the tree without a key, the other asks with a key of the client's choice."""
    w = World()
    w.run(PROMPT, namespace(not gated, None), GENERATED)
    return {"hit": w.run(LONGER, namespace(gated, clients_key)), "leaked": w.leaked()}


def same_key(gated: bool) -> dict[str, int]:
    """Two requests of one kind and one key."""
    w = World()
    w.run(PROMPT, namespace(gated, "tenant"), GENERATED)
    hit, other = w.run(LONGER, namespace(gated, "tenant")), w.run(LONGER, namespace(gated, "another"))
    return {"hit": hit, "other": other, "leaked": w.leaked()}


def gave_up(while_decoding: bool) -> dict[str, int]:
    """A gated request gives up; then the same conversation goes on."""
    w, key = World(), namespace(True, None)
    req = w.open(PROMPT, key)
    ledger = getattr(req, ATTRIBUTE).ledger
    if while_decoding:
        w.tree.cache_unfinished_req(req)
        w.decode(req, list(GENERATED))
    ledger.gated, ledger.notes = False, ["gave up"]
    w.tree.cache_unfinished_req(req)
    w.finish(req)
    return {"hit": w.run(LONGER, key), "leaked": w.leaked()}


def gave_up_and_retracted() -> dict[str, int]:
    """It comes back after a retraction, and still finds prompt columns only."""
    w, key = World(), namespace(True, None)
    w.run([*LONGER, 1, 2, 3, 4], key)
    req = w.open(PROMPT, key)
    ledger = getattr(req, ATTRIBUTE).ledger
    w.decode(req, list(GENERATED))
    ledger.gated, ledger.notes = False, ["gave up"]
    w.tree.cache_finished_req(req, is_insert=False, kv_len_to_handle=len(LONGER))
    w.match(req)
    hit = req.hit
    w.finish(req)
    return {"hit": hit, "leaked": w.leaked()}


def unseen() -> dict[str, int]:
    """A request that no hook opened neither fills the gated name space nor finds it."""
    w, key = World(), namespace(True, None)
    first = w.run(PROMPT, key, GENERATED, seen=False)
    second = w.run(LONGER, key)
    return {"first": first, "second": second, "third": w.run(LONGER, key, seen=False), "leaked": w.leaked()}


def other_weights() -> dict[str, int]:
    """Columns of other weights are not found by later requests."""
    w = World()
    w.run(PROMPT, namespace(True, None, None, 0), GENERATED)
    return {"hit": w.run(PROMPT, namespace(True, None, None, 1)), "leaked": w.leaked()}


def prefill_only() -> dict[str, int]:
    """A request that ends with its prefill was never cached as an unfinished one."""
    w, key = World(), namespace(True, None)
    req = w.open(PROMPT, key)
    w.finish(req)
    return {"hit": w.run(PROMPT, key), "leaked": w.leaked()}


if __name__ == "__main__":
    old, gated, ungated = "margingate:fast", namespace(True, None), namespace(False, None)
    print(
        json.dumps(
            {
                **{f"gated asks for {k}": forged(k, gated=True) for k in (old, gated, ungated)},
                **{f"ungated asks for {k}": forged(k, gated=False) for k in (old, gated, ungated)},
                "gated, same key": same_key(True),
                "ungated, same key": same_key(False),
                "gave up in the prefill": gave_up(False),
                "gave up while decoding": gave_up(True),
                "gave up, retracted": gave_up_and_retracted(),
                "unseen": unseen(),
                "other weights": other_weights(),
                "prefill only": prefill_only(),
            }
        )
    )
