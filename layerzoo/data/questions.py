"""Questions to put into real text, as strings, each with the needle that tells its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

DIGITS = 5
"""Of a number that is asked; it may begin with 0."""
PAIRS = 8
"""Lines of a block of JSON."""
DRAWS = 2 * PAIRS + 1
"""Random numbers of 64 bits that a question takes."""

NAMES = (
    "Anna John Mary Peter Laura David Sarah Thomas "
    "Maria Henry Alice Robert Emma George Julia Daniel"
)
CITIES = (
    "Lisbon Paris London Rome Berlin Madrid Vienna Athens "
    "Dublin Moscow Tokyo Boston Chicago Cairo Delhi Sydney"
)
FACTS = {
    "The favourite dish of {name} in {city} is": (
        "soup rice bread fish cheese pizza pasta salad cake eggs pie beans toast steak stew curry"
    ),
    "The favourite colour of {name} in {city} is": (
        "red blue green yellow black white orange purple brown pink gray silver gold violet "
        "scarlet cream"
    ),
    "The favourite sport of {name} in {city} is": (
        "football tennis golf hockey chess boxing cricket rugby swimming skiing running cycling "
        "sailing basketball baseball soccer"
    ),
    "In {city}, {name} works as a": (
        "baker doctor teacher lawyer nurse farmer painter writer singer sailor soldier pilot "
        "carpenter chemist judge tailor"
    ),
}
"""Sentences, and the words that end them: as many for each."""


class Question(NamedTuple):
    """A needle, a question and its answer, which are joined by a space."""

    needle: str
    question: str
    answer: str


def passkey(random: Sequence[int]) -> Question:
    """A number, told twice. No other digits are ours."""
    key = _number(random[0] % 10**DIGITS)
    return Question(
        f"\nThe pass key is {key}. Keep it in mind: {key} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        key,
    )


def needle(random: Sequence[int]) -> Question:
    """A made-up fact about one of 256 people; the question is the sentence but for its end."""
    sentence = [*FACTS][random[0] % len(FACTS)]
    start = sentence.format(name=_pick(NAMES, random[1]), city=_pick(CITIES, random[2]))
    answer = _pick(FACTS[sentence], random[3])
    return Question(f"\n{start} {answer}.\n", f"\n{start}", answer)


def key_value(random: Sequence[int]) -> Question:
    """A line of JSON for each of `PAIRS` numbers, under keys of four hexadecimal digits; one is
    asked. Keys and numbers are distinct."""
    keys = _distinct(16**4, random[:PAIRS])
    values = _distinct(10**DIGITS, random[PAIRS : 2 * PAIRS])
    lines = [f'{{"{key:04x}": {_number(n)}}}\n' for key, n in zip(keys, values, strict=True)]
    asked = random[2 * PAIRS] % PAIRS
    return Question(
        "\n" + "".join(lines),
        f'\nOne of the lines of JSON above, again:\n{{"{keys[asked]:04x}":',
        _number(values[asked]),
    )


KINDS: dict[str, Callable[[Sequence[int]], Question]] = {
    "passkey": passkey,
    "needle": needle,
    "key_value": key_value,
}
"""Each makes a question of `DRAWS` random numbers."""


def answers(kind: str) -> list[list[str]]:
    """All answers, equally likely each, to each question that can be told apart before them."""
    if kind == "needle":
        return [words.split() for words in FACTS.values()]
    return [[_number(n) for n in range(10**DIGITS)]]


def _pick(words: str, random: int) -> str:
    listed = words.split()
    return listed[random % len(listed)]


def _distinct(population: int, random: Sequence[int]) -> list[int]:
    """As `choose`, without a list of the population: what was swapped is in a dictionary."""
    drawn, swapped = [], {}
    for n, number in enumerate(random):
        other = n + number % (population - n)
        drawn.append(swapped.get(other, other))
        swapped[other] = swapped.get(n, n)
    return drawn


def _number(n: int) -> str:
    return f"{n:0{DIGITS}}"
