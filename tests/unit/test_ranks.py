"""Several ranks as one server: what they agree on, who is named when they do not, and their sum at every size."""

from __future__ import annotations

import multiprocessing
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from rank_threads import SharedSum, run_ranks

from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses
from sglang_margingate.canonical.path_probe import PathProbe
from sglang_margingate.canonical.ranks import RankError, Ranks
from sglang_margingate.canonical.reduce_probe import ReduceProbe, in_rank_order, probe_reduce
from sglang_margingate.canonical.selftest import run_self_test
from sglang_margingate.config import ConfigError
from sglang_margingate.runtime.faults import split_reduce
from sglang_margingate.settings import several

ROWS = [*range(1, 17), 24, 32]


# ---- agreeing ---------------------------------------------------------------------------------------------------------


def test_one_rank_agrees_with_itself() -> None:
    alone = Ranks()
    assert alone.exchange("x", {"a": 1}) == [{"a": 1}]
    assert alone.agree("x", True)
    assert not alone.agree("x", False)
    alone.same("x", {"a": 1})


def test_every_rank_hears_every_answer_in_order() -> None:
    assert run_ranks(4, lambda ranks: ranks.exchange("number", ranks.rank * 10)) == [[0, 10, 20, 30]] * 4


def test_what_fails_on_one_rank_fails_on_all(caplog: pytest.LogCaptureFixture) -> None:
    found = run_ranks(8, lambda ranks: [ranks.agree("a trial", ranks.rank != 5), ranks.agree("another", True)])
    assert found == [[False, True]] * 8
    assert "a trial does not hold on rank 5 of 8" in caplog.text


def test_ranks_that_differ_are_named_with_the_field() -> None:
    found = run_ranks(
        4, lambda r: r.same("who is there", {"device": "A" if r.rank < 3 else "B", "same": 1}, "Buy another")
    )
    assert all(isinstance(error, RankError) for error in found)
    assert {str(error) for error in found} == {
        "rank 3 of 4 differs from rank 0 in device (who is there): B, and A on rank 0. Buy another"
    }


def test_a_rank_that_never_answers_is_named_and_nobody_hangs() -> None:
    def work(ranks: Ranks) -> Any:
        return None if ranks.rank == 1 else ranks.exchange("who is there", 1)

    found = run_ranks(3, work, seconds=0.5)
    assert found[1] is None
    for error in (found[0], found[2]):
        assert isinstance(error, RankError)
        assert "rank 1 of 3 did not answer" in str(error)
        assert "plugin" in str(error)


class RankEngine(FakeEngine):
    """A server's runners on one of several ranks."""

    def __init__(self, ranks: Ranks, **leaks: Any) -> None:
        super().__init__(**leaks)
        self.ranks = ranks

    def agree(self, what: str, holds: bool) -> bool:
        return self.ranks.agree(what, holds)


def test_a_trial_that_fails_on_one_rank_ends_alike_on_all() -> None:
    """Otherwise that rank would stop running forwards, and the others wait in their first sum."""

    def work(ranks: Ranks) -> Any:
        leak = (lambda rows: 0.5 if rows == 7 else 0.0) if ranks.rank == 2 else (lambda _: 0.0)
        engine = RankEngine(ranks, decode_leak=leak)
        probe = PathProbe(engine)
        return probe.prefill_holds(), probe.decode_holds([3, 7, 11])

    assert run_ranks(4, work) == [(None, "7 requests")] * 4


def test_a_self_test_that_fails_on_one_rank_fails_on_all() -> None:
    class Broken(RankEngine):
        def verify(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
            out = super().verify(requests, positions, tokens)
            return out + sum(tokens) if self.ranks.rank == 1 else out

    found = run_ranks(2, lambda ranks: run_self_test(Broken(ranks)).passed)
    assert found == [False, False]


# ---- adding up --------------------------------------------------------------------------------------------------------


def forwards(parts: list[torch.Tensor], _rank: int) -> torch.Tensor:
    return in_rank_order(parts)


def backwards(parts: list[torch.Tensor], _rank: int) -> torch.Tensor:
    return in_rank_order(parts[::-1])


def in_pieces(parts: list[torch.Tensor], _rank: int) -> torch.Tensor:
    """Add up as a ring does: each part of the columns begins at another rank, and every partial sum is rounded."""
    out = []
    for first, columns in enumerate(zip(*(part.chunk(len(parts), dim=1) for part in parts))):
        total = columns[first % len(parts)]
        for step in range(1, len(parts)):
            total = total + columns[(first + step) % len(parts)]
        out.append(total)
    return torch.cat(out, dim=1)


def by_size(parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    return forwards(parts, rank) if len(parts[0]) <= 12 else in_pieces(parts, rank)


def probe(size: int, add: Any, in_graph: Any = None) -> list[Any]:
    shared = SharedSum(size, add, in_graph)
    return run_ranks(
        size,
        lambda r: probe_reduce(shared.of(r.rank), r, 64, torch.bfloat16, "cpu", ROWS, [1, 2, 24] if in_graph else ()),
    )


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_sum_in_the_order_of_ranks_is_class_0(size: int) -> None:
    found = probe(size, forwards, forwards)
    assert all(isinstance(each, ReduceProbe) for each in found), found
    assert all(each.holds and set(each.labels.values()) == {0} for each in found)
    assert found[0].graphs == (1, 2, 24)
    assert "in the order of ranks at 1-16, 24, 32 rows" in found[0].describe()


@pytest.mark.parametrize("size", [3, 4, 8])
@pytest.mark.parametrize("add", [backwards, in_pieces])
def test_another_order_is_another_class(size: int, add: Any) -> None:
    for each in probe(size, add):
        assert set(each.labels.values()) == {1}, "the same at every size, but not the order of ranks"


def test_two_numbers_have_one_sum() -> None:
    for add in (backwards, in_pieces):
        assert set(probe(2, add)[0].labels.values()) == {0}


@pytest.mark.parametrize("size", [4, 8])
def test_an_order_that_changes_with_the_size_is_found_and_left_out_of_the_class(size: int) -> None:
    for each in probe(size, by_size):
        assert not each.holds
        assert each.holds_to(12)
        assert not each.holds_to(13)
        assert [m for m, label in each.labels.items() if label != 0] == [13, 14, 15, 16, 24, 32]
        assert "in the order of ranks at 1-12 rows; in another order (1) at 13-16, 24, 32 rows" in each.describe()
        linear = LayerClasses("linear", (8, 8), 1, dict.fromkeys(ROWS, 0))
        both = InvarianceMap([linear, each.layer(torch.bfloat16)])
        assert both.decode_class(8).sizes == tuple(range(1, 13))


def test_a_graph_that_adds_up_otherwise_is_found() -> None:
    for each in probe(4, forwards, backwards):
        assert {m for m, label in each.labels.items() if label is None} == {1, 2, 24}
        assert "a CUDA graph adds up otherwise" in each.describe()


def test_a_sum_that_depends_on_the_place_is_found() -> None:
    def leaking(parts: list[torch.Tensor], _rank: int) -> torch.Tensor:
        out = in_rank_order(parts)
        out[3:] = in_rank_order(parts[::-1])[3:]
        return out

    for each in probe(4, leaking):
        assert [m for m, label in each.labels.items() if label is None] == [m for m in ROWS if m > 3]


def test_ranks_with_other_sums_are_refused_by_name() -> None:
    def own(parts: list[torch.Tensor], rank: int) -> torch.Tensor:
        return in_rank_order(parts if rank < 2 else parts[::-1])

    for error in probe(4, own):
        assert isinstance(error, RankError)
        assert "rank 2 of 4 differs from rank 0 in the sum of 1 rows (all-reduce)" in str(error)


@pytest.mark.parametrize("size", [2, 4])
def test_the_fault_of_the_tests_is_found_even_on_two_ranks(size: int) -> None:
    shared = SharedSum(size, forwards)

    def work(ranks: Ranks) -> Any:
        broken = split_reduce(shared.of(ranks.rank), 8)
        return probe_reduce(broken, ranks, 64, torch.bfloat16, "cpu", ROWS).labels  # type: ignore[arg-type]

    for labels in run_ranks(size, work):
        assert [m for m, label in labels.items() if label != 0] == list(range(1, 9))


def test_zeros_of_either_sign_are_one_sum() -> None:
    def signed(parts: list[torch.Tensor], _rank: int) -> torch.Tensor:
        out = in_rank_order(parts)
        return torch.where(out == 0, -torch.zeros_like(out), out) if len(out) > 4 else out

    assert all(each.holds for each in probe(4, signed))


# ---- processes --------------------------------------------------------------------------------------------------------


def _gloo(rank: int, size: int, port: int, results: Any) -> None:
    """Probe gloo's sum, as a server on CPUs adds up."""
    from datetime import timedelta

    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=600)
    )

    class Sum:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            distributed.all_reduce(x)
            return x

        def record(self, _run: Any) -> None:
            return None

    ranks = Ranks(rank, size, distributed.distributed_c10d._get_default_store())
    found = probe_reduce(Sum(), ranks, 256, torch.bfloat16, "cpu", ROWS)
    ranks.same("labels", {str(m): label for m, label in found.labels.items()})
    results.put((rank, found.labels))
    ranks.exchange("done", rank)  # the store lives in rank 0
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_processes_probe_their_sum_alike(size: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_gloo, args=(rank, size, port, results)) for rank in range(size)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(found) == list(range(size))
    assert all(labels == found[0] for labels in found.values())
    if size == 2:
        assert set(found[0].values()) == {0}


# ---- settings ---------------------------------------------------------------------------------------------------------


def args(**given: Any) -> Any:
    plain = {"tp_size": 4, "dp_size": 1, "device": "cuda", "chunked_prefill_size": 8192, "max_prefill_tokens": 16384}
    return SimpleNamespace(**{**plain, **given})


def test_the_kernel_with_a_fixed_order_holds_the_largest_prefill() -> None:
    assert several.environment(args(), 4096, {}) == {
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", several.PULL: str(64 * 1024),
    }  # fmt: skip
    assert several.environment(args(), 5120, {})[several.PULL] == str(80 * 1024)
    assert several.needed_kib(args(chunked_prefill_size=-1), 4096) == 128 * 1024
    assert several.environment(args(tp_size=2), 4096, {}) == {}, "two numbers have one sum"
    assert several.environment(args(device="cpu"), 4096, {}) == {}


def test_a_variable_that_breaks_the_order_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="TORCH_SYMM_MEM_DISABLE_MULTICAST=0: the order of the sum over 4 ranks"):
        several.environment(args(), 4096, {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "0"})
    with pytest.raises(ConfigError, match=f"{several.PULL}=1024.*set it to 65536 or more"):
        several.environment(args(), 4096, {several.PULL: "1024"})
    assert several.PULL not in several.environment(args(), 4096, {several.PULL: "131072"})


def test_a_model_that_cannot_be_shared_out_is_refused_with_the_numbers_that_would_do() -> None:
    with pytest.raises(ConfigError, match=r"--tp-size 3: the model's 4 attention heads .* give one of 1, 2, 4$"):
        several.check_split(args(tp_size=3), 4, 2, 8)
    several.check_split(args(tp_size=4), 40, 8, 4)
    several.check_split(args(tp_size=16), 32, 8, 16)
    with pytest.raises(ConfigError, match="--tp-size 4 and --dp-size 2 need 8 GPUs, and 4 are in sight"):
        several.check_split(args(dp_size=2), 32, 8, 4)
    several.check_split(args(tp_size=2, device="cpu"), 4, 2, 0)


def test_the_fusion_is_switched_off_unless_somebody_asked_for_it() -> None:
    assert several.fusion_flags(["--tp", "2"]) == [several.FUSION_OFF]
    assert several.fusion_flags(["--tp-size=2", "--flashinfer-allreduce-fusion-backend", "auto"]) == []
    assert several.fusion_flags(["--model-path", "m"]) == []


def test_ranks_on_a_cpu_share_its_cores() -> None:
    assert several.share_cores([0, 1, 2, 3], 2) == "0,1|2,3"
    assert several.share_cores([0, 1], 2) == "0|1"
    assert several.share_cores([0], 2) == "0|0"
