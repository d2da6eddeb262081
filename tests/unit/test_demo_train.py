import csv
import shutil

import pytest

torch = pytest.importorskip("torch")

from sglang_margingate.demo import train  # noqa: E402
from sglang_margingate.demo.paths import check_model_dir, model_path  # noqa: E402

SMALL = [
    "--device",
    "cpu",
    "--preset",
    "tiny",
    "--documents",
    "600",
    "--rows",
    "4",
    "--length",
    "128",
    "--workers",
    "1",
]


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder / name)
    return folder


def test_without_a_gpu_one_line_names_the_fix(out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: no CUDA GPU here: .*--device cpu.*$"):
        train.main(["--out", str(out)])


def test_without_a_tokenizer_one_line_names_the_command(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*tokenizer\.json is missing: run `python -m .*tokenizer"):
        train.main(["--out", str(tmp_path), *SMALL])


def test_too_few_documents(out, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: 3 documents fill .* raise --documents$"):
        train.main(["--out", str(out), "--work", str(tmp_path), *SMALL, "--documents", "3"])


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--length", "9999"]])
def test_values_out_of_range(out, capsys, wrong):
    with pytest.raises(SystemExit):
        train.main(["--out", str(out), *SMALL, *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_trains_resumes_and_saves(out, tmp_path, capsys):
    command = ["--out", str(out), "--work", str(tmp_path / "work"), *SMALL]
    train.main([*command, "--steps", "10"])
    check_model_dir(out)
    train.main([*command, "--steps", "30"])
    assert "going on from" in capsys.readouterr().out
    with (out / "loss_curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])

    (tmp_path / "work" / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match=r"^error: .*checkpoint\.pt is damaged or of another preset: delete it"):
        train.main([*command, "--steps", "40"])


def test_learning_rate_rises_holds_and_ends_at_zero():
    assert train.learning_rate(0.0, 0, 1.0, 10) == pytest.approx(0.1)
    assert train.learning_rate(0.5, 50, 1.0, 10) == 1.0
    assert train.learning_rate(0.8, 50, 1.0, 10) == pytest.approx(0.5)
    assert train.learning_rate(1.0, 50, 1.0, 10) == 0.0
