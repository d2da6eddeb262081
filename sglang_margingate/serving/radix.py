"""A radix cache in which a prefix hit never changes the output.

A K/V column is shared only where its bits depend on the tokens before it alone:

* Gated requests share whole chunks of C prompt tokens. The chunk grid is the tree's page: SGLang's own radix tree
  already floors, splits and evicts on page borders, so it is used as it is, with a page of C, while the allocator
  keeps pages of 1. A partial chunk at a prompt's end ran at a shape of its own and stays private.
* Generated columns are never shared between gated requests: they are decode-shaped, and the same tokens sent as a
  prompt would be prefill-shaped. (`canonical` may share them where a probe has shown one class for both; none has.)
* Requests that did not ask for determinism share as in stock SGLang, but in name spaces of their own
  (:func:`.radix_names.namespace`), so their batch-shaped columns cannot reach a gated request through any split, eviction
  or re-insertion: provenance is the tree's root, not a mark that code must carry along.
* What a request was opened as decides, not what became of it: one that gave up keeps to the gated rules and inserts
  nothing more. A request that no hook opened shares nothing at all, so a key of its own choice leads nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_margingate.config import MarginGateConfig
from sglang_margingate.runtime.namespaces import BACKEND_NAME, opened_gated, uses_backend
from sglang_margingate.runtime.state import state_of
from sglang_margingate.serving import sgl

MAX_CHILDREN = 256


class _PromptOnly:
    """A view of SGLang's ``Req`` whose tokens end where its shareable columns end."""

    def __init__(self, req: Any, limit: int) -> None:
        object.__setattr__(self, "_req", req)
        object.__setattr__(self, "_limit", limit)

    def get_fill_ids(self) -> Any:
        return self._req.get_fill_ids()[: self._limit]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_req"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._req, name, value)


class GridTree(RadixCache):
    """SGLang's radix tree on the grid of canonical prefill chunks: what is the same in every version of SGLang.

    Parameters
    ----------
    params
        SGLang's ``CacheInitParams``.
    config
        The server's configuration.
    """

    def __init__(self, params: Any, config: MarginGateConfig) -> None:
        self.chunk = config.chunk
        super().__init__(params)

    @contextmanager
    def _on_grid(self) -> Iterator[None]:
        """Let the tree's own methods see a page of C; everyone else sees the allocator's page of 1.

        SGLang reads ``tree_cache.page_size`` for both purposes (mem_cache/allocation.py). The scheduler is
        single-threaded, so nobody can look in between.
        """
        before: int = self.page_size  # type: ignore[has-type]
        self.page_size = self.chunk
        try:
            yield
        finally:
            self.page_size = before

    @staticmethod
    def _stock(req: Any) -> bool:
        """Return whether a request shares as in stock SGLang: it was opened as one without a gate."""
        return state_of(req) is not None and not opened_gated(req.extra_key)

    def match_prefix(self, params: Any) -> Any:
        """Find the longest shared prefix, floored to whole chunks; note what the floor gave up."""
        req = params.req
        if req is None or self._stock(req):
            with self._on_grid():
                return super().match_prefix(params)
        state = state_of(req)
        if state is None:
            return self._empty_match_result
        self._cap_at_prompt(params, req)
        with self._on_grid():
            result = super().match_prefix(params)
        state.floored_tokens = self._floored(params.key, sgl.matched_len(result), result.last_device_node)
        return result

    @staticmethod
    def _cap_at_prompt(params: Any, req: Any) -> None:
        # After a retraction the key also holds generated tokens, whose columns a verify will write: never shared ones.
        prompt = len(req.origin_input_ids)
        if len(params.key) > prompt:
            params.key = params.key[:prompt]

    def _floored(self, key: Any, matched: int, node: Any) -> int:
        """Return how many further tokens of the key the tree holds inside one more chunk.

        For the record only, so a node with very many children is sampled.
        """
        rest = key[matched : matched + self.chunk]
        children = list(islice(node.children.values(), MAX_CHILDREN)) if len(rest) else []
        return max((c.key.match(rest, page_size=1) for c in children if _space(c.key) == _space(rest)), default=0)

    def insert(self, params: Any) -> Any:
        """Insert whole chunks."""
        with self._on_grid():
            return super().insert(params)

    def evict(self, params: Any) -> Any:
        """Evict leaves."""
        with self._on_grid():
            return super().evict(params)

    def shareable(self, req: Any) -> int:
        """Return how many leading columns may be shared of a request that does not share as in stock SGLang."""
        state = state_of(req)
        if state is None or not state.ledger.gated or state.ledger.notes:
            # Nobody saw it, it gave up, or a chunk left the grid: nothing beyond what came from the tree.
            return int(sgl.protected_len(req))
        return len(req.origin_input_ids) // self.chunk * self.chunk


def _space(key: Any) -> tuple[Any, Any]:
    """Return the name space of a key of the tree; from 0.5.19 on a client's ``cache_salt`` is a second part of it."""
    return key.extra_key, getattr(key, "cache_salt", None)


class RequestTree(GridTree):
    """The tree of SGLang 0.5.17 to 0.5.22, which is told of a request after a prefill step and at its end."""

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """Share the prompt's whole chunks after a prefill step."""
        if self._stock(req):
            with self._on_grid():
                super().cache_unfinished_req(req, chunked=chunked)
            return
        filled = len(req.get_fill_ids())
        with self._on_grid():
            super().cache_unfinished_req(_PromptOnly(req, self.shareable(req)), chunked=chunked)
        # SGLang continues a chunked prompt behind prefix_indices, so the private columns belong to it as well.
        if filled > len(req.prefix_indices):
            row = self.req_to_token_pool.req_to_token[sgl.pool_index(req), :filled]
            req.prefix_indices = row.to(dtype=req.prefix_indices.dtype, copy=True)

    def cache_finished_req(self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """Release a finished or retracted request: gated ones leave nothing but their prompt's whole chunks."""
        if not self._stock(req):
            # A request that ended with its prefill was never cached as an unfinished one.
            if is_insert and not self.disable and sgl.protected_len(req) < self.shareable(req) <= kv_len_to_handle:
                self.cache_unfinished_req(req)
            is_insert = False
        with self._on_grid():
            super().cache_finished_req(req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle)


class CheckpointTree(GridTree):
    """The tree of SGLang 0.5.23, which is told how far a request's columns reach; who releases them frees the rest."""

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """Share the whole chunks of the prompt below ``up_to``; of a request without a gate all that stock shares."""
        if not self._stock(req):
            up_to = min(up_to, self.shareable(req))
            if up_to <= sgl.protected_len(req):
                return
        with self._on_grid():
            super().checkpoint(req, up_to=up_to)


CanonicalRadixCache: type[GridTree] = CheckpointTree if hasattr(RadixCache, "checkpoint") else RequestTree


def register(config: MarginGateConfig) -> None:
    """Register the backend under :data:`BACKEND_NAME`; idempotent."""
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend

    if uses_backend(config) and get_radix_cache_factory(BACKEND_NAME) is None:
        register_radix_cache_backend(BACKEND_NAME, lambda context: CanonicalRadixCache(context.params, config))
