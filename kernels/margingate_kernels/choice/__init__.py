"""Which token a row of logits takes: argmax, runner-up and margin (:mod:`.top2_margin`), and what the seeded draw shares with it.

Result, workspace and checks: :mod:`.rows`; on a GPU both cut rows into programs that meet in :mod:`._triton_rows`.
"""
