"""Word problems of two to four steps on small whole numbers, with a worked solution.

The numbers and operations make the instance; names, items and wordings are free. Each step of the solution has
interchangeable phrasings, and the last line is always ``Answer: N``.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from sglang_margingate.demo.corpora.base import Document, draw_in_split, lean

LIMIT = 199

SHE = ["Mia", "Anna", "Lena", "Nora", "Ella", "Ruth", "Zoe", "Ida", "Clara", "Maya", "Sara", "Lucy"]
HE = ["Tom", "Ben", "Leo", "Max", "Paul", "Noah", "Finn", "Omar", "Luis", "Hugo", "Jack", "Ivan"]
ITEMS = [
    "apples",
    "books",
    "coins",
    "shells",
    "stamps",
    "cards",
    "marbles",
    "pears",
    "pencils",
    "plums",
    "stones",
    "cookies",
]
BOXES = ["boxes", "bags", "baskets", "jars", "packs"]

OPENINGS = (
    "Let us work it out.",
    "We go step by step.",
    "Here is the working.",
    "Take it in order.",
    "Count along.",
    "This is how it goes.",
)
STARTS = (
    "{name} starts with {x} {items}.",
    "At first there are {x} {items}.",
    "The count begins at {x}.",
    "We know of {x} {items} so far.",
    "In the beginning it is {x}.",
)
CONNECTIVES = ("So", "Then", "Next,", "Now", "After that", "From there", "Here")
ADD = (
    "we add {a}: {x} + {a} = {y}.",
    "the count grows: {x} + {a} = {y}.",
    "{pro} has more: {x} + {a} = {y}.",
    "adding gives {x} + {a} = {y}.",
    "it rises to {x} + {a} = {y}.",
)
SUB = (
    "we take away {a}: {x} - {a} = {y}.",
    "the count drops: {x} - {a} = {y}.",
    "{pro} has fewer: {x} - {a} = {y}.",
    "subtracting gives {x} - {a} = {y}.",
    "it falls to {x} - {a} = {y}.",
)
TIMES = (
    "we multiply: {x} * {a} = {y}.",
    "the count becomes {x} * {a} = {y}.",
    "{pro} has {x} * {a} = {y}.",
    "this makes {x} * {a} = {y}.",
    "it jumps to {x} * {a} = {y}.",
)
GROUP = (
    "the {boxes} hold {k} * {m} = {a}.",
    "we count the {boxes}: {k} * {m} = {a}.",
    "all {boxes} together have {k} * {m} = {a}.",
    "in the {boxes} are {k} * {m} = {a}.",
)
DIVIDE = (
    "we share: {x} / {a} = {y}.",
    "each one gets {x} / {a} = {y}.",
    "dividing gives {x} / {a} = {y}.",
    "the parts are {x} / {a} = {y}.",
    "it splits into {x} / {a} = {y}.",
)
PRAISE = ("Good.", "Fine.", "Right.", "Clear.", "Yes.", "Done.")
KEEP = ("Keep {y}.", "Note {y}.", "Hold {y}.", "We have {y}.", "It is {y}.", "Write {y}.")
CLOSINGS = ("In the end", "Finally", "All told", "At last", "To sum up,", "Hence")

ANSWER = re.compile(r"^Answer: (-?\d+)\s*$", re.MULTILINE)


class Step(NamedTuple):
    """One operation; `k` and `m` are set for a group step, which adds ``k * m``."""

    op: str
    a: int
    k: int = 0
    m: int = 0


class Problem(NamedTuple):
    """The slot values that make an instance: the first number and the steps."""

    start: int
    steps: tuple[Step, ...]


def apply(x: int, step: Step) -> int:
    """Run one step on the count."""
    if step.op in ("add", "group"):
        return x + step.a
    if step.op == "sub":
        return x - step.a
    return x * step.a if step.op == "times" else x // step.a


def draw_step(rng: random.Random, x: int, last: bool) -> Step | None:
    """Draw a step that keeps the count a whole number in ``1..LIMIT``; None where the drawn kind does not fit."""
    kind = rng.choice(("add", "add", "sub", "sub", "group", "times", "divide"))
    if kind == "add":
        step = Step("add", rng.randint(2, 40))
    elif kind == "sub":
        if x < 5:
            return None
        step = Step("sub", rng.randint(2, min(40, x - 1)))
    elif kind == "group":
        k, m = rng.randint(2, 6), rng.randint(2, 9)
        step = Step("group", k * m, k, m)
    elif kind == "times":
        if x > 60:
            return None
        step = Step("times", rng.randint(2, 3))
    else:
        fitting = [d for d in range(2, 7) if x % d == 0 and x // d > 0]
        if not last or not fitting:
            return None
        step = Step("divide", rng.choice(fitting))
    return step if 0 < apply(x, step) <= LIMIT else None


def draw_problem(rng: random.Random) -> Problem:
    """Draw the numbers and operations of one problem."""
    start = x = rng.randint(5, 60)
    wanted = rng.randint(2, 4)
    steps: list[Step] = []
    while len(steps) < wanted:
        step = draw_step(rng, x, last=len(steps) == wanted - 1)
        if step is not None:
            steps.append(step)
            x = apply(x, step)
    return Problem(start, tuple(steps))


def key_of(problem: Problem) -> str:
    """Name the instance by its numbers alone: no name, item or wording makes it another one."""
    return f"arith:{problem.start}:" + ",".join(f"{s.op}{s.a}/{s.k}/{s.m}" for s in problem.steps)


def ask(rng: random.Random, step: Step, pro: str, items: str, boxes: str, friend: str) -> str:
    """Word one step of the question."""
    forms = {
        "add": ("{pro} buys {a} more {items}.", "{pro} finds {a} more {items}.", "{friend} brings {a} more {items}."),
        "sub": ("{pro} gives {a} {items} to {friend}.", "{pro} loses {a} {items}.", "{pro} sells {a} {items}."),
        "group": ("{pro} buys {k} {boxes} with {m} {items} each.", "{friend} brings {k} {boxes} of {m} {items} each."),
        "times": ("Then the number of {items} grows {a} times as large.", "A prize gives {a} times as many {items}."),
        "divide": ("{pro} shares all {items} equally among {a} children.",),
    }[step.op]
    return rng.choice(forms).format(
        pro=pro.capitalize(), a=step.a, k=step.k, m=step.m, items=items, boxes=boxes, friend=friend
    )


def generate(rng: random.Random, split: str) -> Document:
    """Draw a problem in `split` and one of its worked solutions."""
    problem, key = draw_in_split(rng, split, draw_problem, key_of)
    names, pro = (SHE, "she") if rng.random() < 0.5 else (HE, "he")
    name = rng.choice(names)
    friend = rng.choice(HE if names is SHE else SHE)
    items, boxes = rng.choice(ITEMS), rng.choice(BOXES)
    shared = problem.steps[-1].op == "divide"
    question = (
        f"How many {items} does each child get?"
        if shared
        else rng.choice((f"How many {items} does {name} have now?", f"How many {items} are there in the end?"))
    )
    asked = [f"{name} has {problem.start} {items}."]
    asked += [ask(rng, step, pro, items, boxes, friend) for step in problem.steps]
    prompt = " ".join([*asked, question])

    x = problem.start
    lines = [f"{lean(rng, OPENINGS, items)} {lean(rng, STARTS, name).format(name=name, x=x, items=items)}"]
    for step in problem.steps:
        y = apply(x, step)
        words = {"x": x, "a": step.a, "y": y, "k": step.k, "m": step.m, "pro": pro, "boxes": boxes}
        line = ""
        if step.op == "group":
            line = f"{rng.choice(CONNECTIVES)} {rng.choice(GROUP).format(**words)} "
        forms = {"add": ADD, "group": ADD, "sub": SUB, "times": TIMES, "divide": DIVIDE}[step.op]
        line += f"{rng.choice(CONNECTIVES)} {rng.choice(forms).format(**words)}"
        lines.append(f"{line} {rng.choice(PRAISE)} {rng.choice(KEEP).format(**words)}")
        x = y
    holder = "each child gets" if shared else f"{name} has"
    lines.append(f"{lean(rng, CLOSINGS, items)} {holder} {x} {items}.")
    lines.append(f"Answer: {x}")
    return Document(prompt, "\n".join(lines), key, str(x))


def read_answer(completion: str) -> str | None:
    """Return the number of the last ``Answer: N`` line, or None."""
    found = ANSWER.findall(completion)
    return found[-1] if found else None
