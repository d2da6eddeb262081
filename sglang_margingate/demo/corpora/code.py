"""Small Python functions from a description, each with a worked call.

The description fixes what the function does and its name; parameter, accumulator and loop names, docstring wording,
loop or comprehension, and the numbers of the worked call are free. Free names are drawn once and copied from then on,
so a completion has forced stretches between its choices. The worked call is computed, so its ``assert`` holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from sglang_margingate.demo.corpora.base import Document, draw_in_split, lean

LISTS = ("values", "numbers", "items", "nums", "data", "xs")
ELEMENTS = ("x", "n", "v", "item", "num", "value")
RESULTS = ("result", "total", "out", "acc", "answer")
TEXTS = ("text", "s", "string", "phrase", "line")
CHARS = ("c", "ch", "char", "letter")
WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "bridge",
    "garden",
    "candle",
    "winter",
    "pepper",
    "banana",
    "letter",
    "cotton",
    "silver",
    "mirror",
    "rabbit",
    "planet",
]
LETTERS = "abcdefgilmnoprstuw"


class Spec(NamedTuple):
    """The slot values that make an instance: the family of functions and its constants."""

    family: str
    parts: tuple[str, ...]
    constants: tuple[int, ...]


class Predicate(NamedTuple):
    """A filter on one element: its expression, its wording, its short name and its meaning."""

    expression: str
    wording: str
    name: str
    test: Callable[[int, int], bool]
    low: int
    high: int


PREDICATES: dict[str, Predicate] = {
    "all": Predicate("", "numbers", "", lambda x, c: True, 0, 0),
    "even": Predicate("{x} % 2 == 0", "even numbers", "even", lambda x, c: x % 2 == 0, 0, 0),
    "odd": Predicate("{x} % 2 == 1", "odd numbers", "odd", lambda x, c: x % 2 == 1, 0, 0),
    "above": Predicate("{x} > {c}", "numbers above {c}", "above_{c}", lambda x, c: x > c, 2, 8),
    "below": Predicate("{x} < {c}", "numbers below {c}", "below_{c}", lambda x, c: x < c, 3, 9),
    "multiple": Predicate("{x} % {c} == 0", "multiples of {c}", "multiples_{c}", lambda x, c: x % c == 0, 3, 7),
    "other": Predicate("{x} != {c}", "numbers other than {c}", "other_{c}", lambda x, c: x != c, 2, 9),
}


class Mapping(NamedTuple):
    """What is done to each kept element."""

    expression: str
    wording: str
    name: str
    run: Callable[[int, int], int]
    low: int
    high: int


MAPPINGS: dict[str, Mapping] = {
    "same": Mapping("{x}", "", "", lambda x, d: x, 0, 0),
    "square": Mapping("{x} * {x}", "squared", "squares", lambda x, d: x * x, 0, 0),
    "times": Mapping("{x} * {d}", "times {d}", "times_{d}", lambda x, d: x * d, 2, 12),
    "plus": Mapping("{x} + {d}", "plus {d}", "plus_{d}", lambda x, d: x + d, 1, 20),
    "minus": Mapping("{x} - {d}", "minus {d}", "minus_{d}", lambda x, d: x - d, 1, 20),
}
AGGREGATES = ("sum", "list", "count", "max", "min")
GOALS = {
    "sum": "the sum of",
    "list": "a list of",
    "count": "the count of",
    "max": "the largest of",
    "min": "the smallest of",
}
STRINGS = ("count_letter", "drop_letter", "starts", "repeat", "keep_long", "double_letter", "first_n", "last_n")


def draw_spec(rng: random.Random) -> Spec:
    """Draw a family and its constants."""
    kind = rng.random()
    if kind < 0.65:
        pred, mapping, agg = rng.choice(list(PREDICATES)), rng.choice(list(MAPPINGS)), rng.choice(AGGREGATES)
        c = rng.randint(PREDICATES[pred].low, PREDICATES[pred].high)
        d = rng.randint(MAPPINGS[mapping].low, MAPPINGS[mapping].high)
        if agg == "count":
            mapping, d = "same", 0
        return Spec("list", (pred, mapping, agg), (c, d))
    if kind < 0.85:
        name = rng.choice(STRINGS)
        if name in ("count_letter", "drop_letter", "starts", "double_letter"):
            return Spec("string", (name, rng.choice(LETTERS)), ())
        return Spec("string", (name,), (rng.randint(2, 9),))
    name = rng.choice(("poly", "clamp", "range_sum", "remainder"))
    return Spec("number", (name,), (rng.randint(2, 9), rng.randint(10, 30)))


def key_of(spec: Spec) -> str:
    """Name the instance by family, parts and constants."""
    return f"code:{spec.family}:{','.join(spec.parts)}:{','.join(map(str, spec.constants))}"


def docstring(rng: random.Random, goal: str) -> str:
    """Word the docstring."""
    return rng.choice(
        (f"Return {goal}.", f"Give back {goal}.", f"Compute {goal}.", f"Find {goal}.", f"Work out {goal}.")
    )


def define(rng: random.Random, name: str, parameter: str, goal: str, body: str) -> str:
    """Write the function and the two empty lines after it."""
    return f'def {name}({parameter}):\n    """{docstring(rng, goal)}"""\n{body}\n\n'


def loop(ch: str, over: str, out: str, empty: str, lines: tuple[str, ...]) -> str:
    """Write a loop that fills `out`, started with `empty`; `lines` are its body."""
    inner = "".join(f"        {line}\n" for line in lines)
    return f"{out} = {empty}\n    for {ch} in {over}:\n{inner}    return {out}"


def show(rng: random.Random, name: str, argument: str, value: object) -> str:
    """Write the worked call."""
    size = rng.choice(("small", "quick", "short", "plain", "simple"))
    kind = rng.choice(("example", "test", "check", "call", "try"))
    return f"# a {size} {kind}\n" + rng.choice(
        (
            f"assert {name}({argument}) == {value!r}",
            f"print({name}({argument}))  # {value!r}",
            f"result = {name}({argument})\nassert result == {value!r}",
            f"example = {name}({argument})\nprint(example)  # {value!r}",
        )
    )


def comment(rng: random.Random, indent: str, choices: tuple[str, ...]) -> str:
    """Give a comment line."""
    return f"{indent}# {rng.choice(choices)}\n"


def list_function(rng: random.Random, spec: Spec) -> tuple[str, str, str]:
    """Return description, name and source of a filter-map-aggregate function."""
    pred, mapping, agg = PREDICATES[spec.parts[0]], MAPPINGS[spec.parts[1]], spec.parts[2]
    c, d = spec.constants
    wording, mapped = pred.wording.format(c=c), mapping.wording.format(d=d)
    goal = f"{GOALS[agg]} all {wording}" + (f", each {mapped}" if mapped else "")
    name = "_".join(p for p in (agg, pred.name.format(c=c), mapping.name.format(d=d)) if p)
    name = f"{agg}_all" if name == agg else name
    xs, x, out = lean(rng, LISTS, agg), rng.choice(ELEMENTS), rng.choice(RESULTS)
    test, expr = pred.expression.format(x=x, c=c), mapping.expression.format(x=x, d=d)
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
    kept = [n for n in numbers if pred.test(n, c)]
    done = [mapping.run(n, d) for n in kept]
    value: object
    if agg == "list":
        value = done
    elif agg == "sum":
        value = sum(done)
    elif agg == "count":
        value = len(done)
    else:
        value = (max if agg == "max" else min)(done, default=0)

    body = comment(rng, "    ", ("one pass is enough", "simple and clear", "go through the list", "look at each one"))
    condition = f" if {test}" if test else ""
    if rng.random() < 0.5:
        inner = f"{expr} for {x} in {xs}{condition}"
        call = {
            "sum": f"sum({inner})",
            "list": f"[{inner}]",
            "count": f"sum(1 for {x} in {xs}{condition})",
            "max": f"max(({inner}), default=0)",
            "min": f"min(({inner}), default=0)",
        }[agg]
        body += rng.choice((f"    return {call}\n", f"    {out} = {call}\n    return {out}\n"))
    else:
        body += f"    {out} = {'[]' if agg in ('list', 'max', 'min') else '0'}\n    for {x} in {xs}:\n"
        pad = "        "
        if test:
            body += f"        if {test}:\n"
            pad += "    "
        body += (
            pad
            + {
                "sum": f"{out} += {expr}\n",
                "list": f"{out}.append({expr})\n",
                "count": f"{out} += 1\n",
                "max": f"{out}.append({expr})\n",
                "min": f"{out}.append({expr})\n",
            }[agg]
        )
        body += f"    return {agg}({out}, default=0)\n" if agg in ("max", "min") else f"    return {out}\n"
    trace = ""
    if agg != "list":
        trace = f"# {rng.choice(('kept', 'picked', 'these count', 'used'))}: {', '.join(map(str, kept)) or 'none'}\n"
        if mapping.wording and kept:
            trace += f"# {mapped}: {', '.join(map(str, done))}\n"
    source = define(rng, name, xs, goal, body) + trace + show(rng, name, repr(numbers), value)
    return f"takes a list of numbers and returns {goal}", name, source


def string_function(rng: random.Random, spec: Spec) -> tuple[str, str, str]:
    """Return description, name and source of a function on text or words."""
    kind = spec.parts[0]
    text, ch, out = lean(rng, TEXTS, kind), rng.choice(CHARS), rng.choice(RESULTS)
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 3))]
    phrase = " ".join(words)
    value: object
    if kind in ("count_letter", "drop_letter", "starts", "double_letter"):
        a = spec.parts[1]
        name = {"count_letter": "count", "drop_letter": "drop", "starts": "words_with", "double_letter": "double"}[kind]
        name = f"{name}_{a}"
        goal = {
            "count_letter": f"how often {a} occurs in the text",
            "drop_letter": f"the text without the letter {a}",
            "starts": f"the words that start with {a}",
            "double_letter": f"the text with each {a} doubled",
        }[kind]
        lines = {
            "count_letter": (
                f"return {text}.count('{a}')",
                f"return sum(1 for {ch} in {text} if {ch} == '{a}')",
                loop(ch, text, out, "0", (f"if {ch} == '{a}':", f"    {out} += 1")),
            ),
            "drop_letter": (
                f"return {text}.replace('{a}', '')",
                f"return ''.join({ch} for {ch} in {text} if {ch} != '{a}')",
                loop(ch, text, out, "''", (f"if {ch} != '{a}':", f"    {out} += {ch}")),
            ),
            "starts": (
                f"return [{ch} for {ch} in {text}.split() if {ch}.startswith('{a}')]",
                loop(ch, f"{text}.split()", out, "[]", (f"if {ch}[0] == '{a}':", f"    {out}.append({ch})")),
            ),
            "double_letter": (
                f"return {text}.replace('{a}', '{a}{a}')",
                loop(ch, text, out, "''", (f"{out} += {ch}", f"if {ch} == '{a}':", f"    {out} += {ch}")),
            ),
        }[kind]
        results: dict[str, object] = {
            "count_letter": phrase.count(a),
            "drop_letter": phrase.replace(a, ""),
            "starts": [w for w in words if w.startswith(a)],
            "double_letter": phrase.replace(a, a * 2),
        }
        value = results[kind]
    else:
        k = spec.constants[0]
        name = {"repeat": "repeat", "keep_long": "longer_than", "first_n": "first", "last_n": "last"}[kind] + f"_{k}"
        goal = {
            "repeat": f"the text written {k} times",
            "keep_long": f"the words longer than {k} letters",
            "first_n": f"the first {k} letters of the text",
            "last_n": f"the last {k} letters of the text",
        }[kind]
        if kind == "repeat":
            words = [rng.choice(WORDS)]
            phrase = words[0]
        lines = {
            "repeat": (f"return {text} * {k}", f"return ''.join({text} for _ in range({k}))"),
            "keep_long": (
                f"return [{ch} for {ch} in {text}.split() if len({ch}) > {k}]",
                loop(ch, f"{text}.split()", out, "[]", (f"if len({ch}) > {k}:", f"    {out}.append({ch})")),
            ),
            "first_n": (f"return {text}[:{k}]", f"{out} = {text}[:{k}]\n    return {out}"),
            "last_n": (f"return {text}[-{k}:]", f"{out} = {text}[-{k}:]\n    return {out}"),
        }[kind]
        results = {
            "repeat": phrase * k,
            "keep_long": [w for w in words if len(w) > k],
            "first_n": phrase[:k],
            "last_n": phrase[-k:],
        }
        value = results[kind]
    body = comment(rng, "    ", ("works on any text", "short and simple", "no imports needed", "plain Python"))
    body += f"    {rng.choice(lines)}\n"
    source = define(rng, name, text, goal, body) + show(rng, name, repr(phrase), value)
    return f"takes a text and returns {goal}", name, source


def number_function(rng: random.Random, spec: Spec) -> tuple[str, str, str]:
    """Return description, name and source of a function on one number."""
    kind = spec.parts[0]
    a, b = spec.constants
    x, out = rng.choice(ELEMENTS), rng.choice(RESULTS)
    n = rng.randint(2, 12) if kind != "clamp" else rng.randint(1, 40)
    name, goal, lines, value = {
        "poly": (
            f"scale_{a}_add_{b}",
            f"{a} times the number plus {b}",
            (
                f"return {a} * {x} + {b}",
                f"{out} = {a} * {x}\n    return {out} + {b}",
                f"{out} = {a} * {x} + {b}\n    return {out}",
            ),
            a * n + b,
        ),
        "clamp": (
            f"clamp_{a}_{b}",
            f"the number kept between {a} and {b}",
            (
                f"return max({a}, min({x}, {b}))",
                f"if {x} < {a}:\n        return {a}\n    if {x} > {b}:\n        return {b}\n    return {x}",
                f"{out} = max({x}, {a})\n    return min({out}, {b})",
            ),
            max(a, min(n, b)),
        ),
        "range_sum": (
            f"sum_steps_{a}_{b}",
            f"{b} plus {a} for each unit of the number",
            (
                f"{out} = {b}\n    for _ in range({x}):\n        {out} += {a}\n    return {out}",
                f"return {b} + sum({a} for _ in range({x}))",
                f"return {b} + {a} * {x}",
            ),
            b + a * n,
        ),
        "remainder": (
            f"wrap_{a}_{b}",
            f"the number times {a} modulo {b}",
            (f"return {x} * {a} % {b}", f"{out} = {x} * {a}\n    return {out} % {b}", f"return ({x} * {a}) % {b}"),
            n * a % b,
        ),
    }[kind]
    remarks = ("plain arithmetic", "short and simple", "no imports needed", "works for whole numbers")
    body = comment(rng, "    ", remarks)
    body += f"    {rng.choice(lines)}\n"
    source = define(rng, name, x, goal, body) + show(rng, name, str(n), value)
    return f"takes a number and returns {goal}", name, source


FAMILIES = {"list": list_function, "string": string_function, "number": number_function}
ASK = (
    "Write a Python function `{name}` that {what}. Add a worked call.",
    "Give me a Python function called `{name}`. It {what}. Show one call.",
    "I need `{name}` in Python: a function that {what}. Include an example call.",
)


def generate(rng: random.Random, split: str) -> Document:
    """Draw a function in `split` and one of its many spellings."""
    spec, key = draw_in_split(rng, split, draw_spec, key_of)
    what, name, source = FAMILIES[spec.family](rng, spec)
    return Document(rng.choice(ASK).format(name=name, what=what), source, key)
