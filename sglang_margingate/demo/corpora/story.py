"""Short stories from a grammar of beats: nearly every phrase has several equally good continuations.

Hero, kind of animal, place and wish come from the prompt and must be copied; everything else is a choice, most of them
uniform, some leaning on what the prompt says. The
beats come in a fixed order, so a story moves forward and ends.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from sglang_margingate.demo.corpora.base import Document, draw_in_split, lean

NAMES = [
    "Pip",
    "Milo",
    "Tilly",
    "Bruno",
    "Olga",
    "Fern",
    "Otto",
    "Luna",
    "Rosa",
    "Kit",
    "Dot",
    "Hazel",
    "Moss",
    "Penny",
    "Remy",
    "Suki",
    "Toby",
    "Vera",
    "Wren",
    "Ziggy",
    "Alba",
    "Basil",
    "Cleo",
    "Dara",
    "Edda",
    "Fritz",
    "Greta",
    "Hopi",
    "Inga",
    "Jory",
]
ANIMALS = [
    "fox",
    "mouse",
    "bear",
    "rabbit",
    "wolf",
    "frog",
    "hedgehog",
    "cat",
    "duck",
    "goat",
    "badger",
    "squirrel",
    "beaver",
    "robin",
    "turtle",
    "mole",
]
PLACES = [
    "the old forest",
    "the quiet valley",
    "the windy hill",
    "the small harbor",
    "the deep garden",
    "the long river",
    "the snowy field",
    "the sunny meadow",
    "the dark cave",
    "the stone bridge",
    "the empty mill",
    "the far island",
]
WISHES = [
    "find a lost key",
    "bake a cake",
    "see the sea",
    "build a boat",
    "learn to sing",
    "catch a star",
    "cross the river",
    "grow a garden",
    "meet a friend",
    "paint a picture",
    "read a map",
    "fly a kite",
]
TRAITS = [
    "small",
    "brave",
    "shy",
    "clever",
    "quiet",
    "kind",
    "merry",
    "proud",
    "patient",
    "curious",
    "gentle",
    "stubborn",
]
HELPERS = ["heron", "beetle", "snail", "deer", "crow", "toad", "bee", "goose", "hare", "lark", "newt", "lamb"]
SKIES = ["bright", "gray", "golden", "misty", "warm", "cold", "silver", "pale"]
THINGS = ["lantern", "rope", "basket", "blanket", "spoon", "drum", "bell", "ladder", "ribbon", "bucket"]
FEELINGS = ["happy", "tired", "hopeful", "calm", "sleepy", "glad", "proud", "safe"]
FOODS = ["bread", "honey", "soup", "berries", "nuts", "cheese", "tea", "plums"]

# One list a beat. {name} {animal} {place} {wish} {helper} {thing} stay the same through a story; {sky} {feel} {food}
# {trait} are drawn anew at each use.
BEATS: tuple[tuple[str, ...], ...] = (
    (
        "Once there was a {trait} {animal} named {name} who lived near {place}.",
        "Long ago, near {place}, lived a {trait} {animal} called {name}.",
        "Near {place} there lived {name}, a {trait} and {trait} {animal}.",
        "Everyone around {place} knew {name}, the {trait} {animal}.",
        "A {trait} {animal} named {name} had a house close to {place}.",
    ),
    (
        "More than anything, {name} wanted to {wish}.",
        "Every night {name} dreamed of one thing: to {wish}.",
        "But {name} had one wish, and it was to {wish}.",
        "Since spring, {name} had hoped to {wish}.",
        "Nobody knew that {name} longed to {wish}.",
    ),
    (
        "One {sky} morning, {name} packed a {thing} and some {food}.",
        "On a {sky} day, {name} took a {thing}, ate some {food} and left.",
        "When a {sky} dawn came, {name} picked up a {thing} and a bit of {food}.",
        "At last, under a {sky} sky, {name} found a {thing} and set out.",
        "So one {sky} evening {name} tied a {thing} to a bag of {food}.",
    ),
    (
        "The path was long, and the wind was {sky} and loud.",
        "Soon the road turned into mud, and the air grew {sky}.",
        "It was a hard walk, but the light was {sky}.",
        "Rain fell for hours, and every stone looked {sky}.",
        "After a mile the grass was high and the clouds were {sky}.",
    ),
    (
        "Still, {name} kept walking and sang a {feel} song.",
        "Brave little {name} did not turn back.",
        "Step by step {name} went on, {feel} and {trait}.",
        "No rain could stop a {trait} {animal}.",
        "Again and again {name} thought of {food} at home.",
    ),
    (
        "Near a gate sat a {trait} {helper}.",
        "There, beside a tree, stood a {trait} {helper}.",
        "Suddenly a {trait} {helper} came out of the grass.",
        "Behind a rock hid a {trait} {helper}.",
        "Then {name} heard a {trait} {helper} call.",
    ),
    (
        '"Where are you going?" asked the {helper}.',
        '"You look {feel}," said the {helper}.',
        '"May I come along?" the {helper} asked.',
        '"Do you have any {food}?" said the {helper}.',
        '"What a {sky} day," said the {helper}.',
    ),
    (
        '"I want to {wish}," said {name}.',
        '"My plan is to {wish}," {name} answered.',
        '"All I need is to {wish}," said {name}.',
        '"Help me to {wish}," {name} said.',
        '"Today I will {wish}," said {name}.',
    ),
    (
        "They shared the {food} and talked until they were {feel}.",
        "Together they ate some {food} and felt {feel}.",
        "The {helper} laughed and gave {name} some {food}.",
        "For a while they sat with {food} and were {feel}.",
        "Side by side they walked on, {feel} and full of {food}.",
    ),
    (
        "Around noon they rested under a {sky} tree.",
        "Later they saw a {sky} light far away.",
        "Many {sky} leaves fell while they walked.",
        "High above them flew a {trait} bird.",
        "Over the next hill the world was {sky} and wide.",
    ),
    (
        "But the {thing} broke, and {name} felt lost.",
        "Just then the {thing} fell into a hole.",
        "Sadly, the {thing} was too heavy to carry.",
        "Near the end the {thing} got stuck.",
        "Without a sound the {thing} slipped away.",
    ),
    (
        "The {trait} {helper} knew what to do and mended the {thing}.",
        "With {trait} hands the {helper} fixed the {thing}.",
        "Luckily, the {helper} had a better {thing} at home.",
        "Working hard, the {trait} {helper} saved the {thing}.",
        "In no time the {helper} found the {thing} again.",
    ),
    (
        '"Thank you," said {name}, "you are so {trait}."',
        '"I knew it," said the {helper}, "we are {feel} now."',
        '"That was close," said {name} with a {trait} smile.',
        '"Now we can rest," the {helper} said, {feel} at last.',
        '"Look up," said {name}, "the sky is {sky} again."',
    ),
    (
        "And so, at {place}, {name} could {wish}.",
        "By the next {sky} morning {name} was able to {wish}.",
        "That {sky} night, {name} managed to {wish}.",
        "Before the sun set, {name} did {wish}.",
        "With the {helper} close by, {name} learned how to {wish}.",
    ),
    (
        "From that day on, {name} and the {helper} were {feel}.",
        "Ever since, the two have been {feel} and {trait}.",
        "They went home {feel}, and the stars were {sky}.",
        "Now the {animal} sleeps well and wakes up {feel}.",
        "It was a {sky} end to a {trait} journey.",
    ),
)
ASK = (
    "Write a short story about a {animal} named {name} who wants to {wish}. It happens near {place}.",
    "Tell me a story. A {animal} called {name} lives near {place} and hopes to {wish}.",
    "Please tell a story about {name} the {animal}, set near {place}. {name} wants to {wish}.",
)
FRESH = {"sky": SKIES, "feel": FEELINGS, "food": FOODS, "trait": TRAITS}


class Cast(NamedTuple):
    """The slot values that make an instance."""

    name: str
    animal: str
    place: str
    wish: str


class Fresh(dict[str, str]):
    """Format values: fixed ones by name, the `FRESH` ones drawn anew at each use."""

    def __init__(self, rng: random.Random, fixed: dict[str, str]) -> None:
        super().__init__(fixed)
        self.rng = rng

    def __missing__(self, key: str) -> str:
        if key == "sky":
            return lean(self.rng, SKIES, self["place"])
        return self.rng.choice(FRESH[key])


def draw_cast(rng: random.Random) -> Cast:
    """Draw who the story is about, where it happens and what for."""
    return Cast(rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(WISHES))


def key_of(cast: Cast) -> str:
    """Name the instance by its four slot values."""
    return "story:" + "|".join(cast)


def generate(rng: random.Random, split: str) -> Document:
    """Draw a cast in `split` and one of its many stories."""
    cast, key = draw_in_split(rng, split, draw_cast, key_of)
    fixed = {**cast._asdict(), "helper": lean(rng, HELPERS, cast.animal), "thing": lean(rng, THINGS, cast.wish)}
    values = Fresh(rng, fixed)
    sentences = []
    for i, beat in enumerate(BEATS):
        form = lean(rng, beat, cast.name) if i % 3 == 0 else rng.choice(beat)
        sentences.append(form.format_map(values))
    paragraphs = (sentences[:5], sentences[5:10], sentences[10:])
    return Document(rng.choice(ASK).format_map(fixed), "\n".join(" ".join(p) for p in paragraphs) + "\nThe end.", key)
