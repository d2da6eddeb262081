"""Seeded requests without SGLang: what is refused, what is drawn, which seeds a group's samples get, and their steps."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from margingate_kernels import Workspace
from margingate_kernels.seeded import Draw, Drawn, draw_reference, pack

from sglang_margingate.config import ConfigError, MarginGateConfig, Policy, Repair
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.gate.sampling import LARGEST_SEED, LEAST_SEED, check_sampling, derived_seed
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.faults import TestKnobs, spoil
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.prefill import Chunk, PrefillRules
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.requests import Opened, Requests
from sglang_margingate.runtime.seeded.draws import Drawer
from sglang_margingate.runtime.state import RequestState, StepRow
from sglang_margingate.runtime.step import Step
from sglang_margingate.runtime.verifier import KvDelta, VerifyJob, VerifyResult
from sglang_margingate.runtime.view import ForwardShape, ForwardView
from sglang_margingate.serving.answers.groups import COUNT, seed_sample

# ---- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"sampling_seed": "7"}, "sampling_seed (seed): '7' is not a whole number"),
        ({"sampling_seed": 1.0}, "sampling_seed (seed): 1.0"),
        ({"sampling_seed": True}, "sampling_seed (seed): True"),
        ({"sampling_seed": [1]}, "sampling_seed (seed): [1]"),
        ({"sampling_seed": 2**63}, str(2**63)),
        ({"sampling_seed": -(2**63) - 1}, "is not a whole number from"),
        ({"min_p": 1.01}, "min_p: 1.01"),
        ({"min_p": -0.1}, "min_p: -0.1"),
        ({"min_p": float("nan")}, "min_p: nan"),
        ({"min_p": "0.1"}, "min_p: '0.1' is not a number"),
        ({"top_p": "0.9"}, "top_p: '0.9' is not a number"),
        ({"top_k": 2.5}, "top_k: 2.5 is not a whole number"),
        ({"top_k": True}, "top_k: True"),
        ({"temperature": "hot"}, "temperature: 'hot'"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": 1e39}, "temperature: 1e+39"),
        ({"temperature": 10**400}, "temperature: 1000"),
        ({"top_p": 10**400, "min_p": 10**400}, "min_p: 1000"),
    ],
)
def test_bad_parameters_are_named(params, said):
    with pytest.raises(ConfigError) as caught:
        check_sampling(params)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [
        {}, {"sampling_seed": None, "min_p": None, "top_k": None, "temperature": None}, {"sampling_seed": LEAST_SEED},
        {"sampling_seed": LARGEST_SEED, "temperature": 0, "top_k": -1, "min_p": 1, "top_p": 1},
        {"sampling_seed": 0, "top_k": 10**9},
    ],
)  # fmt: skip
def test_good_parameters_pass(params):
    check_sampling(params)


def requests(policy: Policy = Policy.GATE) -> Requests:
    config = MarginGateConfig(policy=policy.value, threshold=0.25)
    recorder = Recorder(HostClock(), None, Metrics(False, "m"))
    return Requests(config, recorder, Labels(config, recorder, Metrics(False, "m")), None)


def opened(**given: Any) -> Opened:
    return Opened("r", given.pop("custom", None), given.pop("greedy", False), **{"temperature": 0.7, **given})


def test_a_seed_makes_a_sampled_request_gated():
    state = requests().open(opened(seed=5, top_k=40, top_p=0.9, min_p=0.1))
    assert state.draw == Draw(5, 0.7, 40, 0.9, 0.1, 0.5625)
    assert state.ledger.gated
    assert state.observed


def test_without_a_seed_nothing_changes():
    state = requests().open(opened())
    assert state.draw is None
    assert not state.observed
    assert "without a seed" in str(state.ledger.ungated)


def test_temperature_0_with_a_seed_is_greedy():
    state = requests().open(opened(greedy=True, seed=5))
    assert state.draw is None
    assert state.ledger.gated
    assert state.temperature == 0


def test_a_custom_processor_with_a_seed_claims_nothing():
    state = requests().open(opened(seed=5, custom_processor=True))
    assert state.draw is None
    assert not state.observed
    assert "custom logit processor" in str(state.ledger.ungated)


def test_policy_off_draws_nothing_and_log_draws_without_a_gate():
    assert requests().open(opened(seed=5, custom={"margingate_policy": "off"})).draw is None
    logged = requests(Policy.LOG).open(opened(seed=5))
    assert logged.draw is not None
    assert logged.observed
    assert not logged.ledger.gated


# ---- groups -----------------------------------------------------------------------------------------------------------


class Params(msgspec.Struct, kw_only=True):
    n: int = 1
    sampling_seed: int | None = None
    max_new_tokens: int | None = 8
    custom_params: dict[str, Any] | None = None


def test_derived_seeds_are_documented_numbers():
    assert derived_seed(42, 0) == 42
    assert derived_seed(-1, 0) == -1
    seeds = [derived_seed(s, i) for s in (-1, 0, 1, 2**63 - 1) for i in range(1, 500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**53 for seed in seeds)
    # SplitMix64 of seed 0, whose first outputs are published.
    assert [derived_seed(0, i) for i in (1, 2)] == [x & (2**53 - 1) for x in (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)]


@pytest.mark.parametrize("custom", [None, {"margingate_dataset": "x"}])
def test_samples_of_a_group_get_seeds_of_their_own(custom):
    """As SGLang does: the prefix first, with a copy of the parameters; then shallow copies that share them."""
    shared = Params(n=3, sampling_seed=9, custom_params=custom)
    prefix = SimpleNamespace(sampling_params=Params(n=3, sampling_seed=9, max_new_tokens=0, custom_params=custom))
    seed_sample(None, prefix)
    assert prefix.sampling_params.sampling_seed == 9
    sent = []
    for _ in range(3):
        sample = SimpleNamespace(sampling_params=shared)
        seed_sample(None, sample)
        sent.append(sample.sampling_params)
    assert [p.sampling_seed for p in sent] == [9, derived_seed(9, 1), derived_seed(9, 2)]
    assert all(p.custom_params == custom for p in sent)
    assert custom is None or COUNT not in custom


@pytest.mark.parametrize("params", [Params(sampling_seed=9), Params(n=3), None])
def test_others_are_sent_as_they_are(params):
    request = SimpleNamespace(sampling_params=params)
    seed_sample(None, request)
    assert request.sampling_params is params


# ---- steps ------------------------------------------------------------------------------------------------------------

VOCAB, PROMPT = 64, 10
SEEDED = Draw(77, 0.8, 0, 0.95, 0.0, 1.0)


def seeded(draw: Draw | None = SEEDED, policy: Policy = Policy.GATE, threshold: float = 0.25) -> RequestState:
    why = None if draw else "sampled"
    ledger = RequestLedger("r", RequestParams(policy, threshold, "", False), Repair.WINDOW, why)
    return RequestState(ledger, draw=draw, plain=draw is not None)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class Sampling:
    """A forward whose logits are given; SGLang would draw token 63 in every row."""

    processes, columns, asks = False, None, ()

    def __init__(self, logits: torch.Tensor, position: int, plain: bool = True) -> None:
        self.logits, self._position, self.plain = logits, position, plain
        self.all_greedy = self.plain_argmax = False
        self.slots: list[Any] = list(range(len(logits)))
        self.chose = False

    def positions(self) -> list[int]:
        return [self._position] * len(self.logits)

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def choose(self) -> torch.Tensor:
        self.chose = True
        return torch.full((len(self.logits),), VOCAB - 1)

    def keep(self, rows: list[int]) -> None:
        raise AssertionError("nobody asks for log-probabilities")

    def score(self, tokens: torch.Tensor | None) -> None:
        self.scored = tokens


class Verifier:
    """Answers with the logits that it is given."""

    kv = None

    def __init__(self) -> None:
        self.logits, self.jobs = logits_of(1), 0

    def verify(self, jobs: list[VerifyJob]) -> VerifyResult:
        self.jobs += len(jobs)
        return VerifyResult(
            self.logits.expand(len(jobs), -1).clone(), [KvDelta(0.0, 0.0)] * len(jobs), 0.001, 1, len(jobs)
        )


class Bench:
    def __init__(self) -> None:
        self.verifier: Any = Verifier()
        self.recorder = Recorder(HostClock(), None, Metrics(False, "m"))
        audit: Any = SimpleNamespace(rate=0.0)
        self.step = Step(
            self.recorder, PrefillRules(64, True), self.verifier, audit, 16, TestKnobs(), Metrics(False, "m")
        )

    def prefill(self, state: RequestState, logits: torch.Tensor) -> torch.Tensor:
        view = ForwardView([state], False, time.time(), chunks=[Chunk(0, PROMPT, PROMPT)])
        self.step.ended(view)
        return self.step.sample(view, Sampling(logits, PROMPT - 1))

    def decode(self, states: list[RequestState | None], sampling: Sampling, in_class: bool = False) -> torch.Tensor:
        view = ForwardView(states, True, time.time(), True, ForwardShape(len(states), len(states), in_class))
        self.step.ended(view)
        return self.step.sample(view, sampling)


def drawn(logits: torch.Tensor, position: int, draw: Draw = SEEDED) -> tuple[int, float]:
    """What the reference draws for the token at a position."""
    found = draw_reference(logits, pack([draw], [position]))
    return int(found.token), float(found.margin)


def test_a_prefill_and_its_decode_draw_at_the_tokens_own_positions():
    bench, state = Bench(), seeded()
    first, second = logits_of(1, 1), logits_of(1, 2)
    bench.verifier.logits = second
    assert bench.prefill(state, first).tolist() == [drawn(first, PROMPT)[0]]
    assert bench.decode([state], Sampling(second, PROMPT)).tolist() == [drawn(second, PROMPT + 1)[0]]
    assert drawn(second, PROMPT)[0] != drawn(second, PROMPT + 1)[0], "the test would not see a wrong position"


def test_sglangs_sampler_is_asked_only_where_somebody_needs_it():
    for neighbour, plain, asked in ((None, True, False), (RequestState, True, True), (None, False, True)):
        bench, state = Bench(), seeded()
        logits = logits_of(2 if neighbour else 1, 3)
        bench.prefill(state, logits[:1])
        bench.verifier.logits = logits[:1]
        states: list[RequestState | None] = [state]
        if neighbour is not None:
            other = seeded(None)
            bench.step.ended(ForwardView([other], False, time.time(), chunks=[Chunk(0, PROMPT, PROMPT)]))
            states.append(other)
        sampling = Sampling(logits, PROMPT, plain)
        tokens = bench.decode(states, sampling).tolist()
        assert sampling.chose is asked
        assert tokens[0] == drawn(logits[:1], PROMPT + 1)[0]
        assert tokens[1:] == [VOCAB - 1] * (len(states) - 1), "a request without a seed keeps SGLang's token"


def row_with(low: bool) -> torch.Tensor:
    """Logits whose draw at the first decode has a margin below, or well above, the threshold."""
    for seed in range(1000):
        logits = logits_of(1, seed)
        if (drawn(logits, PROMPT + 1)[1] <= 0.25) is low:
            return logits
    raise AssertionError("no such row")


def test_a_low_perturbed_margin_is_verified_and_a_flip_repaired():
    bench, state = Bench(), seeded()
    fast = row_with(low=True)
    token, _ = drawn(fast, PROMPT + 1)
    bench.verifier.logits = fast.clone()
    bench.verifier.logits[0, token] -= 9  # the canonical shape says another token
    other = drawn(bench.verifier.logits, PROMPT + 1)[0]
    bench.prefill(state, fast)
    sampling = Sampling(fast.clone(), PROMPT)
    assert bench.decode([state], sampling).tolist() == [other] != [token]
    assert torch.equal(sampling.logits, bench.verifier.logits), "the verify's logits are put in place"
    bench.recorder.finish(state, 2)
    assert (state.ledger.counters.triggers, state.ledger.counters.flips) == (1, 1)


@pytest.mark.parametrize("in_class", [True, False])
def test_high_margins_and_structural_steps_are_not_verified(in_class):
    bench, state = Bench(), seeded()
    logits = row_with(low=in_class)
    bench.prefill(state, logits)
    bench.decode([state], Sampling(logits, PROMPT), in_class)
    assert bench.verifier.jobs == 0


def test_the_rows_parameters_move_on_with_their_requests():
    """Steps of the same batch, a step of another, and the first batch again: always what a fresh start gives."""
    drawer, work = Drawer(), Workspace(3, logits_of(1, 0).shape[1], "cpu")
    one, two, greedy = seeded(), seeded(Draw(5, 1.2, 3)), RequestState(seeded().ledger)
    batches = [([one, greedy, two], at) for at in (10, 11, 12, 12, 15, 16)] + [
        ([two, one], 20),
        ([one, greedy, two], 17),
    ]
    for number, (states, at) in enumerate(batches):
        rows = [StepRow(i, 0, state, at + 3 * i, 1) for i, state in enumerate(states)]
        logits = logits_of(len(rows), number)
        out = Drawn(*(torch.zeros(len(rows), dtype=d) for d in (torch.int64, torch.int64, torch.float32)))
        drawer.into(logits, rows, work, out)
        want = draw_reference(logits, pack([s.draw for s in states], [row.position + 1 for row in rows]))
        assert all(torch.equal(a, b) for a, b in zip(out, want))


def test_log_draws_with_the_seed_and_verifies_nothing():
    bench, state = Bench(), seeded(policy=Policy.LOG)
    logits = row_with(low=True)
    bench.prefill(state, logits)
    assert bench.decode([state], Sampling(logits, PROMPT, plain=False)).tolist() == [drawn(logits, PROMPT + 1)[0]]
    assert bench.verifier.jobs == 0


def test_a_fault_changes_what_a_seeded_row_draws(monkeypatch):
    monkeypatch.setenv("MARGINGATE_TEST_POISON", "1")
    logits = logits_of(1, 5)
    row = StepRow(0, 0, seeded(), PROMPT, 1)
    before = drawn(logits, PROMPT + 1)[0]
    spoil(TestKnobs(), [row], logits, None, None)
    assert drawn(logits, PROMPT + 1)[0] != before
