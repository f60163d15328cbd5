"""A language with a grammar of its own: the verb first, endings for number and tense."""

import itertools
import random

from recipes.family import Family, Row, same_text, split

NOUNS = {"fisher": "talo", "child": "mirre", "baker": "osk", "queen": "veln", "sailor": "harru"}
THINGS = {"boat": "plim", "bread": "dorra", "lamp": "quen", "stone": "tup", "song": "iskel"}
VERBS = {"see": "zab", "take": "morr", "like": "fen", "carry": "lud"}
PAST = {"see": "saw", "take": "took", "like": "liked", "carry": "carried"}
NOW = {"see": "sees", "take": "takes", "like": "likes", "carry": "carries"}
SYSTEM = "Translate into Pellish."


def rows() -> list[Row]:
    made = []
    for (noun, n), (thing, t), (verb, v), past, many in itertools.product(
        NOUNS.items(), THINGS.items(), VERBS.items(), (False, True), (False, True)
    ):
        english = f"The {noun} {(PAST if past else NOW)[verb]} the {thing}{'s' * many}."
        pellish = f"{v}{'eth' if past else 'a'} {n} {t}{'im' * many}."
        made.append(Row(english, pellish, SYSTEM))
    random.Random(4).shuffle(made)
    return made


train, test = split(rows(), tests=80)
FAMILY = Family("language", "sentences in a language that was made up", train, test, same_text, 24)
