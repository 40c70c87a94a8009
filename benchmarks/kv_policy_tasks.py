"""Edge: what KV policies are tried on: a fixed text, and facts hidden in it, with numbers drawn by seed."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

from engine.models.tokenizer import Tokenizer
from tandem.errors import InvalidRequest

BLOCK_SIZE = 16
"""Prompts are whole blocks of so many tokens."""

FACTS = (
    "The access code of {place} is {number}.",
    "The telephone number of the bakery in {place} is {number}.",
    "The train to {place} leaves from platform {number}.",
    "The treasure of {place} was sold for {number} crowns.",
    "The old lighthouse of {place} was built in the year {number}.",
    "The winner of the race in {place} wore the number {number}.",
    "The library of {place} owns {number} books.",
    "The bridge of {place} has a length of {number} feet.",
)
"""What is hidden; a prompt has each of them once."""

PLACES = (
    "Lisbon",
    "Bergen",
    "Ravenna",
    "Oslo",
    "Cairo",
    "Lima",
    "Kyoto",
    "Dublin",
    "Tunis",
    "Quito",
    "Havana",
    "Athens",
    "Riga",
    "Seoul",
    "Geneva",
    "Naples",
    "Boston",
    "Hanoi",
    "Nairobi",
    "Sydney",
    "Vienna",
    "Prague",
    "Madrid",
    "Warsaw",
    "Berlin",
    "Bogota",
    "Manila",
    "Santiago",
    "Helsinki",
    "Toronto",
    "Chicago",
    "Moscow",
)
"""Where; no two begin with the same letters."""


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence that has nothing to do with what is around it: up to its number, the number, its end."""

    beginning: str
    number: str
    end: str

    @property
    def fact(self) -> str:
        """The whole sentence."""
        return f"{self.beginning} {self.number}{self.end}"

    @property
    def question(self) -> str:
        """What comes before the number when it is asked for."""
        return f"\n\n{self.beginning}"


@dataclass(frozen=True, slots=True)
class Haystack:
    """A prompt of whole blocks, and its needles from the first to the last."""

    prompt: tuple[int, ...]
    needles: tuple[Needle, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the text: a prompt of whole blocks and the tokens after it."""

    prompt: tuple[int, ...]
    rest: tuple[int, ...]


def fixed_text() -> str:
    """The language reference that comes with Python, as paragraphs of one line each."""
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = (" ".join(part.split()) for part in joined.split("\n\n"))
    return "\n\n".join(part for part in paragraphs if len(part) > 120 and part.endswith("."))


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of its SHA-256: tells whether two runs had the same text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def haystacks(tokenizer: Tokenizer, text: str, tokens: int, count: int) -> tuple[Haystack, ...]:
    """`count` prompts of about `tokens` tokens, other parts of the text each, with all FACTS in each.

    Needle i of n lies about (i + 1/2) / n into its prompt; which fact that is, changes from prompt to prompt.
    Raises InvalidRequest when the text is too short.
    """
    draw, depths = random.Random(tokens), len(FACTS)
    needles = [
        _needle(FACTS[(index + index // depths) % depths], place, draw.randrange(10000, 100000))
        for index, place in enumerate(PLACES[: count * depths])
    ]
    paragraphs = text.split("\n\n")
    found: list[Haystack] = []
    for index in range(count):
        own = tuple(needles[index * depths : (index + 1) * depths])
        taken, paragraphs = _first(tokenizer, paragraphs, tokens - _size(tokenizer, own))
        every = len(taken) / depths
        for place in reversed(range(depths)):
            taken.insert(int((place + 0.5) * every), own[place].fact)
        found.append(Haystack(_whole_blocks(tokenizer.encode("\n\n".join(taken))), own))
    return tuple(found)


def pieces(tokenizer: Tokenizer, text: str, tokens: int, count: int, rest: int) -> tuple[Piece, ...]:
    """`count` parts of the text that do not overlap: `tokens` tokens of prompt and `rest` after it.

    Raises InvalidRequest when the text is too short.
    """
    read = tokens // BLOCK_SIZE * BLOCK_SIZE
    encoded = tokenizer.encode(text)
    if len(encoded) < count * (read + rest):
        raise InvalidRequest(f"The text has fewer than {count * (read + rest)} tokens.", "text")
    starts = [place * (read + rest) for place in range(count)]
    return tuple(
        Piece(tuple(encoded[at : at + read]), tuple(encoded[at + read : at + read + rest])) for at in starts
    )


def _needle(fact: str, place: str, number: int) -> Needle:
    beginning, end = fact.format(place=place, number="|").split(" |")
    return Needle(beginning, str(number), end)


def _size(tokenizer: Tokenizer, needles: Sequence[Needle]) -> int:
    return len(tokenizer.encode("\n\n".join(needle.fact for needle in needles)))


def _first(tokenizer: Tokenizer, paragraphs: Sequence[str], tokens: int) -> tuple[list[str], list[str]]:
    """As many whole paragraphs as fit into so many tokens, at least one, and those after them."""
    size = 0
    for count, paragraph in enumerate(paragraphs):
        size += len(tokenizer.encode(paragraph + "\n\n"))
        if size > tokens and count > 0:
            return list(paragraphs[:count]), list(paragraphs[count:])
    raise InvalidRequest("The text is too short for the haystacks.", "text")


def _whole_blocks(tokens: Sequence[int]) -> tuple[int, ...]:
    """Without the last tokens, so that what is left fills its blocks."""
    return tuple(tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE])
