"""Guesses at a row's next tokens: what followed before where the same tokens stood in its prompt or
its answer (prompt look-up decoding, arXiv 2304.04487 and apoorvumang/prompt-lookup-decoding), and
what its grammar asks for.

A step computes guesses behind the newest token. The row's sampler draws each token as it would
without them; a guess only says for which tokens a step's logits can be of use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

LONGEST = 16  # tokens that a match is counted to
# The chance that a guess is right before any of a row's was tried, by the tokens that matched.
CHANCES = {2: 0.3, 3: 0.45, 4: 0.6, 8: 0.8}
# And that a model writes a text that its grammar leaves no choice of in the tokenizer's own tokens.
OF_GRAMMAR, GRAMMAR_CHANCE = 0, 0.9
# Which of them is that of a match of so many tokens.
OF_MATCH = [max((key for key in CHANCES if key <= n), default=0) for n in range(LONGEST + 1)]
RATE = 1 / 8  # by which the newest guess moves such a chance


class Drafter:
    """Guesses what follows the tokens of one row.

    Every token says whether the guess before it was right, also where no step computed it. So a row
    whose guesses fail makes none until they would be right again.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where what followed these tokens last begins
        self._chances = {OF_GRAMMAR: GRAMMAR_CHANCE, **CHANCES}
        self._forced: int | None = None  # the grammar's guess
        self._at = 0  # where the guess begins; 0 for none
        self._matched = 0  # tokens before it that are the newest ones
        for token in prompt:
            self._append(token)
        self._look_up()

    def add(self, token: int) -> None:
        """Add the row's next token."""
        if self._forced is not None:
            self._learn(OF_GRAMMAR, is_right=self._forced == token)
            self._forced = None
        if self._at:
            self._learn(OF_MATCH[self._matched], is_right=self.tokens[self._at] == token)
        self._append(token)
        self._look_up()

    def guess(self, most: int, forced: Sequence[int] = ()) -> Iterator[tuple[int, float]]:
        """Yield the tokens that may come next, `most` of them, each with the chance that it and all
        before it are right; forced: those that the row's grammar asks for."""
        if forced:
            self._forced = forced[0]
            for n, token in enumerate(forced[:most]):
                yield token, self._chances[OF_GRAMMAR] ** (n + 1)
            return
        guessed: list[int] = []
        chance = 1.0
        for n in range(most if self._at else 0):
            beyond = self._at + n - len(self.tokens)  # text that repeats itself goes on so
            guessed.append(guessed[beyond] if beyond >= 0 else self.tokens[self._at + n])
            chance *= self._chances[OF_MATCH[min(self._matched + n, LONGEST)]]
            yield guessed[-1], chance

    def _learn(self, key: int, *, is_right: bool) -> None:
        self._chances[key] += RATE * (is_right - self._chances[key])

    def _append(self, token: int) -> None:
        for length in (2, 3):
            if len(self.tokens) >= length:
                self._after[tuple(self.tokens[-length:])] = len(self.tokens)
        self.tokens.append(token)

    def _look_up(self) -> None:
        """Find the longest match of the newest tokens: where the last guess goes on, or where the
        same three, or the same two, stood last."""
        places = [self._at + 1] if self._at else []
        places += [self._after.get(tuple(self.tokens[-length:]), 0) for length in (3, 2)]
        self._matched, self._at = max((self._match(place), place) for place in places)
        if self._matched < 2:
            self._at = 0

    def _match(self, place: int) -> int:
        """Return how many tokens before a place are the newest ones, LONGEST at most."""
        newest = len(self.tokens)
        for length in range(min(place, LONGEST)):
            if self.tokens[place - 1 - length] != self.tokens[newest - 1 - length]:
                return length
        return min(place, LONGEST)
