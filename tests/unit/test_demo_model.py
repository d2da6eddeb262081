import json
import random
import shutil
import sys

import pytest

from sglang_margingate.demo.chat import ASSISTANT, EOS, render_prompt
from sglang_margingate.demo.corpora import CORPORA, generate
from sglang_margingate.demo.corpora.arith import read_answer
from sglang_margingate.demo.evaluate import call_holds, has_loop, parses
from sglang_margingate.demo.paths import ModelFilesError, check_model_dir, model_path
from sglang_margingate.demo.prompts import load_prompts

MODEL = model_path()


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from sglang_margingate.demo.hf import load_tokenizer

    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def decoder():
    pytest.importorskip("torch")
    from sglang_margingate.demo.probe_flips import Decoder

    return Decoder(MODEL)


def test_folder_is_whole_and_small():
    check_model_dir(MODEL)
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 16_000_000


def test_config_gives_the_shape_that_flips():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["head_dim"]) == (256, 64)
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["intermediate_size"] >= 2048
    assert config["max_position_embeddings"] >= 1024


@pytest.mark.parametrize("corpus", CORPORA)
def test_tokenizer_round_trip(tokenizer, corpus):
    rng = random.Random(1)
    for text in [generate(corpus, rng).completion for _ in range(20)] + ["Ünïcode ☃ 1234\t\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stay_apart(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("2047")["input_ids"]) == ["2", "0", "4", "7"]


def test_chat_template_gives_the_ids_of_training(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    document = generate("arith", random.Random(2))
    trained = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    row = trained.encode(render_prompt(document.prompt) + document.completion + EOS).ids
    start = row.index(trained.token_to_id(ASSISTANT)) + 1

    user = {"role": "user", "content": document.prompt}
    ask = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ask == tokenizer(render_prompt(document.prompt))["input_ids"] == row[:start]
    whole = [user, {"role": "assistant", "content": document.completion}]
    assert tokenizer.apply_chat_template(whole, return_dict=False) == row
    assert row[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token is None


def test_training_rows_learn_completions_only(tokenizer):
    pytest.importorskip("torch")
    from sglang_margingate.demo.train import IDS, LEARN, build_rows

    row = build_rows((str(MODEL / "tokenizer.json"), 1, 40, 512))[0]
    learnt = tokenizer.decode([int(t) & IDS for t in row if t & LEARN])
    asked = tokenizer.decode([int(t) & IDS for t in row if not t & LEARN])
    assert EOS in learnt
    assert ASSISTANT not in learnt
    assert EOS not in asked
    assert asked.startswith("<|user|>")


def test_own_network_and_transformers_agree(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sglang_margingate.demo.hf import load_model
    from sglang_margingate.demo.network import TINY, Llama, save_hf

    torch.manual_seed(0)
    model = Llama(TINY)
    save_hf(model, tmp_path, eos=0, pad=1)
    model.load_state_dict({k: t.bfloat16().float() for k, t in model.state_dict().items()})
    tokens = torch.randint(0, TINY.vocab_size, (2, 40))
    torch.testing.assert_close(load_model(tmp_path).float()(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


def test_embedded_model_solves_held_out_problems(tokenizer, decoder):
    prompts = load_prompts("arith", 4)
    ids = [tokenizer(render_prompt(p.prompt))["input_ids"] for p in prompts]
    traces = decoder.decode(ids, tokenizer.eos_token_id)
    assert all(t.tokens[-1] == tokenizer.eos_token_id for t in traces)
    answers = [read_answer(tokenizer.decode(t.tokens, skip_special_tokens=True)) for t in traces]
    assert answers == [p.answer for p in prompts]


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    return folder


@pytest.mark.parametrize("size", [0, 5, 1000, 15_000_000])
def test_truncated_weights_name_file_and_fix(copy, size):
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is truncated \(.*git checkout") as caught:
        check_model_dir(copy)
    assert "\n" not in str(caught.value)


def test_other_damage_names_file_and_fix(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is damaged"):
        check_model_dir(copy)
    weights.write_bytes((50).to_bytes(8, "little") + b"x" * 100)
    with pytest.raises(ModelFilesError, match="damaged safetensors header"):
        check_model_dir(copy)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelFilesError, match="git lfs pull"):
        check_model_dir(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match=r"config\.json is not valid JSON"):
        check_model_dir(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is missing"):
        check_model_dir(copy)


@pytest.mark.parametrize("module", ["evaluate", "probe_flips"])
def test_commands_refuse_a_truncated_model_in_one_line(copy, monkeypatch, module):
    pytest.importorskip("torch")
    import importlib

    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(sys, "argv", [module, "--model", str(copy)])
    with pytest.raises(SystemExit, match=r"^error: .*truncated.*$"):
        importlib.import_module(f"sglang_margingate.demo.{module}").main()


def test_scores():
    assert has_loop([1, 2, 3] * 30)
    assert has_loop([9, 8, 7, *([5] * 70)])
    assert not has_loop(list(range(300)))
    assert not has_loop([1, 2, 3] * 20)
    assert parses("def f(x):\n    return x\n\n\nassert f(1) == 1")
    assert not parses("def f(x):\nreturn x")
    assert not parses("1 + 1")
    assert call_holds("assert 1 == 1")
    assert not call_holds("assert 1 == 2")
    assert call_holds("print(3)  # 3")
    assert not call_holds("print(3)  # 4")
