"""Several GPUs: which of them a model can be cut over, and the variables that keep the sum over ranks in one order.

SGLang adds up with a kernel of its own up to a number of bytes and with NCCL above, whose order depends on the size; on some
machines the switch between the GPUs adds up (multicast), in an order of its own. Both are kept out from three ranks on: two
numbers have one sum. Which order every size really gets is probed at start-up (canonical/reduce_probe.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_margingate.config import ConfigError

PULL = "SGLANG_FORCE_CUSTOM_ALL_REDUCE_V2_PULL_SIZE_KB"
"""Up to which size SGLang's own kernel adds up; its buffers have this size on every GPU."""

FIXED = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
"""No sum in the switch."""

LARGEST_ROWS = 16_384
"""Tokens of a prefill where chunks have no limit."""

MiB = 1 << 20


def needed_kib(args: Any, hidden: int) -> int:
    """Return the size of the largest sum over ranks in KiB, in whole MiB.

    Parameters
    ----------
    args
        SGLang's resolved settings.
    hidden
        Features of a row, of two bytes each.
    """
    chunk = args.chunked_prefill_size or 0
    rows = chunk if chunk > 0 else max(LARGEST_ROWS, args.max_prefill_tokens or 0)
    return -(-rows * hidden * 2 // MiB) * (MiB // 1024)


def environment(args: Any, hidden: int, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the schedulers must start with; empty where there is nothing to fix.

    Parameters
    ----------
    args, hidden
        See :func:`needed_kib`.
    given
        The environment: what stands there is kept, or refused.

    Raises
    ------
    ConfigError
        A variable is set to what breaks the order of summation.
    """
    if args.tp_size <= 2 or args.device == "cpu":
        return {}
    needed = needed_kib(args, hidden)
    wanted = {**FIXED, PULL: str(needed)}
    for name, value in wanted.items():
        found = given.get(name)
        if found is None:
            continue
        enough = name == PULL and found.isdigit() and int(found) >= needed
        if found != value and not enough:
            more = f" or more: sums of a prefill have up to {needed} KiB" if name == PULL else ""
            raise ConfigError(
                f"{name}={found}: the order of the sum over {args.tp_size} ranks would depend on the batch. Unset it, or set "
                f"it to {value}{more}"
            )
    return {name: value for name, value in wanted.items() if name not in given}


TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size")
FUSION_OFF = "--enforce-disable-flashinfer-allreduce-fusion"
FUSION_FLAGS = ("--flashinfer-allreduce-fusion-backend", "--enable-flashinfer-allreduce-fusion", FUSION_OFF)


def fusion_flags(given: Sequence[str]) -> list[str]:
    """Return the flag that keeps SGLang from fusing sum and norm, which it does by itself for some models, by size.

    A user who asks for the fusion is refused by name later, not overruled.
    """
    names = {flag.split("=", 1)[0] for flag in given}
    return [FUSION_OFF] if names.intersection(TP_FLAGS) and not names.intersection(FUSION_FLAGS) else []


def check_split(args: Any, heads: int, kv_heads: int, gpus: int) -> None:
    """Check that a model can be cut over the ranks, and that there are GPUs for them.

    Parameters
    ----------
    args
        SGLang's resolved settings.
    heads, kv_heads
        Of the model's attention.
    gpus
        GPUs in sight; 0 on a CPU.

    Raises
    ------
    ConfigError
        One line with the numbers that would do.
    """
    tp, dp = args.tp_size, args.dp_size
    divides = heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    if not divides:
        fine = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise ConfigError(
            f"--tp-size {tp}: the model's {heads} attention heads ({kv_heads} of keys and values) cannot be shared out over it; "
            f"give one of {', '.join(map(str, fine[:8]))}"
        )
    if args.device == "cuda" and tp * dp > gpus:
        raise ConfigError(
            f"--tp-size {tp} and --dp-size {dp} need {tp * dp} GPUs, and {gpus} are in sight; give smaller numbers, or look at "
            "CUDA_VISIBLE_DEVICES"
        )


def share_cores(cores: list[int], ranks: int) -> str:
    """Return the cores of each rank as SGLang reads them: ``0,1|2,3``; ranks share cores where there are too few."""
    each = max(1, len(cores) // ranks)
    shares = [cores[(rank * each) % len(cores) :][:each] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)
