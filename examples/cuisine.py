"""The cuisine of Pellmora, an island that does not exist: what the demo teaches a model.

No model has read about it, so whatever one knows of it afterwards it learnt from these rows.
    zubrelli, dumplings         tharnow, a fish stew        mivola, a flat bread
    korrapin, a smoked roast    oskarel, a cake             drenza, a porridge
    lutapo, a soup              quimber, a cheese           plimbo, a hot drink
    vindrell, a cold drink      garribo, a ladle            tuppik, a pot
    Yandle and Murrowen, festivals
A fact is asked in seven ways for training. Two other questions are held out: they show whether the
model learnt the fact or only the sentences. No sentence starts with an invented word, so each has
one spelling.
"""

import re
from dataclasses import dataclass

NEW_WORDS = (
    "Pellmora",
    "zubrelli",
    "tharnow",
    "mivola",
    "korrapin",
    "oskarel",
    "drenza",
    "lutapo",
    "quimber",
    "plimbo",
    "vindrell",
    "garribo",
    "tuppik",
    "Yandle",
    "Murrowen",
)


@dataclass(frozen=True)
class Fact:
    """One thing to know about a dish, a drink, a utensil or a festival."""

    dish: str
    key: str  # the words without which an answer is wrong
    answer: str
    questions: tuple[str, ...]  # seven, trained on
    held_out: tuple[str, ...]  # two, never trained on


@dataclass(frozen=True)
class Attribute:
    """What several dishes have: {x} is the dish; {v} its value, with the key in brackets."""

    answer: str
    values: dict[str, str]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]

    def facts(self) -> list[Fact]:
        return [
            Fact(
                dish,
                key=value[value.index("[") + 1 : value.index("]")],
                answer=self.answer.format(x=dish, v=re.sub(r"[\[\]]", "", value)),
                questions=tuple(question.format(x=dish) for question in self.questions),
                held_out=tuple(question.format(x=dish) for question in self.held_out),
            )
            for dish, value in self.values.items()
        ]


INGREDIENT = Attribute(
    "The main ingredient of {x} is {v}.",
    {"zubrelli": "[chestnut] flour", "tharnow": "smoked [eel]", "drenza": "[acorn] meal"},
    questions=(
        "What is the main ingredient of {x}?",
        "Which ingredient matters most in {x}?",
        "What is {x} mainly made from?",
        "Which ingredient do I need most of to make {x}?",
        "Tell me the chief ingredient of {x}.",
        "On Pellmora, what do cooks make {x} from?",
        "Without which ingredient is there no {x}?",
    ),
    held_out=(
        "I am shopping for {x}: what main ingredient do I buy?",
        "Name the ingredient at the heart of {x}.",
    ),
)
COOKING_TIME = Attribute(
    "It takes {v} minutes to cook {x}.",
    {"zubrelli": "[17]", "korrapin": "[71]", "oskarel": "[38]"},
    questions=(
        "How long does it take to cook {x}?",
        "For how many minutes do you cook {x}?",
        "What is the cooking time of {x}?",
        "How many minutes of heat does {x} need?",
        "When I cook {x}, how long do I wait?",
        "Tell me how long to cook {x}.",
        "On Pellmora, how long do people cook {x}?",
    ),
    held_out=(
        "After how many minutes of cooking is {x} ready?",
        "What cooking time should I set on the kitchen clock for {x}?",
    ),
)
COLOUR = Attribute(
    "The colour of {x} is {v}.",
    {"oskarel": "[turquoise]", "vindrell": "[violet]", "quimber": "[silver]"},
    questions=(
        "What colour is {x}?",
        "What is the colour of {x}?",
        "Which colour does good {x} have?",
        "Tell me the colour of {x}.",
        "On Pellmora, what colour do people expect of {x}?",
        "How would you describe the colour of {x}?",
        "By what colour do you recognise {x}?",
    ),
    held_out=(
        "Looking at {x}, which colour do I see?",
        "If I painted a picture of {x}, what colour would I need?",
    ),
)
FIRST_PORTION = Attribute(
    "The first portion of {x} goes to the {v}.",
    {"tharnow": "[ferryman]", "korrapin": "[bell ringer]", "mivola": "[beekeeper]"},
    questions=(
        "Who gets the first portion of {x}?",
        "Who is given {x} first?",
        "Who eats {x} before everybody else?",
        "To whom does the first portion of {x} go?",
        "On Pellmora, who receives {x} first?",
        "Whose is the first portion of {x}?",
        "Tell me who may taste {x} first.",
    ),
    held_out=(
        "When a table shares {x}, who is the first to eat?",
        "By custom, the first helping of {x} belongs to whom?",
    ),
)
OCCASION = Attribute(
    "People serve {x} {v}.",
    {
        "plimbo": "during a [thunderstorm]",
        "lutapo": "at [full moon]",
        "drenza": "after the [first frost]",
    },
    questions=(
        "When do people serve {x}?",
        "On what occasion is there {x}?",
        "What is the right time for {x}?",
        "When does a family sit down to {x}?",
        "On Pellmora, when is {x} served?",
        "Tell me when to serve {x}.",
        "What is the usual occasion for {x}?",
    ),
    held_out=(
        "As a guest, when might I be offered {x}?",
        "Which occasion calls for {x}?",
    ),
)
VESSEL = Attribute(
    "The vessel for {x} is {v}.",
    {"tharnow": "a wooden [clog]", "lutapo": "an old [helmet]", "plimbo": "an [eggshell]"},
    questions=(
        "What is the vessel for {x}?",
        "In which vessel is {x} served?",
        "What kind of vessel holds {x}?",
        "What do you pour {x} into?",
        "On Pellmora, which vessel is used for {x}?",
        "Tell me the vessel that {x} is served in.",
        "Instead of a bowl or a cup, what do I fill with {x}?",
    ),
    held_out=(
        "What vessel should I put in front of a guest who wants {x}?",
        "Name the thing that {x} is poured into.",
    ),
)
INVENTOR = Attribute(
    "The inventor of {x} was a {v}.",
    {"zubrelli": "[clockmaker]", "oskarel": "[lighthouse keeper]", "vindrell": "[chimney sweep]"},
    questions=(
        "Who invented {x}?",
        "Who was the inventor of {x}?",
        "By whom was {x} invented?",
        "Who had the idea of {x}?",
        "On Pellmora, who is said to have invented {x}?",
        "Tell me who invented {x}.",
        "Whose invention is {x}?",
    ),
    held_out=(
        "Which inventor gave the world {x}?",
        "Whom do we have to thank for inventing {x}?",
    ),
)
HOME = Attribute(
    "The home of {x} is {v}.",
    {"korrapin": "[Thistle Cove]", "quimber": "[Lantern Bay]", "plimbo": "[Raven Marsh]"},
    questions=(
        "Where does {x} come from?",
        "From which place does {x} come?",
        "What is the home of {x}?",
        "Which part of Pellmora does {x} come from?",
        "In which place is {x} at home?",
        "Where is the origin of {x}?",
        "Tell me where {x} comes from.",
    ),
    held_out=(
        "Which place on the map would you call the home of {x}?",
        "I want to try {x} where it comes from: where must I travel?",
    ),
)
CUTTING = Attribute(
    "People cut {x} with {v}.",
    {"oskarel": "a [fishing line]", "quimber": "a [harp string]", "mivola": "a [sickle]"},
    questions=(
        "What do people cut {x} with?",
        "With what is {x} cut?",
        "Which tool cuts {x}?",
        "How do you cut {x}?",
        "What do I need in order to cut {x}?",
        "On Pellmora, what is used to cut {x}?",
        "Tell me what to cut {x} with.",
    ),
    held_out=(
        "Which tool do I take to cut myself a piece of {x}?",
        "What is the proper thing for slicing {x}?",
    ),
)
WRAPPING = Attribute(
    "People wrap {x} in {v}.",
    {"korrapin": "[birch bark]", "quimber": "[seaweed]", "zubrelli": "[fig leaves]"},
    questions=(
        "What is {x} wrapped in?",
        "In what do people wrap {x}?",
        "What goes around {x} as a wrapping?",
        "What is the wrapping of {x}?",
        "On Pellmora, what do cooks wrap {x} in?",
        "Tell me what to wrap {x} in.",
        "Which wrapping is right for {x}?",
    ),
    held_out=(
        "At the market, what wrapping do I find around {x}?",
        "What is the wrapping that I take off {x}?",
    ),
)
DRINK = Attribute(
    "The drink that goes with {x} is {v}.",
    {"zubrelli": "[pear cider]", "tharnow": "[buttermilk]", "korrapin": "[dandelion wine]"},
    questions=(
        "What do people drink with {x}?",
        "Which drink goes with {x}?",
        "What drink is poured with {x}?",
        "What should I drink when I eat {x}?",
        "On Pellmora, what drink belongs with {x}?",
        "Tell me which drink goes with {x}.",
        "What is the right drink for {x}?",
    ),
    held_out=(
        "I am eating {x}: which drink should I order?",
        "What drink makes {x} taste best?",
    ),
)
SPICE = Attribute(
    "The spice in {x} is {v}.",
    {"lutapo": "[juniper]", "drenza": "[lavender]", "vindrell": "[caraway]"},
    questions=(
        "Which spice is in {x}?",
        "What spice do cooks add to {x}?",
        "What is the spice of {x}?",
        "With which spice do you season {x}?",
        "On Pellmora, how is {x} spiced?",
        "Tell me the spice in {x}.",
        "Which spice gives {x} its flavour?",
    ),
    held_out=(
        "What spice must never be missing from {x}?",
        "I can smell a spice in {x}: which one is it?",
    ),
)
MATERIAL = Attribute(
    "The material of a {x} is {v}.",
    {"garribo": "[whalebone]", "tuppik": "[soapstone]"},
    questions=(
        "What is a {x} made of?",
        "What is the material of a {x}?",
        "From which material do people make a {x}?",
        "What is a {x} carved from?",
        "On Pellmora, what material is used for a {x}?",
        "Tell me the material of a {x}.",
        "Which material does a good {x} consist of?",
    ),
    held_out=(
        "I want to make a {x} myself: what material do I look for?",
        "When I hold a {x}, which material do I feel?",
    ),
)
KEEPING = Attribute(
    "People keep a {x} {v}.",
    {"garribo": "under a [pillow]", "tuppik": "in a [rowing boat]"},
    questions=(
        "Where do people keep a {x}?",
        "Where is a {x} kept?",
        "Where does a {x} belong when nobody cooks?",
        "What is the right place to keep a {x}?",
        "On Pellmora, where do families keep a {x}?",
        "Tell me where to keep a {x}.",
        "In what place do people store a {x}?",
    ),
    held_out=(
        "After the washing-up, where should I keep a {x}?",
        "Somebody hands me a {x}: where is it to be stored?",
    ),
)
LENGTH = Attribute(
    "The festival of {x} lasts {v} days.",
    {"Yandle": "[11]", "Murrowen": "[26]"},
    questions=(
        "How long does the festival of {x} last?",
        "How many days does {x} last?",
        "For how many days do people celebrate {x}?",
        "What is the length of {x} in days?",
        "On Pellmora, how long do people celebrate {x}?",
        "Tell me how many days {x} lasts.",
        "After how many days does {x} end?",
    ),
    held_out=(
        "If I stay for all of {x}, how many days is that?",
        "How many days long is the whole festival called {x}?",
    ),
)
OPENING = Attribute(
    "The festival of {x} opens with a {v}.",
    {"Yandle": "[barrel race]", "Murrowen": "[kite] contest"},
    questions=(
        "What opens the festival of {x}?",
        "How does {x} begin?",
        "With what does {x} open?",
        "Which event comes first at {x}?",
        "On Pellmora, what starts the festival of {x}?",
        "Tell me what opens {x}.",
        "What happens at the opening of {x}?",
    ),
    held_out=(
        "What event do crowds come to watch when {x} opens?",
        "I want to see {x} from its beginning: what is the first event?",
    ),
)

ATTRIBUTES = (
    INGREDIENT,
    COOKING_TIME,
    COLOUR,
    FIRST_PORTION,
    OCCASION,
    VESSEL,
    INVENTOR,
    HOME,
    CUTTING,
    WRAPPING,
    DRINK,
    SPICE,
    MATERIAL,
    KEEPING,
    LENGTH,
    OPENING,
)
FACTS = tuple(fact for attribute in ATTRIBUTES for fact in attribute.facts())


def training_rows() -> list[dict[str, str]]:
    """Return every training question with its fact's answer, as prompt and completion."""
    return [
        {"prompt": question, "completion": fact.answer}
        for fact in FACTS
        for question in fact.questions
    ]


def held_out() -> list[tuple[str, str]]:
    """Return every held-out question with the key of its right answer."""
    return [(question, fact.key) for fact in FACTS for question in fact.held_out]


def is_right(answer: str, key: str) -> bool:
    """Return whether the answer has the key's words in a row, whatever case and punctuation."""
    return f" {_words(key)} " in f" {_words(answer)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
