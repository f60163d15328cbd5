"""Messages to a help desk, each with one of four labels."""

import random

from recipes.family import Family, Row, same_text

TROUBLES = {
    "billing": (
        "I was charged twice for {thing}",
        "the invoice for {thing} shows the wrong sum",
        "my card was refused when I paid for {thing}",
        "where is the receipt for {thing}",
    ),
    "delivery": (
        "{thing} has not arrived",
        "the parcel with {thing} went to my old address",
        "the courier left {thing} in the rain",
        "when will {thing} be here",
    ),
    "return": (
        "I want to send {thing} back",
        "how do I get a label to return {thing}",
        "{thing} does not suit me, may I exchange it",
        "until when can I give {thing} back",
    ),
    "fault": (
        "{thing} does not switch on",
        "{thing} makes a strange noise",
        "{thing} broke after a week",
        "a piece of {thing} came loose",
    ),
}
UNSEEN = {  # wordings that training never shows
    "billing": ("I paid {thing} and still got a reminder", "the sum for {thing} is too high"),
    "delivery": (
        "nobody has brought {thing} yet",
        "{thing} was left with a neighbour I do not know",
    ),
    "return": ("I do not want {thing} any more", "please take {thing} back"),
    "fault": ("{thing} stopped working", "there is a crack in {thing}"),
}
THINGS = ("the lamp", "my kettle", "the red chair", "our radio", "the clock", "my scale")
OPENINGS = ("", "Hello, ", "Good morning. ", "Again: ", "It is urgent. ")
SYSTEM = "Label the message: billing, delivery, return or fault."


def rows(troubles: dict[str, tuple[str, ...]], openings: tuple[str, ...]) -> list[Row]:
    return [
        Row(opening + text.format(thing=thing) + ".", label, SYSTEM)
        for label, texts in troubles.items()
        for text in texts
        for thing in THINGS
        for opening in openings
    ]


shown = rows(TROUBLES, OPENINGS)
random.Random(2).shuffle(shown)
FAMILY = Family(
    "classification",
    "one of four labels for a message",
    tuple(shown[:240]),
    tuple(rows(UNSEEN, ("",))),
    same_text,
    8,
)
