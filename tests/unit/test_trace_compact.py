"""Merging small files: few files in the end, and at no moment a row twice or missing."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_margingate.trace import RunFollower, TraceError, TraceWriter, read_run
from sglang_margingate.trace import compact as compact_module
from sglang_margingate.trace.compact import FAN, TIERS, ClosedFiles, compact, due, merge, small_tail
from sglang_margingate.trace.files import list_files, name_of
from sglang_margingate.trace.ring import StepRing
from sglang_margingate.trace.tables import chunk_len, steps_batch, write_whole


class Killed(BaseException):
    """The process ends here: nothing that it would have cleaned up is cleaned up."""


def part(folder: Path, first: int, rows: int) -> tuple[int, int]:
    """Write a closed file of rows that are told apart by their step."""
    numbers = list(range(first, first + rows))
    batch = steps_batch([{"request": numbers, "step": numbers, "request_id": [f"r{n % 3}" for n in numbers]}])
    span = (first, first + rows - 1)
    write_whole(pa.Table.from_batches([batch]), folder / name_of("steps", *span))
    return span


def numbers(folder: Path) -> list[int]:
    run = read_run(folder, step_columns=["step"], request_columns=[])
    assert not [w for w in run.warnings if "manifest" not in w and "without closing" not in w]
    return run.steps["step"].tolist()


sizes = st.lists(st.integers(1, 40), min_size=2, max_size=7)


@given(sizes=sizes, kill_at=st.integers(0, 30), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_merge_cut_short_anywhere_leaves_a_readable_run(sizes: list[int], kill_at: int, data: st.DataObject) -> None:
    """And a reader who follows meanwhile sees each row once, whatever it saw before."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        seen: list[int] = []
        follower = RunFollower(folder, step_columns=["step"], request_columns=[])
        spans, first = [], 0
        for rows in sizes:
            spans.append(part(folder, first, rows))
            first += rows
            if data.draw(st.booleans(), "the reader looks"):
                seen += follower.poll().steps["step"].tolist()
        count, mine = itertools.count(), threading.get_ident()
        dead = False

        def changing() -> None:
            nonlocal dead
            assert numbers(folder) == list(range(first))
            dead = dead or next(count) >= kill_at
            if dead:
                raise Killed
            if data.draw(st.booleans(), "the reader looks"):
                seen.extend(follower.poll().steps["step"].tolist())

        for owner, attribute in ((os, "replace"), (Path, "unlink"), (compact_module, "create_private")):
            real = getattr(owner, attribute)

            def changed(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
                if threading.get_ident() == mine:  # the patch is everybody's, the kill is not
                    changing()
                return _real(*args, **kwargs)

            patch.setattr(owner, attribute, changed)
        low = data.draw(st.integers(0, len(spans) - 2), "merged from")
        try:
            for _ in merge(folder, "steps", spans[low:]):
                pass
        except Killed:
            pass
        patch.undo()
        assert numbers(folder) == list(range(first))
        seen += follower.poll().steps["step"].tolist()
        part(folder, first, 3)
        seen += follower.poll().steps["step"].tolist()
        assert seen == list(range(first + 3))
        compact(folder, 1000)
        assert [f.name for f in folder.glob("*.parquet")] == [name_of("steps", 0, first + 2)]
        assert numbers(folder) == list(range(first + 3))
        assert follower.poll().steps.empty


def test_a_file_merged_away_between_listing_and_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_margingate.trace import rows as rows_module

    spans = [part(tmp_path, 10 * k, 10) for k in range(5)]
    follower = RunFollower(tmp_path, step_columns=["step"], request_columns=[])
    real, once = rows_module.read_table, iter([True])

    def read(file: Path, names: list[str]) -> pa.Table:
        if file.name == name_of("steps", 20, 29) and next(once, False):
            list(merge(tmp_path, "steps", spans))
        return real(file, names)

    monkeypatch.setattr(rows_module, "read_table", read)
    found = follower.poll()
    assert found.steps["step"].tolist() == list(range(50))
    assert [w for w in found.warnings if "manifest" not in w] == []


def test_few_files_while_it_lives_and_large_ones_at_the_end(tmp_path: Path) -> None:
    """A quiet server closed a file every 5 s for ever: 218,000 in a week."""
    row = {"request": [1], "request_id": ["r"], "step": [0]}
    most = 0
    with TraceWriter(tmp_path, {}, seconds_per_file=60) as w:
        for k in range(400):
            w.add_steps({**row, "step": [k]})
            w.add_request({"request": k, "request_id": "r"})
            assert w.flush()
            most = max(most, len(list(w.path.glob("steps-*"))))
    assert most <= 2 * FAN, "one size of file here"
    assert sorted(f.name for f in w.path.glob("*")) == [
        "manifest.json", name_of("requests", 0, 399), name_of("steps", 0, 399),
    ]  # fmt: skip
    run = read_run(w.path)
    assert run.warnings == []
    assert run.steps["step"].tolist() == run.requests["request"].tolist() == list(range(400))


def test_a_reader_follows_while_the_writer_merges(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, {}, seconds_per_file=0.02) as w:
        follower = RunFollower(w.path, step_columns=["step"], request_columns=["request"])
        stop = threading.Event()

        def work() -> None:
            for k in itertools.count():
                if stop.is_set():
                    return
                w.add_steps({"step": [k], "request": [k]})
                w.add_request({"request": k})
                stop.wait(0.002)

        thread = threading.Thread(target=work)
        thread.start()
        steps: list[int] = []
        requests: list[int] = []
        while len(steps) < 1500:
            found = follower.poll()
            assert found.warnings == []
            steps += found.steps["step"].tolist()
            requests += found.requests["request"].tolist()
            assert len(steps) >= len(requests), "a request's steps come before it"
        stop.set()
        thread.join()
    found = follower.poll()
    assert steps + found.steps["step"].tolist() == list(range(w.step_rows))
    assert requests + found.requests["request"].tolist() == list(range(w.request_rows))
    assert len(list(w.path.glob("steps-*"))) == 1


@given(st.lists(st.integers(1, 50_000), max_size=600), st.integers(1, 50_000))
@settings(deadline=None)
def test_a_live_run_never_has_more_than_some_dozens_of_small_files(rows: list[int], most: int) -> None:
    files: list[int] = []
    rewritten = 0
    for n in (min(n, most) for n in rows):
        files.append(n)
        while (chosen := due(files)) is not None:
            rewritten += sum(files[chosen])
            files[chosen] = [sum(files[chosen])]
        assert sum(n < TIERS[-1] for n in files) <= len(TIERS) * (FAN - 1)
    assert sum(files) == sum(min(n, most) for n in rows)
    small = TIERS[0] / FAN / max(1, min([*rows, most]))  # below it a file is rewritten until it has grown
    assert rewritten <= sum(files) * (3 * len(TIERS) + small)


def test_what_is_merged() -> None:
    assert due([10] * (FAN - 1)) is None
    assert due([5_000, *[10] * FAN]) == slice(1, FAN + 1), "the smallest first"
    assert due([*[5_000] * FAN, 10, 10]) == slice(0, FAN), "and a large one not for the sake of a few small ones"
    assert due([900_000, *[10] * (FAN - 1)]) is None
    assert small_tail([50_000, 10, 10], 50_000) == slice(1, 3)
    assert small_tail([50_000, 10], 50_000) is None


def test_a_merge_that_fails_is_said_once_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compact_module.pq, "ParquetWriter", full)
    with TraceWriter(tmp_path, {}, seconds_per_file=60) as w:
        for k in range(FAN + 3):
            w.add_steps({"step": [k], "request": [k]})
            assert w.flush()
        monkeypatch.undo()
    assert sum("No space left" in r.getMessage() for r in caplog.records) == 1
    assert numbers(w.path) == list(range(FAN + 3))
    assert not list(w.path.glob(".*"))


def test_compacting_a_run_of_schema_1_is_refused(tmp_path: Path) -> None:
    part(tmp_path, 0, 3)
    (tmp_path / name_of("steps", 0, 2)).rename(tmp_path / "steps-0000.parquet")
    with pytest.raises(TraceError, match=r"schema 1\.x keeps its files"):
        compact(tmp_path)


def test_only_the_owner_reads_a_run(tmp_path: Path) -> None:
    """It holds settings, and prompts where they are recorded."""
    mask = os.umask(0)
    try:
        with TraceWriter(tmp_path, {}, seconds_per_file=60) as w:
            for k in range(FAN):
                w.add_steps({"step": [k]})
                assert w.flush()
    finally:
        os.umask(mask)
    assert w.path.stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in w.path.iterdir()} == {0o600}
    assert len(list_files(w.path, "steps").files) == 1


@given(
    limit=st.integers(1, 50),
    actions=st.lists(
        st.one_of(st.integers(0, 30).map(lambda n: ("in", n)), st.integers(1, 40).map(lambda n: ("out", n)))
    ),
    by_column=st.booleans(),
)
def test_rows_into_the_ring_are_rows_out_and_dropped(
    limit: int, actions: list[tuple[str, int]], by_column: bool
) -> None:
    ring, put, got = StepRing(limit), 0, []

    def take(n: int) -> None:
        chunks, rows = ring.take(n)
        assert rows == sum(map(chunk_len, chunks))
        for chunk in chunks:
            got.extend(chunk["step"] if isinstance(chunk, dict) else [row[0] for row in chunk])

    for what, n in actions:
        if what == "in":
            rows = list(range(put, put + n))
            ring.append({"step": rows} if by_column else [(k,) for k in rows])
            put += n
        else:
            take(n)
        assert len(ring) <= limit
    take(10**9)
    assert len(got) + ring.dropped == put
    assert got == sorted(set(got)), "in order, none twice"
    assert not put or not got or got[-1] == put - 1 or ring.dropped == 0, "the newest stay"


def files_of(folder: Path) -> list[tuple[int, int]]:
    return [(f.first or 0, f.last or 0) for f in list_files(folder, "steps").files]


def test_a_merged_file_takes_the_place_of_its_parts(tmp_path: Path) -> None:
    closed = ClosedFiles()
    for k in range(FAN):
        closed.add("steps", part(tmp_path, 10 * k, 10))
    assert (len(closed), closed.merging) == (FAN, False)
    closed.merge_some(tmp_path)
    assert closed.merging
    while closed.merging:
        closed.merge_some(tmp_path)
    assert len(closed) == 1
    assert files_of(tmp_path) == [(0, 10 * FAN - 1)]
    for k in (FAN, FAN + 1):
        closed.add("steps", part(tmp_path, 10 * k, 10))
    assert closed.merge_small(tmp_path, 25), "the small ones at the end"
    assert files_of(tmp_path) == [(0, 10 * FAN - 1), (10 * FAN, 10 * FAN + 19)]
    assert closed.merge_small(tmp_path, 10**6), "what was merged can be merged again"
    assert files_of(tmp_path) == [(0, 10 * FAN + 19)]
    assert not closed.merge_small(tmp_path, 10**6)
    assert numbers(tmp_path) == list(range(10 * FAN + 20))
    closed.clear()
    assert len(closed) == 0


def test_compacting_joins_small_neighbours_alone(tmp_path: Path) -> None:
    for first, rows in ((0, 4), (4, 5), (9, 4), (13, 4), (30, 4), (34, 4)):
        part(tmp_path, first, rows)
    (tmp_path / "manifest.json").write_text("{}")
    assert compact(tmp_path, 5) == (6, 4)
    assert files_of(tmp_path) == [(0, 3), (4, 8), (9, 16), (30, 37)], "one of five rows is not small, and a gap stays"
    part(tmp_path, 9, 4)  # a part that its merge should have removed
    assert compact(tmp_path, 5) == (5, 4)
    assert compact(tmp_path, 100) == (4, 2)
    assert files_of(tmp_path) == [(0, 16), (30, 37)]


def test_a_run_that_cannot_be_compacted_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise pa.ArrowInvalid("no room\nand more")

    part(tmp_path, 0, 3)
    part(tmp_path, 3, 3)
    monkeypatch.setattr(compact_module.pq, "ParquetWriter", full)
    with pytest.raises(TraceError) as caught:
        compact(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot merge its files (no room); they stay as they are"
    monkeypatch.undo()
    assert files_of(tmp_path) == [(0, 2), (3, 5)]
    os.truncate(tmp_path / name_of("steps", 3, 5), 0)
    with pytest.raises(TraceError, match="cannot merge its files"):
        compact(tmp_path)


def test_a_merge_that_found_other_rows_than_its_names_say(tmp_path: Path) -> None:
    spans = [part(tmp_path, 0, 3), part(tmp_path, 3, 3), part(tmp_path, 6, 3)]
    wrong = [(0, 2), (3, 5), (6, 9)]
    (tmp_path / name_of("steps", *spans[2])).rename(tmp_path / name_of("steps", *wrong[2]))
    with pytest.raises(pa.ArrowInvalid) as caught:
        list(merge(tmp_path, "steps", wrong))
    names = name_of("steps", 0, 2), name_of("steps", 6, 9)
    assert str(caught.value) == f"{tmp_path.name}: files {names[0]} to {names[1]} hold 9 rows"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(name_of("steps", *span) for span in wrong)


def test_a_merged_file_has_row_groups_of_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_module, "GROUP_ROWS", 4)
    spans = [part(tmp_path, first, 3) for first in (0, 3, 6)]
    assert len(list(merge(tmp_path, "steps", spans))) == 2, "a piece at each step"
    (file,) = tmp_path.iterdir()
    assert file.name == name_of("steps", 0, 8)
    found = pq.read_metadata(file)
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [4, 2, 3]
    assert pq.read_table(file)["step"].to_pylist() == list(range(9))
