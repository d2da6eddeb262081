# ruff: noqa: E402 (SGLang is imported after its stand-ins)
"""Plays scenes on the canonical radix cache over SGLang's real tree and allocator, and prints what each one found.

A program of its own: importing SGLang leaves its stand-ins to the process.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from sglang_margingate.serving.cpu import install_stand_ins

install_stand_ins()

import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_margingate.config import MarginGateConfig
from sglang_margingate.runtime.namespaces import namespace
from sglang_margingate.runtime.state import ATTRIBUTE
from sglang_margingate.serving import sgl
from sglang_margingate.serving.radix import CanonicalRadixCache

CHUNK, SLOTS = 4, 400

CHECKPOINTS = hasattr(RadixCache, "checkpoint")
"""SGLang 0.5.23: the tree is told how far columns reach, and who releases them frees the rest."""
IN_RECORD = any(field.name == "req_pool_idx" for field in fields(ReqKvInfo))
"""SGLang 0.5.20 and later: where a request's columns lie stands in a record of its own."""


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

    def open(self, prompt: list[int], key: str | None, seen: bool = True, salt: str | None = None) -> Any:
        """Return a request as it stands after prefill; ``hit`` is what it found in the tree."""
        req: Any = SimpleNamespace(
            origin_input_ids=array("q", prompt), output_ids=array("q"), extra_key=key, cache_salt=salt, priority=0,
            last_node=None, lock=None, kv=None,
        )  # fmt: skip
        if IN_RECORD:
            req.kv = ReqKvInfo(req_pool_idx=self.next_row)
        else:
            req.req_pool_idx, req.cache_protected_len = self.next_row, 0
        req.get_fill_ids = lambda: req.origin_input_ids + req.output_ids
        if seen:
            setattr(req, ATTRIBUTE, SimpleNamespace(ledger=SimpleNamespace(gated=True, notes=[]), floored_tokens=0))
        self.next_row += 1
        self.match(req)
        return req

    def match(self, req: Any) -> None:
        salt = {"cache_salt": req.cache_salt} if IN_RECORD else {}
        key = RadixKey(req.get_fill_ids(), req.extra_key, **salt)
        found = self.tree.match_prefix(MatchPrefixParams(key=key, req=req))
        req.last_node, req.hit = found.last_device_node, sgl.matched_len(found)
        if CHECKPOINTS:
            req.prefix_len, hit = req.hit, self.tree.path_device_indices(req.last_node)
            req.lock = self.tree.lock(req.last_node)
        else:
            req.prefix_indices = hit = found.device_indices
            self.tree.inc_lock_ref(req.last_node)
        (req.kv if IN_RECORD else req).cache_protected_len = req.hit
        self.rows.write((sgl.pool_index(req), slice(0, req.hit)), hit)
        self.extend(req, req.hit, len(req.get_fill_ids()))

    def extend(self, req: Any, start: int, end: int) -> None:
        if end > start:
            slots = self.memory.alloc(end - start)
            self.rows.write((sgl.pool_index(req), slice(start, end)), slots.to(torch.int32))

    def decode(self, req: Any, tokens: list[int]) -> None:
        start = len(req.get_fill_ids())
        req.output_ids.extend(tokens)
        self.extend(req, start, start + len(tokens))

    def prefilled(self, req: Any) -> None:
        """Tell the tree of a prefill step, as SGLang does."""
        if CHECKPOINTS:
            self.checkpoint(req)
        else:
            self.tree.cache_unfinished_req(req)

    def checkpoint(self, req: Any) -> None:
        req.full_untruncated_fill_ids = req.get_fill_ids()
        self.tree.checkpoint(req, up_to=len(req.full_untruncated_fill_ids))

    def finish(self, req: Any, keep: bool = True) -> None:
        """Release a request that has finished, or was retracted where nothing is kept."""
        columns = len(req.get_fill_ids())
        if not CHECKPOINTS:
            self.tree.cache_finished_req(req, is_insert=keep, kv_len_to_handle=columns)
            return
        if keep:  # the steps of SGLang's release_kv_cache
            self.checkpoint(req)
        self.tree.free_kv_row(req.kv, [(req.kv.cache_protected_len, columns)])
        self.tree.unlock(req.lock)

    def run(
        self, prompt: list[int], key: str | None, generated: tuple[int, ...] = (), seen: bool = True,
        salt: str | None = None,
    ) -> int:  # fmt: skip
        req = self.open(prompt, key, seen, salt)
        self.prefilled(req)
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
        w.prefilled(req)
        w.decode(req, list(GENERATED))
    ledger.gated, ledger.notes = False, ["gave up"]
    w.prefilled(req)
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
    w.finish(req, keep=False)
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


def salted() -> dict[str, int]:
    """From 0.5.19 on a client's ``cache_salt`` stands beside the name space: it parts, and it never joins."""
    w, key = World(), namespace(True, None)
    w.run(PROMPT, key, GENERATED, salt="a")
    other, same = w.run(LONGER, key, salt="b"), w.run(LONGER, key, salt="a")
    return {
        "other": other,
        "same": same,
        "ungated": w.run(LONGER, namespace(False, None), salt="a"),
        "leaked": w.leaked(),
    }


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
                **({"salted": salted()} if IN_RECORD else {}),
            }
        )
    )
