"""Calls of tools: which of four, and with which arguments; or an answer where none is of use."""

import json
import random

from recipes.family import Family, Row, same_json, same_text, split

CITIES = ["Oslo", "Porto", "Ghent", "Turin", "Bergen", "Cork", "Lyon", "Graz"]
PEOPLE = ["Mara", "Ilo", "Tessa", "Jun", "Rosa", "Piet"]
UNITS = ("miles", "kilometres", "pounds", "kilograms")
CHATTER = ("Thank you", "Good morning", "You are kind", "That is all", "Never mind")
SYSTEM = (
    "Tools: weather(city), remind(who, hour), convert(value, unit), search(text). "
    'Answer with one call as JSON, or with "No tool is needed."'
)
NONE = "No tool is needed."


def call(name: str, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def rows() -> list[Row]:
    draw = random.Random(6)
    made = []
    for i in range(400):
        city, who, hour = draw.choice(CITIES), draw.choice(PEOPLE), draw.randrange(6, 22)
        value, unit = draw.randrange(2, 400), draw.choice(UNITS)
        pairs = (
            (f"Will it rain in {city} today?", call("weather", city=city)),
            (f"How warm is {city} now?", call("weather", city=city)),
            (f"Tell {who} at {hour} o'clock.", call("remind", who=who, hour=hour)),
            (f"{who} must not forget it, at {hour}.", call("remind", who=who, hour=hour)),
            (f"How much is {value} {unit}?", call("convert", value=value, unit=unit)),
            (f"Who is {who} of {city}?", call("search", text=f"{who} of {city}")),
            (f"{draw.choice(CHATTER)}, {who}.", NONE),
        )
        made.append(Row(*pairs[i % len(pairs)], SYSTEM))
    return made


def is_right(answer: str, row: Row) -> bool:
    return (same_text if row.completion == NONE else same_json)(answer, row)


train, test = split(rows(), tests=60, seed=7)
FAMILY = Family("tools", "one of four tools with its arguments", train, test, is_right, 40)
