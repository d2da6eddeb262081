import ast
import contextlib
import io
import random

import pytest

from sglang_margingate.demo.corpora import CORPORA, HELDOUT, SPLITS, TRAIN, generate, split_of
from sglang_margingate.demo.corpora.arith import read_answer
from sglang_margingate.demo.corpora.base import draw_in_split, lean
from sglang_margingate.demo.prompts import PROMPTS_EACH, draw_prompts, load_prompts


@pytest.mark.parametrize("corpus", CORPORA)
def test_same_seed_same_documents(corpus):
    first, second = random.Random(3), random.Random(3)
    a = [generate(corpus, first) for _ in range(50)]
    assert a == [generate(corpus, second) for _ in range(50)]
    assert len({d.completion for d in a}) > 40


@pytest.mark.parametrize("corpus", CORPORA)
def test_splits_never_share_a_template_instance(corpus):
    rng = random.Random(4)
    keys = {split: {generate(corpus, rng, split).key for _ in range(1500)} for split in SPLITS}
    assert not keys[TRAIN] & keys[HELDOUT]
    assert all(split_of(key) == split for split in SPLITS for key in keys[split])


def test_wording_does_not_move_an_arith_problem_to_the_other_split():
    document = generate("arith", random.Random(5), HELDOUT)
    assert not any(word in document.key for word in document.prompt.split() if word.isalpha())


@pytest.mark.parametrize("call", [lambda: generate("poems", random.Random(0)), lambda: load_prompts("poems")])
def test_unknown_corpus_names_the_choices(call):
    with pytest.raises(ValueError, match="unknown corpus 'poems'; choose one of: arith, code, story") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_unknown_split_names_the_choices():
    with pytest.raises(ValueError, match="choose one of: train, heldout"):
        draw_in_split(random.Random(0), "test", lambda rng: 0, str)


def test_arith_solutions_are_right():
    rng = random.Random(6)
    for _ in range(300):
        document = generate("arith", rng)
        assert read_answer(document.completion) == document.answer
        for line in document.completion.splitlines():
            for part in line.replace(":", ".").split("."):
                if "=" in part:
                    left, right = part.split("=")
                    expression = "".join(c for c in left if c in "0123456789+-*/")
                    assert eval(expression) == int(right), part


def test_code_parses_and_its_worked_call_holds():
    rng = random.Random(7)
    for _ in range(200):
        source = generate("code", rng).completion
        ast.parse(source)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(source, {})
        if "  # " in source.splitlines()[-1]:
            assert out.getvalue().strip() == source.rsplit("  # ", 1)[1].strip("'")


def test_story_keeps_its_cast_and_ends():
    rng = random.Random(8)
    for _ in range(50):
        document = generate("story", rng)
        name, _, place, wish = document.key.removeprefix("story:").split("|")
        assert all(part in document.completion for part in (name, place, wish))
        assert document.completion.endswith("The end.")
        assert "{" not in document.completion


def test_lean_is_a_mild_preference_that_depends_on_the_context():
    rng = random.Random(9)
    options = ("a", "b", "c", "d")
    best = set()
    for context in map(str, range(12)):
        drawn = [lean(rng, options, context) for _ in range(600)]
        assert set(drawn) == set(options)
        best.add(max(options, key=drawn.count))
    assert len(best) > 1


@pytest.mark.parametrize("corpus", CORPORA)
def test_committed_prompts_are_the_drawn_ones(corpus):
    prompts = load_prompts(corpus)
    assert len(prompts) == PROMPTS_EACH == 200
    assert prompts == draw_prompts(corpus)
    assert len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == 200
    assert {p.dataset for p in prompts} == {corpus}
    assert all((p.answer is not None) == (corpus == "arith") for p in prompts)
    assert load_prompts(corpus, 5) == prompts[:5]
