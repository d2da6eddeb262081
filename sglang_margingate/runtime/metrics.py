"""Counters on SGLang's ``/metrics``, with the prefix ``margingate_``."""

from __future__ import annotations

from typing import Any


class Metrics:
    """Prometheus counters of one scheduler process; without ``--enable-metrics`` every call does nothing.

    SGLang serves its metrics in prometheus_client's multiprocess mode: counters made in the scheduler appear on the
    launcher's ``/metrics`` by themselves, provided SGLang set the folder up before prometheus_client was imported.

    Parameters
    ----------
    enabled
        SGLang's ``enable_metrics``.
    model
        Label ``model_name``.
    dp_rank
        Label ``dp_rank``: which scheduler of several this is. None: it is the only one, and there is no such label.
    """

    def __init__(self, enabled: bool, model: str, dp_rank: int | None = None) -> None:
        self.enabled = enabled
        self._dropped = self._errors = 0
        if not enabled:
            return
        from prometheus_client import Counter, Gauge

        labels = {"model_name": model} | ({} if dp_rank is None else {"dp_rank": str(dp_rank)})

        def counter(name: str, text: str) -> Any:
            return Counter("margingate_" + name, text, list(labels)).labels(**labels)

        self._steps = counter("steps", "Committed steps of observed greedy requests.")
        self._triggers = counter("triggers", "Steps with margin <= threshold.")
        self._flips = counter("flips", "Confirmed mismatches, missed ones included.")
        self._missed = counter("missed", "Flips at steps that did not trigger (known where audited or always).")
        self._passes = counter("verify_passes", "Verify passes run.")
        self._rows = counter("verify_rows", "Rows recomputed by verify passes, padding excluded.")
        self._seconds = counter("verify_seconds", "Wall time of verify passes.")
        self._drops = counter("trace_dropped_rows", "Step rows that the trace lost.")
        self._write_errors = counter("trace_write_errors", "Failed writes of the trace.")

        by = [*labels, "forward"]
        seconds = Counter("margingate_host_seconds", "What the hooks took of the scheduler's thread.", by)
        forwards = Counter("margingate_host_forwards", "Forwards that this was taken of: none that was waited for.", by)
        self._host = {
            decode: (seconds.labels(**labels, forward=name), forwards.labels(**labels, forward=name))
            for decode, name in ((True, "decode"), (False, "prefill"))
        }
        self._labels = labels
        self._answers = Counter("margingate_answers", "Finished answers of watched requests.", [*labels, "guarantee"])
        none = "Set to 1 while the server claims nothing; `notes` of its status page say why."
        self._lowered = Gauge("margingate_lowered", none, list(labels), multiprocess_mode="mostrecent").labels(**labels)
        bound = "Upper bound at 95% of the share of untriggered steps that flip; 1 with nothing audited."
        gauge = Gauge("margingate_missed_bound", bound, list(labels), multiprocess_mode="mostrecent")
        self._bound = gauge.labels(**labels)

    def missed_bound(self, upper: float) -> None:
        """Show the audit's bound on missed flips, a share."""
        if self.enabled:
            self._bound.set(upper)

    def lowered(self, nothing: bool) -> None:
        """Show whether the server claims nothing any more."""
        if self.enabled:
            self._lowered.set(int(nothing))

    def answer(self, guarantee: str) -> None:
        """Count one finished answer."""
        if self.enabled:
            self._answers.labels(**self._labels, guarantee=guarantee).inc()

    def step(self, triggered: bool, flipped: bool, missed: bool) -> None:
        """Count one committed step."""
        if not self.enabled:
            return
        self._steps.inc()
        if triggered:
            self._triggers.inc()
        if flipped:
            self._flips.inc()
        if missed:
            self._missed.inc()

    def quiet_steps(self, steps: int) -> None:
        """Count committed steps that neither triggered nor were verified."""
        if self.enabled and steps:
            self._steps.inc(steps)

    def host(self, decode: bool, seconds: float, waited: bool) -> None:
        """Count what our hooks took of one forward, unless the host waited for a verdict of it."""
        if self.enabled and not waited:
            spent, forwards = self._host[decode]
            spent.inc(seconds)
            forwards.inc()

    def verify(self, passes: int, rows: int, seconds: float) -> None:
        """Count one call of the verifier."""
        if self.enabled:
            self._passes.inc(passes)
            self._rows.inc(rows)
            self._seconds.inc(seconds)

    def trace(self, dropped_rows: int, write_errors: int) -> None:
        """Bring the trace's counters up to the writer's totals."""
        if self.enabled:
            self._drops.inc(dropped_rows - self._dropped)
            self._write_errors.inc(write_errors - self._errors)
            self._dropped, self._errors = dropped_rows, write_errors
