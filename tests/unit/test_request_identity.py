"""What a request's row tells of its identity: equal prompts and equal answers have equal digests, in any run."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.request import digest
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.requests import Ended, Opened, Requests


class Sink:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add_request(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def rows_of(*outputs: list[int], **opened: Any) -> list[dict[str, Any]]:
    config, metrics, sink = MarginGateConfig(policy=Policy.GATE), Metrics(False, "m"), Sink()
    recorder = Recorder(HostClock(), None, metrics)
    requests = Requests(config, recorder, Labels(config, recorder, metrics), sink)
    for output in outputs:
        state = requests.open(Opened("r", {"margingate_repeat": 4}, True, **opened))
        requests.finish(state, Ended(len(output), "stop", prompt=lambda: [1, 2], output=lambda o=output: o))
    return sink.rows


def test_equal_answers_have_equal_digests() -> None:
    a, b, c = rows_of([5, 6, 7], [5, 6, 7], [5, 6, 8])
    assert a["output_digest"] == b["output_digest"] != c["output_digest"]
    assert a["prompt_digest"] == c["prompt_digest"] == digest([1, 2]) != digest([12])
    assert (a["repeat"], a["steps"], a["max_tokens"], a["greedy"]) == (4, 0, None, True)
    assert rows_of([1], most_tokens=64)[0]["max_tokens"] == 64


def test_a_digest_is_defined_byte_by_byte() -> None:
    """Other tools can make it: the README of traces says how."""
    tokens = [0, 1, 151_643]
    assert digest(tokens) == hashlib.sha256(struct.pack("<3i", *tokens)).hexdigest()[:16]
