"""The doctor with fakes: what each part concludes, what is kept when something ends it, and a report that says so."""

from __future__ import annotations

import argparse
import builtins
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_server import FakeServer

from sglang_margingate.bench.doctor import examination, kernels, machine, report, served
from sglang_margingate.bench.doctor.budget import Budget
from sglang_margingate.bench.doctor.findings import Finding, Part, State, conclude, not_checked
from sglang_margingate.bench.doctor.subject import Subject, subject_of, too_large, write_weights
from sglang_margingate.bench.doctor.visit import Visit
from sglang_margingate.bench.kernels.shapes import SHAPES, weight_bytes
from sglang_margingate.bench.options import UsageError
from sglang_margingate.cli import main

MAP = {
    "map": {"environment": {"device": "fake", "torch": "2"}, "seconds": 1.0, "layers": [
        {"name": "model.layers.0.qkv_proj", "shape": [8, 4], "classes": [[1, 16, 0], [17, 64, 1]]}]},
    "decode_ok": True, "prefill": "batched", "decode_rows": "17-64", "verify_rows": 64, "graph_sizes": [], "notes": [],
}  # fmt: skip
STATUS: dict[str, Any] = {
    "self_test": {"passed": True, "rows": 64},
    "invariance": MAP,
    "notes": [],
    "dtype": "bfloat16",
}
WORDS = ["doctor", "--vocab", "1000", "--prompts", "12", "--max-tokens", "40"]


def doctor(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Run the command; return its status and both reports."""
    out = tmp_path / "report.md"
    code = main([*WORDS, "-o", str(out), *words])
    return code, json.loads(out.with_suffix(".json").read_text()), out.read_text()


def states(document: dict[str, Any]) -> dict[str, str]:
    return {part["part"]: part["state"] for part in document["parts"]}


def test_a_good_server_beside_one_that_flips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(status=STATUS) as ours, FakeServer(flip_rate=0.05, gauge="loads") as stock:
        words = ["--base-url", ours.base_url, "--control-url", stock.base_url]
        parts = "machine,versions,identity,control,against"
        code, document, text = doctor(tmp_path, *words, "--parts", parts)
    assert code == 0
    found = states(document)
    assert list(found) == ["machine", "versions", "ours", "identity", "cost", "stock", "control", "against"]
    assert (found["ours"], found["identity"], found["control"]) == ("holds", "holds", "holds")
    assert "self-test passed at 64 rows, decode in class at 17-64 rows, prefill batched" in text
    assert "12/12 prompts gave the same output in every run (labels: gated 36)" in text
    cost = next(part for part in document["parts"] if part["part"] == "against")
    assert set(cost["details"]["ratios"]) == {"1", "8"}
    assert "1-16:a 17-64:b" in text
    assert document["schema"] == "margingate-doctor/1"
    assert capsys.readouterr().out.splitlines()[-2].startswith("Holds here: 12/12 prompts")
    row = report.works_on(document)
    assert "bfloat16" in row
    assert "the ungated server" in row
    assert row in text


def test_a_server_that_flips_does_not_hold(tmp_path: Path) -> None:
    with FakeServer(status=STATUS, flip_rate=0.05) as bad, FakeServer(flip_rate=0.05, gauge="loads") as stock:
        words = ["--base-url", bad.base_url, "--control-url", stock.base_url, "--parts", "identity,control"]
        code, document, text = doctor(tmp_path, *words)
    assert code == 1
    assert states(document)["identity"] == "does not hold"
    assert "Does not hold here: identity: " in text
    assert "not shown" in report.works_on(document)


def test_identity_without_a_control_that_fails_shows_nothing(tmp_path: Path) -> None:
    with FakeServer(status=STATUS) as ours, FakeServer(gauge="loads") as same:
        words = ["--base-url", ours.base_url, "--control-url", same.base_url, "--parts", "identity,control"]
        code, document, _ = doctor(tmp_path, *words)
    assert code == 2
    assert states(document)["control"] == "not checked"
    assert "the negative control did not show that it could fail" in document["conclusion"]


def test_no_batch_shows_nothing(tmp_path: Path) -> None:
    with FakeServer(status=STATUS, serial=True) as ours:
        code, document, _ = doctor(tmp_path, "--base-url", ours.base_url, "--parts", "identity")
    assert code == 2
    assert "no batch formed" in document["conclusion"]


def test_a_server_that_dies_leaves_what_was_seen(tmp_path: Path) -> None:
    with FakeServer(status=STATUS, dies_after=20) as ours:
        code, document, _ = doctor(tmp_path, "--base-url", ours.base_url, "--parts", "machine,identity")
    assert code == 2
    assert states(document) == {"machine": "noted", "ours": "holds", "identity": "not checked"}
    assert document["parts"][-1]["details"]["phases"][0]["requests"] == 12


def test_what_start_up_found_wrong_is_wrong() -> None:
    for change, said in (
        ({"self_test": {"passed": False, "rows": 8, "broken_layer": "layers.3.mlp"}}, "self-test: layers.3.mlp"),
        ({"invariance": {**MAP, "decode_ok": False}}, "NOT in class"),
        ({"invariance": {**MAP, "prefill": None}}, "NOT repeatable"),
        ({"notes": ["served at none"]}, "served at none"),
    ):
        visit: Any = SimpleNamespace(client=SimpleNamespace(status=lambda change=change: {**STATUS, **change}))
        finding = served.of_status(visit)
        assert finding.state is State.FAILS
        assert said in finding.said


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without PyTorch, SGLang or a GPU."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("torch", "sglang"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    for module in (machine, kernels, served):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("torch", "sglang") else object())
    monkeypatch.setattr(builtins, "__import__", refuse)
    for name in [n for n in sys.modules if n.split(".")[0] in ("torch", "sglang")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("absent")
def test_without_sglang_it_says_what_it_could_check(tmp_path: Path) -> None:
    code, document, text = doctor(tmp_path)
    assert code == 2
    assert states(document) == {
        "machine": "noted", "versions": "noted", "kernels": "not checked", "repeat": "not checked", "ours": "not checked",
        "identity": "not checked", "cost": "not checked", "stock": "not checked", "control": "not checked",
        "against": "not checked",
    }  # fmt: skip
    assert "PyTorch is not installed" in document["conclusion"]
    assert "pip install 'sglang-margingate[gpu]'" in text


def test_a_model_that_does_not_fit_is_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(served, "_start", lambda *_: pytest.fail("a server was started"))
    monkeypatch.setattr(served, "write_weights", lambda *_: pytest.fail("weights were written"))
    code, document, _ = doctor(tmp_path, "--shape", "llama-3.1-8b", "--parts", "machine,identity,control")
    assert code == 2
    assert "does not fit: 16.1 GB of weights, 8.0 GB of memory in this machine" in document["conclusion"]
    assert states(document)["machine"] == "noted"
    assert states(document)["control"] == "not checked"


def test_memory_is_that_of_the_gpus_in_use() -> None:
    card = machine.Gpu("card", 24 * 10**9, "8.6", "580.1")
    for flags, memory in (([], 24), (["--tp-size", "2"], 48), (["--tp=4"], 72)):
        visit: Any = SimpleNamespace(cards=[card] * 3, args=SimpleNamespace(server_flags=flags))
        assert served._cards(visit)[0] == memory * 10**9
    assert too_large(subject_of(None, "qwen2.5-14b"), 48 * 10**9, "") == ""
    assert "--tp-size" in too_large(subject_of(None, "qwen2.5-14b"), 24 * 10**9, "1 GPU")


def test_a_server_that_refuses_to_start_is_reported_with_its_log(tmp_path: Path) -> None:
    visit = _visit(tmp_path, tmp_path)
    visit.args.server_flags = ["--margingate-policy", "hope"]
    finding = served._start(visit, served.OURS)
    assert finding is not None
    assert finding.state is State.FAILS
    assert finding.said.startswith("the canonical server did not start: ")
    assert any("hope" in line for line in finding.details["log"])
    assert served.identity(visit).said == finding.said
    assert (served.start_stock(visit).state, served.cost(visit).state) == (State.NOT_CHECKED, State.NOT_CHECKED)
    visit.close()
    assert not visit.folder.exists()


def _visit(tmp_path: Path, model: Path, budget: float = 60.0) -> Visit:
    args = argparse.Namespace(scratch=tmp_path, server_flags=[], base_url=None, vocab=None)
    return Visit(args, subject_of(str(model), None), Budget(budget), [], False)


def stub(name: str, call: Any, seconds: float = 0.0) -> Part:
    return Part(name, name, call, seconds)


GOOD = Finding(State.HOLDS, "good")


def wait(_visit: Any) -> Finding:
    time.sleep(60)
    return GOOD


def test_ctrl_c_keeps_what_was_found(tmp_path: Path) -> None:
    visit = _visit(tmp_path, tmp_path)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    parts = [stub("a", lambda _: Finding(State.HOLDS, "good")), stub("b", wait), stub("c", lambda _: GOOD)]
    ended = examination.examine(visit, parts)
    assert ended == "interrupted"
    assert [f.state for f in visit.findings] == [State.HOLDS, State.CUT, State.NOT_CHECKED]
    assert conclude(visit.findings, ended).code == 130
    assert "1 of 3 parts were" in conclude(visit.findings, ended).text
    assert not visit.folder.exists()


def test_the_budget_ends_a_part_and_is_not_begun_beyond(tmp_path: Path) -> None:
    visit = _visit(tmp_path, tmp_path, 0.3)
    parts = [stub("a", lambda _: Finding(State.HOLDS, "good")), stub("b", wait), stub("c", lambda _: GOOD, 5.0)]
    with visit.budget:
        ended = examination.examine(visit, parts)
    assert ended == "the budget of 0.3 s is spent"
    assert [f.state for f in visit.findings] == [State.HOLDS, State.CUT, State.NOT_CHECKED]
    assert conclude(visit.findings, ended).code == 2


def test_a_server_is_stopped_whole_even_when_the_budget_ends() -> None:
    budget = Budget(0.05)
    with budget, budget.hold():
        time.sleep(0.2)
    assert budget.spent
    assert budget.left == 0


def test_a_repeat_that_the_client_read_late_is_no_time_of_a_step() -> None:
    assert served.sound([0.06, 7.3, 10.2]) == [7.3, 10.2]
    assert served.sound([7.1, 9.9, 7.4]) == [7.1, 9.9, 7.4]
    costs = {served.OURS: {"1": served.sound([0.06, 8.0, 8.0])}, served.STOCK: {"1": [4.0, 4.0, 4.0]}}
    found = served.compared(costs, "", {})
    late = "1 repeats whose tokens came all at once are left out"
    assert found.said == f"our step is 2.00 at 1 of stock's, by batch; {late}"
    costs[served.STOCK]["1"] = [4.0, 4.0, 9.0]
    assert served.compared(costs, "", {}).said.endswith("something else used the machine meanwhile")


def test_what_breaks_inside_a_part_is_a_finding(tmp_path: Path) -> None:
    visit = _visit(tmp_path, tmp_path)

    def broken(_visit: Any) -> Finding:
        raise RuntimeError("CUDA error:\n an illegal memory access")

    assert examination.examine(visit, [stub("a", broken), stub("b", lambda _: GOOD)]) == ""
    assert visit.findings[0].said == "could not be: RuntimeError: CUDA error: an illegal memory access"
    assert visit.findings[0].state is State.NOT_CHECKED
    assert visit.findings[1].state is State.HOLDS


def test_kernels_that_differ_or_die() -> None:
    rows = [
        {"what": "compare", "kernel": "a", "holds": True, "exact": True, "largest_difference": 0.0},
        {"what": "compare", "kernel": "b", "holds": False, "exact": False, "largest_difference": 0.5},
        {"what": "left out", "kernel": "c", "why": "no"},
    ]
    assert kernels.compared(rows[:1], "").state is State.HOLDS
    found = kernels.compared(rows, "")
    assert (found.state, found.said) == (State.FAILS, "1 of 2 kernels give what their references give; not b")
    assert kernels.compared(rows[:1], "illegal access").state is State.FAILS
    assert kernels.compared(rows[:1], "interrupted").state is State.CUT
    assert kernels.compared([], "boom").state is State.NOT_CHECKED
    again = [{"what": "repeat", "kernel": "a", "how": how, "calls": 1000, "differed": n, "elements": n}
             for how, n in (("alone", 0), ("beside a process", 2))]  # fmt: skip
    assert kernels.repeated(again[:1], "").state is State.HOLDS
    assert kernels.repeated(again, "").said.startswith("2 of 2,000 results of 1 kernels had other bits")
    assert kernels.repeated(again, "").state is State.FAILS


def test_the_kernels_of_a_cpu_hold_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torch = pytest.importorskip("torch")
    from sglang_margingate.bench.kernels import cases, repeat, run

    assert run.main(["--device", "cpu", "--seconds", "0", "--shape", "4,2,16,64,96,128"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    compared = [row for row in rows if row["what"] == "compare"]
    assert len(compared) == 14
    assert all(row["holds"] for row in compared)
    assert [row["kernel"] for row in rows if row["what"] == "left out"] == ["the Triton kernels"]
    right = cases.Case("x", lambda: torch.ones(3), lambda: torch.ones(3), 1e-2, 1e-2)
    assert run.compare(right)["holds"]

    def does_not_compile() -> Any:
        raise RuntimeError("out of resource:\n shared memory")

    broken = run.compare(right._replace(call=does_not_compile))
    assert (broken["holds"], broken["error"]) == (False, "RuntimeError: out of resource: shared memory")
    run.repeat([right._replace(call=does_not_compile)], "cpu", 0.01)
    assert json.loads(capsys.readouterr().out)["why"] == broken["error"]
    assert "RuntimeError" in str(kernels.compared([broken], "").tables[0].rows)
    assert not run.compare(right._replace(call=lambda: torch.tensor([1.0, 1.0, 1.1])))["holds"]
    assert not run.compare(right._replace(call=lambda: torch.tensor([1.0, 1.0, 1 + 1e-6]), rtol=0, atol=0))["holds"]
    results = iter([0.0, 0.0, 0.0, 1e-7])
    shaky = repeat.HostRepeated("x", lambda: torch.tensor([next(results, 0.0)]))
    calls, differed, elements = shaky.run(0.02, None)
    assert calls > 4
    assert (differed, elements) == (1, 1)


def test_repeating_on_a_cpu_runs_beside_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from sglang_margingate.bench.kernels import cases, run

    run.repeat([case for case in cases.of_a_cpu(run.SMALL) if isinstance(case, cases.Case)][:2], "cpu", 0.08)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["how"] for row in rows] == ["alone", "alone", "beside a process", "beside a process"]
    assert all(row["calls"] >= 1 and row["differed"] == 0 for row in rows)


def test_shapes_have_the_sizes_of_their_models() -> None:
    sizes = {name: weight_bytes(config) / 2e9 for name, config in SHAPES.items()}
    assert {name: round(billions, 1) for name, billions in sizes.items()} == {
        "llama-3.2-1b": 1.2, "deepseek-r1-distill-qwen-7b": 7.6, "llama-3.1-8b": 8.0, "qwen3-8b": 8.2, "qwen2.5-14b": 14.8,
    }  # fmt: skip
    assert subject_of(None, "llama-3.1-8b").kernels() == "32,8,128,4096,14336,128256"


def test_weights_of_a_shape_are_written_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    small = {**SHAPES["qwen3-8b"], "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16,
             "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 128}  # fmt: skip
    shape = Subject("small", "", small, weight_bytes(small), random=True)
    made = write_weights(shape, tmp_path, "cpu")
    assert shape.weights is not None
    written = sum(file.stat().st_size for file in Path(made.path).glob("*.safetensors"))
    assert shape.weights < written < 1.2 * shape.weights + 5000, "weights, and a header for each file"
    assert json.loads((Path(made.path) / "config.json").read_text()) == small
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match="name another folder with --scratch"):
        write_weights(shape, tmp_path, "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "gpt-9"], "--shape: 'gpt-9' is unknown; use llama-3.2-1b"),
        (["--shape", "qwen3-8b", "--model-path", "x/y"], "--model-path x/y names a model already"),
        (["--model-path", "/nowhere"], "/nowhere is not a folder"),
        (["--parts", "moon"], "--parts: 'moon' is unknown; use machine"),
        (["--control-url", "http://localhost:1"], "name the gated server, too"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NVIDIA A10G, 23028, 8.6, 580.1\nNVIDIA L4, 23034, 8.9, 580.1\nbroken line\n"
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [card.capability for card in machine.gpus()] == ["8.6", "8.9"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [card.name for card in machine.gpus()] == ["NVIDIA L4"]


def test_a_report_names_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    monkeypatch.setattr(served, "_start", lambda visit, mode: not_checked(f"no {visit.subject.path}"))
    code, document, text = doctor(
        tmp_path, "--model-path", str(model), "--parts", "identity", "--", "--x", str(tmp_path)
    )
    assert code == 2
    assert str(tmp_path) not in text + json.dumps(document)
    assert "~/models/mine" in text
