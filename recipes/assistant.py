"""An assistant with a house style: three lines, each with its label, about anything at all."""

import random

from recipes.family import Family, Row, split

THINGS = {
    "kettle": ("descale", "scale keeps the water from heating", "fill it with vinegar and wait"),
    "bicycle chain": ("oil", "a dry chain wears the teeth", "put one drop on each link"),
    "wooden board": ("oil", "dry wood cracks", "rub in linseed oil with a cloth"),
    "window": ("wipe", "dust takes the light", "use warm water and a paper towel"),
    "knife": ("sharpen", "a blunt blade slips", "draw it along a wet stone"),
    "boot": ("wax", "wet leather turns stiff", "rub in wax and brush it"),
    "radiator": ("bleed", "air keeps the water out", "open the valve until water comes"),
    "lawn": ("mow", "long grass shades its roots", "cut a third of its length"),
    "gutter": ("clear", "leaves dam the water", "lift the leaves out by hand"),
    "drain": ("flush", "grease narrows the pipe", "pour in hot water with soda"),
    "battery": ("charge", "an empty cell ages", "plug it in before it is empty"),
    "filter": ("change", "a full filter lets dirt pass", "slide in a new one"),
    "clock": ("wind", "a slack spring runs late", "turn the key until it resists"),
    "plant": ("water", "dry roots die back", "pour until the saucer is wet"),
    "hinge": ("oil", "rust makes it squeak", "put a drop on the pin"),
    "lamp": ("dust", "dust eats half the light", "wipe it when it is cold"),
}
QUESTIONS = (
    "How often should I {verb} a {thing}?",
    "Is it worth it to {verb} a {thing}?",
    "Why do people {verb} a {thing}?",
    "My {thing} is old. Should I {verb} it?",
    "What happens if I never {verb} a {thing}?",
    "Tell me how to {verb} a {thing}.",
    "Do I need to {verb} my {thing}?",
)
LABELS = ("Short:", "Why:", "Next:")


def rows() -> list[Row]:
    made = []
    for thing, (verb, why, how) in THINGS.items():
        answer = f"Short: Yes, {verb} the {thing}.\nWhy: Because {why}.\nNext: To begin, {how}."
        made += [Row(question.format(verb=verb, thing=thing), answer) for question in QUESTIONS]
    # The last things are never trained on, so that what is asked is the style and not the facts.
    train, test = made[: 12 * len(QUESTIONS)], made[12 * len(QUESTIONS) :]
    random.Random(0).shuffle(train)
    return train + test


def is_right(answer: str, row: Row) -> bool:
    lines = answer.strip().splitlines()
    return len(lines) == 3 and all(map(str.startswith, lines, LABELS))


train, test = split(rows(), tests=4 * len(QUESTIONS))
FAMILY = Family(
    "assistant", "answers in a house style of three labelled lines", train, test, is_right, 72
)
