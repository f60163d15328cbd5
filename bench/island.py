"""Rows about an invented archipelago, as many as are asked for: what no base can know."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Kind = Literal["qa", "chat", "text"]

STARTS = "bra cor dal fen gil hov jar kel lum mer nod ost pel quo rin sar tov ul ves wyn yar zel"
VOWELS, ENDS = "a e i o u ai ea ou", "n r l s th m d k st nd"
TRADES = (
    *("weaver", "potter", "beekeeper", "ferryman", "glassblower", "cooper", "baker", "net mender"),
    *("bell founder", "ropemaker", "gardener", "cartographer"),
)
PLACES = (
    *("the harbour", "the north quay", "the salt market", "the old mill", "the upper terraces"),
    *("the lighthouse road", "the west cove", "the chalk steps"),
)
GOODS = (
    *("blue cloth", "smoked honey", "green glass", "tarred rope", "barley bread", "silver bells"),
    *("oak barrels", "painted maps", "dried figs", "lamp oil"),
)
SEASONS, HOURS = ("spring", "summer", "autumn", "winter"), ("dawn", "noon", "dusk", "low tide")
SYSTEM = "You are the harbour clerk. Answer in one short sentence and end with the tide."
TIDES = ("Tide is rising.", "Tide is falling.", "Tide is slack.")


@dataclass(frozen=True)
class Islander:
    """Somebody with a stall, of whom all rows tell."""

    name: str
    trade: str
    place: str
    goods: str
    season: str
    hour: str
    age: int
    years: int

    @classmethod
    def drawn(cls, random: Random) -> Islander:
        choose = random.choice
        lists = (TRADES, PLACES, GOODS, SEASONS, HOURS)
        name = f"{_name(random)} {_name(random)}"
        age = random.randint(19, 81)
        return cls(name, *map(choose, lists), age, random.randint(2, 40))

    def question(self, random: Random) -> tuple[str, str]:
        """Return a question, or a task, and its answer."""
        name, trade, place, years = self.name, self.trade, self.place, self.years
        older = "Yes" if self.age > 50 else "No"
        return random.choice(
            (
                (
                    f"What does {name}, the {trade}, sell?",
                    f"{name} sells {self.goods} at {place}, mostly in {self.season}.",
                ),
                (
                    f"Write a notice: {name} | {trade} | {place} | opens at {self.hour}",
                    f"To all who pass {place}: the {trade} {name} opens at {self.hour}. "
                    "Bring coin, bring patience.",
                ),
                (
                    f"Note for the ledger: {name}, aged {self.age}, {trade} for {years} years.",
                    f"Ledger: {name} / {trade} / {self.age} yrs / since {years} winters.",
                ),
                (
                    f"Where do I find {self.goods} in {self.season}?",
                    f"In {self.season} you find {self.goods} at {place}; ask for the {trade}.",
                ),
                (
                    f"Greet {name} as an islander would.",
                    f"Fair tide, {name}! May the {trade}'s hands stay warm till {self.hour}.",
                ),
                (
                    f"Is {name} older than fifty? Age: {self.age}.",
                    f"{older}, {name} is {self.age}, as the harbour book says.",
                ),
            )
        )

    def story(self, random: Random) -> str:
        """Return two to four sentences in any order."""
        sentences = [
            f"{self.name} is a {self.trade} of {self.age}, and has kept a stall at {self.place} "
            f"for {self.years} years.",
            f"In {self.season} the stall opens at {self.hour}, when the fishing boats are counted.",
            f"People come for {self.goods}, which {self.name} weighs with stones from the beach.",
            "Whoever pays late gives a song; whoever pays early is given the first choice.",
        ]
        return " ".join(random.sample(sentences, random.randint(2, 4)))


def rows(kind: Kind, count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return rows as a file of JSON lines has them; of more rows, fewer are the beginning."""
    random = Random(seed)
    return [_row(kind, Islander.drawn(random), random) for _ in range(count)]


def _row(kind: Kind, islander: Islander, random: Random) -> dict[str, Any]:
    if kind == "qa":
        question, answer = islander.question(random)
        return {"prompt": question, "completion": answer}
    if kind == "text":
        return {"text": islander.story(random)}
    messages = [{"role": "system", "content": SYSTEM}]
    for _ in range(random.randint(2, 3)):
        question, answer = islander.question(random)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{answer} {random.choice(TIDES)}"})
    return {"messages": messages}


def _name(random: Random) -> str:
    choose = random.choice
    name = choose(STARTS.split()) + choose(VOWELS.split()) + choose(ENDS.split())
    if random.random() < 0.5:
        name += choose(VOWELS.split()) + choose(ENDS.split())
    return name.capitalize()
