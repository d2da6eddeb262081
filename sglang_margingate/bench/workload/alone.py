"""Identity: every sequence of a workload against the same request alone on that server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError
from sglang_margingate.bench.servers.gauges import BatchProof, Gauge
from sglang_margingate.bench.servers.timing import Job, Timed, stream
from sglang_margingate.gate.stats import Rate

Key = tuple[object, int]
NO_CLAIM = ("none", "None", "")


@dataclass
class Identity:
    """What one server showed of one load, all rounds together."""

    same: Rate = field(default_factory=lambda: Rate(0, 0))
    """Sequences whose tokens and finish reason equal their run alone, of all."""
    promised: Rate = field(default_factory=lambda: Rate(0, 0))
    """The same, of those whose answer claims it: with a guarantee, or from a server in SGLang's deterministic mode."""
    first: str = ""
    """Where the first difference lies; of a sequence that claimed identity, if there is one."""
    _broken: bool = False

    @property
    def broken(self) -> int:
        """Sequences that claimed identity and have it not."""
        return self.promised.denominator - self.promised.numerator

    def add(self, timed: Timed, alone: Completion, claimed: bool) -> None:
        """Count one sequence."""
        same = timed.completion.same_as(alone)
        self.same = Rate(self.same.numerator + same, self.same.denominator + 1)
        if claimed:
            self.promised = Rate(self.promised.numerator + same, self.promised.denominator + 1)
        if not same and (not self.first or (claimed and not self._broken)):
            self._broken = claimed
            at = timed.completion.first_difference(alone)
            what = "finish reason" if at is None else f"token {at}"
            self.first = f"{timed.job.rid}: {what}{' though it claimed to be identical' if claimed else ''}"


class References:
    """Each request alone on one server: nothing else runs there, and the prefix cache is empty."""

    def __init__(self, client: Client, deterministic: bool = False) -> None:
        self.client, self.deterministic = client, deterministic
        self.gauge = Gauge(client.base_url, client.api_key)
        self.proof = BatchProof(self.gauge.source)
        self.cached = 0
        """Prompt tokens that came from the cache all the same."""
        self._alone: dict[Key, Completion] = {}

    def __len__(self) -> int:
        return len(self._alone)

    def missing(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Prompt]:
        """Return those whose run alone is still to be done, each once."""
        wanted = {_key(p, max_tokens): p for p in prompts}
        return [p for key, p in wanted.items() if key not in self._alone]

    def fill(self, prompts: Sequence[Prompt], max_tokens: int, done: Callable[[], None] = lambda: None) -> None:
        """Run the missing ones alone.

        Raises
        ------
        ServerError
            The cache cannot be emptied, or others ran beside them: they are no reference then.
        """
        todo = self.missing(prompts, max_tokens)
        if not todo:
            return
        with self.gauge.watch() as proof:
            for number, prompt in enumerate(todo):
                if not self.client.flush_cache():
                    raise ServerError("the prefix cache cannot be emptied for the runs alone; nothing to compare with")
                rid = f"{prompt.id}/alone/{len(self._alone)}"
                completion = stream(self.client, Job(prompt, True, rid), max_tokens).completion
                self.cached += int(completion.meta.get("cached_tokens") or 0)
                self._alone[_key(prompt, max_tokens)] = completion
                if number == 0 and not self.gauge.exact:
                    proof.by_rows.clear()  # a sampled gauge may lag, and show what ran before
                done()
        self.proof.add(proof)
        if proof.largest > 1:
            raise ServerError(
                f"the runs alone were not alone: up to {proof.largest} requests ran there (from {proof.source}); "
                "nothing else may use the server meanwhile"
            )

    def compare(self, outcomes: Sequence[Timed], max_tokens: int, into: Identity) -> None:
        """Count the sequences of a run, whose runs alone must be there."""
        for timed in outcomes:
            claimed = self.deterministic or claims(timed.completion)
            into.add(timed, self._alone[_key(timed.job.prompt, max_tokens)], claimed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {"runs": len(self), "cached_tokens": self.cached, "batches": self.proof.to_dict()}


def claims(completion: Completion) -> bool:
    """Return whether an answer says that it does not depend on its companions."""
    return str(completion.margingate.get("guarantee", "none")) not in NO_CLAIM


def _key(prompt: Prompt, max_tokens: int) -> Key:
    return (prompt.ids or prompt.text, prompt.max_tokens or max_tokens)
