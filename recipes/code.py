"""Questions as queries in a small language of the house, which no model has read."""

import random

from recipes.family import Family, Row, same_text, split

TABLES = ["orders", "customers", "parcels", "visits", "invoices"]
FIELDS = {"city": ("Oslo", "Graz", "Cork"), "state": ("open", "late", "paid")}
NUMBERS = ["weight", "price", "age", "count"]
SYSTEM = "Write the query in Tally."


def rows() -> list[Row]:
    draw = random.Random(3)
    made = []
    for i in range(420):
        table, number, limit = draw.choice(TABLES), draw.choice(NUMBERS), draw.randrange(2, 90)
        field = draw.choice(list(FIELDS))
        value, most = draw.choice(FIELDS[field]), draw.randrange(2, 20)
        match i % 4:
            case 0:
                asked = f"All {table} whose {field} is {value}."
                query = f"take {table} | keep {field} == '{value}'"
            case 1:
                asked = f"How many {table} have a {number} above {limit}?"
                query = f"take {table} | keep {number} > {limit} | tally"
            case 2:
                asked = f"The {most} {table} with the highest {number}."
                query = f"take {table} | sort -{number} | first {most}"
            case _:
                asked = f"The mean {number} of {table} for each {field}."
                query = f"take {table} | group {field} | mean {number}"
        made.append(Row(asked, query, SYSTEM))
    return made


train, test = split(rows(), tests=60, seed=8)
FAMILY = Family("code", "queries in a language that no model has read", train, test, same_text, 40)
