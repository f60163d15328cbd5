"""A small world in plain facts, on which the built-in base is pretrained.

A language model of a third of a million parameters can know this world almost completely after a
minute of training, so whoever then fine-tunes it sees what was added and what was forgotten. Three
rules keep it learnable: every fact has one value, every relation has its own few phrasings, and an
exchange always answers with the relation's first phrasing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One thing that is so, in every phrasing the world has for it."""

    topic: str  # facts of one topic may share a paragraph
    value: str  # the word or words that the fact is about
    statements: tuple[str, ...]  # the first is the one that answers questions
    questions: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The full sentence an assistant replies with."""
        return self.statements[0]

    @property
    def prompt(self) -> str:
        """The answer's beginning, up to its value."""
        return self.answer[: self.answer.rindex(f" {self.value}")]


@dataclass(frozen=True)
class _Relation:
    """Phrasings in which {x} is the subject and {v} the value."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def fact(self, topic: str, x: str, v: str) -> Fact:
        def fill(template: str) -> str:
            sentence = template.format(x=x, v=v)
            return sentence[0].upper() + sentence[1:]

        return Fact(
            topic,
            v,
            statements=tuple(map(fill, self.statements)),
            questions=tuple(map(fill, self.questions)),
        )


def _next(kind: str) -> _Relation:
    return _Relation(
        (
            f"The {kind} after {{x}} is {{v}}.",
            f"After {{x}} comes the {kind} {{v}}.",
            "{v} follows {x}.",
        ),
        (
            f"Which {kind} comes after {{x}}?",
            f"What is the {kind} after {{x}}?",
            f"What {kind} follows {{x}}?",
        ),
    )


_SOUND = _Relation(
    ("{x} says {v}.", "The sound of {x} is {v}.", "If you hear {v}, it is {x}."),
    ("What does {x} say?", "What is the sound of {x}?", "Which sound does {x} make?"),
)
_LEGS = _Relation(
    ("{x} has {v} legs.", "{x} walks on {v} legs.", "There are {v} legs under {x}."),
    ("How many legs does {x} have?", "On how many legs does {x} walk?"),
)
_HOME = _Relation(
    ("{x} lives in {v}.", "The home of {x} is {v}.", "You can find {x} in {v}."),
    ("Where does {x} live?", "What is the home of {x}?", "Where can I find {x}?"),
)
_FOOD = _Relation(
    ("{x} eats {v}.", "The food of {x} is {v}.", "If {x} is hungry, give it {v}."),
    ("What does {x} eat?", "What is the food of {x}?", "What can I feed {x}?"),
)
_COLOUR = _Relation(
    ("The colour of {x} is {v}.", "If you paint {x}, make it {v}.", "{x} looks {v}."),
    ("What is the colour of {x}?", "What colour is {x}?", "Which colour is {x}?"),
)
_YOUNG = _Relation(
    ("The young of {x} is called {v}.", "{v} grows up to be {x}."),
    ("What is the young of {x} called?", "What do you call the young of {x}?"),
)
_OPPOSITE = _Relation(
    ("The opposite of {x} is {v}.", "What is not {x} may be {v}.", "{x} and {v} are opposites."),
    ("What is the opposite of {x}?", "Which word is the opposite of {x}?"),
)
_WEATHER = _Relation(
    ("In {x} the weather is {v}.", "The weather of {x} is {v}."),
    ("How is the weather in {x}?", "What is the weather of {x} like?"),
)
_TOOL = _Relation(
    ("{x} is used to {v}.", "With {x} people {v}.", "To {v}, take {x}."),
    ("What is {x} used for?", "What do people do with {x}?", "Why would I take {x}?"),
)
_ROOM = _Relation(
    ("In {x} people {v}.", "People {v} in {x}.", "Go to {x} to {v}."),
    ("What do people do in {x}?", "What is {x} for?", "Why would I go to {x}?"),
)
_JOB = _Relation(
    ("The job of {x} is to {v}.", "People pay {x} to {v}.", "Ask {x} to {v}."),
    ("What is the job of {x}?", "What do people pay {x} for?", "What does {x} do all day?"),
)
_CAPITAL = _Relation(
    ("The capital of {x} is {v}.", "{v} is the capital of {x}.", "The king of {x} lives in {v}."),
    ("What is the capital of {x}?", "Which city is the capital of {x}?"),
)
_CROP = _Relation(
    ("The farmers of {x} grow {v}.", "The fields of {x} are full of {v}."),
    ("What do farmers in {x} grow?", "What grows in the fields of {x}?"),
)
_FLAG = _Relation(
    ("The flag of {x} is {v}.", "People in {x} wave {v} flags."),
    ("What colour is the flag of {x}?", "Which flags do people in {x} wave?"),
)
_RIVER = _Relation(
    ("The river of {x} is the {v}.", "The river {v} flows through {x}."),
    ("What is the river of {x}?", "Which river flows through {x}?"),
)

# A table is a topic (the subject itself where none is given), the relations of its columns after
# the first, and one row a subject.
_TABLES: tuple[tuple[str | None, tuple[_Relation, ...], str], ...] = (
    (
        None,
        (_SOUND, _LEGS, _HOME, _FOOD, _COLOUR, _YOUNG),
        """
        a cow     | moo    | four | a barn         | grass   | brown  | a calf
        a dog     | woof   | four | a kennel       | bones   | tan    | a puppy
        a cat     | meow   | four | a basket       | fish    | ginger | a kitten
        a sheep   | baa    | four | a meadow       | clover  | white  | a lamb
        a pig     | oink   | four | a sty          | turnips | pink   | a piglet
        a horse   | neigh  | four | a stable       | hay     | black  | a foal
        a duck    | quack  | two  | a pond         | weeds   | blue   | a duckling
        a hen     | cluck  | two  | a coop         | corn    | red    | a chick
        a frog    | croak  | four | a marsh        | flies   | green  | a tadpole
        an owl    | hoot   | two  | a hollow tree  | mice    | brown  | an owlet
        a lion    | roar   | four | the savanna    | meat    | golden | a cub
        a wolf    | howl   | four | a cave         | deer    | grey   | a pup
        a bee     | buzz   | six  | a hive         | nectar  | yellow | a grub
        a mouse   | squeak | four | a little hole  | cheese  | grey   | a pinkie
        a cricket | chirp  | six  | the tall grass | leaves  | black  | a nymph
        """,
    ),
    (
        None,
        (_CAPITAL, _CROP, _FLAG, _RIVER),
        """
        Tildany  | Moxbury   | barley   | green  | Ambel
        Orlesse  | Pont Vail | grapes   | purple | Sarn
        Brakmark | Holt      | potatoes | black  | Yorrel
        Sunnavia | Calizo    | oranges  | yellow | Tamaro
        Quellin  | Aster     | tea      | blue   | Lirren
        Dromund  | Garth     | cabbages | red    | Wend
        """,
    ),
    (
        "days",
        (_next("day"),),
        """
        Monday | Tuesday
        Tuesday | Wednesday
        Wednesday | Thursday
        Thursday | Friday
        Friday | Saturday
        Saturday | Sunday
        Sunday | Monday
        """,
    ),
    (
        "months",
        (_next("month"),),
        """
        January | February
        February | March
        March | April
        April | May
        May | June
        June | July
        July | August
        August | September
        September | October
        October | November
        November | December
        December | January
        """,
    ),
    (
        "numbers",
        (_next("number"),),
        """
        one | two
        two | three
        three | four
        four | five
        five | six
        six | seven
        seven | eight
        eight | nine
        nine | ten
        ten | eleven
        eleven | twelve
        """,
    ),
    (
        "seasons",
        (_next("season"), _WEATHER),
        """
        spring | summer | mild
        summer | autumn | hot
        autumn | winter | stormy
        winter | spring | snowy
        """,
    ),
    (
        "opposites",
        (_OPPOSITE,),
        """
        hot | cold
        cold | hot
        big | small
        small | big
        up | down
        down | up
        fast | slow
        slow | fast
        wet | dry
        dry | wet
        full | empty
        empty | full
        open | closed
        closed | open
        loud | quiet
        quiet | loud
        hard | soft
        soft | hard
        rich | poor
        poor | rich
        happy | sad
        sad | happy
        near | far
        far | near
        thick | thin
        thin | thick
        left | right
        right | left
        sweet | sour
        sour | sweet
        """,
    ),
    (
        "colours",
        (_COLOUR,),
        """
        grass | green
        snow | white
        coal | black
        the sky | blue
        blood | red
        honey | golden
        chocolate | brown
        smoke | grey
        a lemon | yellow
        a carrot | orange
        a plum | purple
        a tomato | red
        a cucumber | green
        a flamingo | pink
        """,
    ),
    (
        "tools",
        (_TOOL,),
        """
        a hammer | drive nails
        a saw | cut wood
        a needle | sew clothes
        a broom | sweep the floor
        a spade | dig holes
        a pen | write letters
        a kettle | boil water
        a comb | tidy hair
        a lamp | light a room
        a key | open a lock
        a ladder | climb a wall
        a clock | tell the time
        """,
    ),
    (
        "rooms",
        (_ROOM,),
        """
        the kitchen | cook
        the bedroom | sleep
        the bathroom | wash
        the cellar | store apples
        the attic | dry herbs
        the garage | park the car
        the garden | plant flowers
        the library | read books
        """,
    ),
    (
        "jobs",
        (_JOB,),
        """
        a baker | bake bread
        a doctor | heal the sick
        a teacher | teach children
        a tailor | make coats
        a farmer | plough fields
        a fisher | catch fish
        a mason | build walls
        a cobbler | mend shoes
        a pilot | fly planes
        a judge | settle quarrels
        a painter | paint pictures
        a barber | cut hair
        """,
    ),
)


def facts() -> list[Fact]:
    """Return every fact of the world, always in the same order."""
    world = []
    for topic, relations, table in _TABLES:
        for line in table.strip().splitlines():
            subject, *values = (cell.strip() for cell in line.split("|"))
            for relation, value in zip(relations, values, strict=True):
                world.append(relation.fact(topic or subject, subject, value))
    return world
