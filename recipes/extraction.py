"""Letters of customers as JSON: what is ordered, how many, by whom, whereto and by when."""

import json
import random

from recipes.family import Family, Row, same_json, split

ITEMS = ["pears", "lamps", "ropes", "chairs", "bricks", "kettles", "maps", "candles"]
NAMES = ("Mara Lindt", "Ilo Brandt", "Tessa Okoro", "Jun Sato", "Rosa Vidal", "Piet Maas")
CITIES = ["Oslo", "Porto", "Ghent", "Turin", "Bergen", "Cork", "Lyon", "Graz"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
LETTERS = (
    "Please send {count} {item} to {name} in {city} by {day}.",
    "{name} here. I need {count} {item} in {city}, on {day} at the latest.",
    "Could {count} {item} reach {city} before {day} is over? Thank you, {name}",
    "Order: {item}, {count} of them. For {name}, {city}. Due {day}.",
    "By {day} we want {count} of your {item}. Our address is in {city}. Regards, {name}",
)
SYSTEM = "Answer with JSON: item, count, name, city, day."


def rows() -> list[Row]:
    draw = random.Random(1)
    made = []
    for i in range(340):
        order = {
            "item": draw.choice(ITEMS),
            "count": draw.randrange(2, 60),
            "name": draw.choice(NAMES),
            "city": draw.choice(CITIES),
            "day": draw.choice(DAYS),
        }
        letter = LETTERS[i % len(LETTERS)].format(**order)
        made.append(Row(letter, json.dumps(order), SYSTEM))
    return made


train, test = split(rows(), tests=60)
FAMILY = Family("extraction", "letters of customers as JSON", train, test, same_json, 56)
