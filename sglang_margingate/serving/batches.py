"""The only place that builds SGLang's ``ForwardBatch``: a decode for verify passes and trials, a prefill for trials."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from sglang_margingate.canonical.engine import Extend
from sglang_margingate.serving import sgl


def decode_batch(model_runner: Any, pools: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
    """Return the batch of a decode of these rows; those from ``real`` on are padding.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    pools
        Row of its ``req_to_token`` table, for each row of the batch.
    positions, tokens
        The position of the token that each row reads, and that token.
    real
        Rows that are no padding. Padding writes slot 0, which SGLang reserves for that.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    table = model_runner.req_to_token_pool.req_to_token
    # One copy to the device instead of three.
    ids, pool_t, pos_t = torch.tensor([tokens, pools, positions], dtype=torch.int64).to(model_runner.device)
    out_loc = table[pool_t, pos_t].long()
    out_loc[real:] = 0
    seq_lens_cpu = torch.tensor([p + 1 for p in positions], dtype=torch.int64)
    seq_lens = pos_t + 1
    return _bound(
        model_runner,
        forward_mode=ForwardMode.DECODE,
        batch_size=len(tokens),
        input_ids=ids,
        req_pool_indices=pool_t,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens_cpu,
        orig_seq_lens=seq_lens,
        out_cache_loc=out_loc,
        seq_lens_sum=int(seq_lens_cpu.sum()),
        positions=pos_t,
    )


def extend_batch(model_runner: Any, parts: Sequence[Extend], tokens: torch.Tensor) -> Any:
    """Return the batch of a prefill of parts of prompts.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    parts
        What each request of the batch prefills.
    tokens
        [requests, tokens]: the prompts, by row of the ``req_to_token`` table, and one token more than any part reads.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    device = model_runner.device
    table = model_runner.req_to_token_pool.req_to_token
    ends = torch.tensor([p.end for p in parts], dtype=torch.int64)
    starts, lengths = [p.start for p in parts], [p.end - p.start for p in parts]
    begins = torch.tensor([0, *accumulate(lengths[:-1])], dtype=torch.int32)
    asking = [p for p in parts if p.logprobs]
    logprobs: dict[str, Any] = {}
    if asking:
        logprobs = {
            "top_logprobs_nums": [0] * len(parts),
            "token_ids_logprobs": [None] * len(parts),
            # The token that each position is to be scored by: the one after it.
            "extend_input_logprob_token_ids_gpu": torch.cat(
                [tokens[p.row, p.start + 1 : p.end + 1] for p in asking]
            ).to(device),
        }
    return _bound(
        model_runner,
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(parts),
        input_ids=torch.cat([tokens[p.row, p.start : p.end] for p in parts]).to(device),
        req_pool_indices=torch.tensor([p.row for p in parts], dtype=torch.int64, device=device),
        seq_lens=ends.to(device),
        seq_lens_cpu=ends,
        orig_seq_lens=ends.to(device),
        out_cache_loc=torch.cat([table[p.row, p.start : p.end] for p in parts]).long(),
        seq_lens_sum=int(ends.sum()),
        positions=torch.cat([torch.arange(p.start, p.end) for p in parts]).to(device),
        extend_num_tokens=sum(lengths),
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32, device=device),
        extend_start_loc=begins.to(device),
        extend_prefix_lens_cpu=starts,
        extend_seq_lens_cpu=lengths,
        extend_logprob_start_lens_cpu=[0 if p.logprobs else p.end - p.start for p in parts],
        return_logprob=bool(asking),
        **logprobs,
    )


def _bound(model_runner: Any, return_logprob: bool = False, **fields: Any) -> Any:
    """Return a ``ForwardBatch`` of these fields that knows which K/V slots it writes."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

    batch = ForwardBatch(
        **fields,
        return_logprob=return_logprob,
        spec_algorithm=model_runner.spec_algorithm,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        **{sgl.padding_field(): len(fields["input_ids"])},
    )
    sgl.bind_columns(model_runner, batch)
    return batch
