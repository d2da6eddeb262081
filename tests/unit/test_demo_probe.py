import json
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sglang_margingate.demo import probe_flips  # noqa: E402
from sglang_margingate.demo.chat import render_prompt  # noqa: E402
from sglang_margingate.demo.hf import load_model, load_tokenizer  # noqa: E402
from sglang_margingate.demo.paths import model_path  # noqa: E402
from sglang_margingate.demo.probe_flips import Decoder, Trace, first_difference, histogram, histogram_labels, summarise  # noqa: E402
from sglang_margingate.demo.prompts import load_prompts  # noqa: E402


def test_histogram_has_a_bin_for_exact_ties():
    counts = dict(zip(histogram_labels(), histogram([0.0, 0.0, 0.01, 0.0625, 0.07, 3.0, 9.0, 100.0])))
    assert counts["0 (tie)"] == 2
    assert counts["<= 0.0625"] == 2
    assert counts["<= 0.125"] == 1
    assert counts["<= 4"] == 1
    assert counts["> 8"] == 2
    assert sum(counts.values()) == 8


def test_summary_counts_flips_at_their_first_step():
    alone = [Trace([1, 2, 3], [5.0, 0.01, 2.0]), Trace([1, 2], [5.0, 5.0])]
    batched = [Trace([1, 4, 5], [5.0, 0.02, 1.0]), Trace([1, 2], [5.0, 5.0])]
    assert first_difference(alone[0], batched[0]) == 1
    result = summarise(alone, batched)
    assert (result["flipped"], result["n"], result["steps"]) == (1, 2, 5)
    assert (result["margin_alone_at_flip"], result["margin_batched_at_flip"]) == ([0.01], [0.02])


def test_decoder_follows_transformers():
    """Same weights, same tokens: the loop's logits agree with transformers' to bf16's precision."""
    tokenizer = load_tokenizer(model_path())
    ids = tokenizer(render_prompt(load_prompts("code", 1)[0].prompt))["input_ids"]
    decoder = Decoder(model_path())
    tokens = decoder.decode([ids], tokenizer.eos_token_id, 20)[0].tokens
    with torch.inference_mode():
        logits = load_model(model_path())(torch.tensor([ids + tokens])).logits[0].float()
    at = torch.arange(len(ids) - 1, len(ids) - 1 + len(tokens))
    chosen = logits[at, torch.tensor(tokens)]
    assert bool((logits[at].max(dim=-1).values - chosen <= 0.25).all())


def test_neighbours_do_not_change_a_row_of_the_same_shape():
    tokenizer = load_tokenizer(model_path())
    ids = [tokenizer(render_prompt(p.prompt))["input_ids"] for p in load_prompts("arith", 5)]
    decoder = Decoder(model_path())
    first = decoder.decode([ids[0], ids[1], ids[2]], -1, 12)[0]
    assert first == decoder.decode([ids[0], ids[3], ids[4]], -1, 12)[0]


def test_command_prints_and_writes(monkeypatch, capsys, tmp_path):
    out = tmp_path / "flips.json"
    arguments = ["--dataset", "story", "--limit", "2", "--batch", "3", "--new-tokens", "6", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["probe_flips", *arguments])
    probe_flips.main()
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["datasets"]["story"]["n"] == 2
    assert f"story: {result['datasets']['story']['flipped']}/2 prompts flip" in text
    assert result["repeat_equal"] == result["repeat_n"]
    if result["datasets"]["story"]["flipped"] == 0:
        assert "This machine gives no batch flip" in text
