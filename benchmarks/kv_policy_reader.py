"""Edge: prompts and tokens fed one by one under a KV policy: needles found, perplexity, bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import AttentionBackend, Span
from engine.cpu_attention import CpuAttention
from engine.decoder import Decoder
from engine.kv_cache import KvCache
from engine.kv_policies.page_attention import PageAttention
from engine.kv_policies.page_bounds import FULL_LAYERS
from engine.model_config import ModelConfig
from engine.tokenizer import Tokenizer
from tandem.errors import InvalidRequest
from tandem.ids import BlockId

BLOCK_SIZE = 16
CHUNK_TOKENS = 512
ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence between paragraphs that have nothing to do with it: how it begins, and what must follow."""

    question: str
    answer: str
    end: str = "."

    @property
    def fact(self) -> str:
        """The whole sentence."""
        return f"{self.question} {self.answer}{self.end}"


NEEDLES = (
    Needle("The secret number of Lisbon is", "48213"),
    Needle("Maria keeps", "7319 marbles", " in her blue box."),
    Needle("Captain Olsen sailed from", "Bergen to Halifax", " in 1847."),
    Needle("The password of the old lighthouse is", "umbrella"),
    Needle("Doctor Green found the lost violin in", "the attic of the museum"),
    Needle("The telephone number of the bakery is", "55127"),
    Needle("The best thing to do in San Francisco is to", "eat a sandwich", " in Dolores Park."),
    Needle("The winner of the pumpkin contest was", "Farmer Novak"),
    Needle("The train to Ravenna leaves from platform", "23"),
    Needle("Grandmother hides the cookies", "behind the piano"),
    Needle("The rarest stamp in the album shows", "a purple giraffe"),
    Needle("The treasure map was sold to", "Mister Okafor", " for 900 crowns."),
)

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Policy:
    """What is measured; `pages` None reads all, "native" is the attention that a worker has by default."""

    name: str
    stored: torch.dtype
    pages: int | None = None
    native: bool = False


POLICIES = (
    Policy("full, float32", torch.float32),
    *(Policy(f"quest {pages}, float32", torch.float32, pages) for pages in (64, 32, 16, 8)),
    Policy("full, int8", torch.int8),
    Policy("quest 32, int8", torch.int8, 32),
)
DEFAULT = Policy("default back-end, float32", torch.float32, native=True)


class Reader:
    """One model, and a pool of one type whose first blocks hold a prompt."""

    def __init__(self, decoder: Decoder, config: ModelConfig, cache: KvCache) -> None:
        self.decoder = decoder
        self.config = config
        self.cache = cache

    def read(self, prompt: Sequence[int]) -> None:
        """Writes KV of a prompt of whole blocks into the first blocks."""
        attention = self.attention(Policy("", self.cache.pool.dtype), 0)
        table = [BlockId(block) for block in range(len(prompt) // BLOCK_SIZE)]
        for start in range(0, len(prompt), CHUNK_TOKENS):
            part = torch.tensor(prompt[start : start + CHUNK_TOKENS])
            spans = attention.prepare([Span(0, len(part), start, table)])
            positions = torch.arange(start, start + len(part))
            self.decoder.features(part, positions, spans, torch.arange(0))

    def attention(self, policy: Policy, prompt_blocks: int) -> AttentionBackend:
        """A policy that knows the first blocks."""
        if policy.native:
            return CpuAttention(self.cache, self.config)
        attention = PageAttention(self.cache, self.config, policy.pages)
        attention.begin_step([(BlockId(block), BLOCK_SIZE) for block in range(prompt_blocks)], ())
        return attention

    def step(
        self, attention: AttentionBackend, tokens: Sequence[int], at: int, tables: Sequence[Sequence[BlockId]]
    ) -> Tensor:
        """Feeds one token of each sequence at position `at`; logits [sequences, vocabulary]."""
        spans = [Span(row, 1, at, table) for row, table in enumerate(tables)]
        return self.decoder.forward(
            torch.tensor(tokens),
            torch.full((len(tokens),), at),
            attention.prepare(spans),
            torch.arange(len(tokens)),
        )


def haystack(tokenizer: Tokenizer, text: str, tokens: int, needles: Sequence[Needle]) -> list[int]:
    """About so many tokens of paragraphs with the needles at even depths; whole blocks.

    Raises InvalidRequest when the text is too short.
    """
    paragraphs = [part for part in text.split("\n\n") if len(part) > 80 and part[0] not in "`|"]
    taken: list[str] = []
    while len(tokenizer.encode("\n\n".join(taken))) < tokens:
        if len(taken) == len(paragraphs):
            raise InvalidRequest(f"The text has fewer than {tokens} tokens.", "text")
        taken.append(paragraphs[len(taken)])
    every = len(taken) / len(needles)
    for place in reversed(range(len(needles))):
        taken.insert(int((place + 0.5) * every), needles[place].fact)
    encoded = tokenizer.encode("\n\n".join(taken))
    return encoded[: len(encoded) // BLOCK_SIZE * BLOCK_SIZE]


def found_needles(
    reader: Reader, tokenizer: Tokenizer, policy: Policy, prompt_tokens: int, needles: Sequence[Needle]
) -> int:
    """How many needles the model names greedily, letter for letter, when their sentences begin anew."""
    blocks = prompt_tokens // BLOCK_SIZE
    attention = reader.attention(policy, blocks)
    questions = [tokenizer.encode("\n\n" + needle.question) for needle in needles]
    steps = max(map(len, questions)) + ANSWER_TOKENS
    tables = [_own_table(blocks, -(-steps // BLOCK_SIZE), place) for place in range(len(questions))]
    answers: list[list[int]] = [[] for _ in questions]
    for offset in range(steps):
        fed = [(*question, *answer)[offset] for question, answer in zip(questions, answers, strict=True)]
        likeliest = reader.step(attention, fed, prompt_tokens + offset, tables).argmax(1).tolist()
        for question, answer, token in zip(questions, answers, likeliest, strict=True):
            if offset >= len(question) - 1:
                answer.append(token)
    said = [tokenizer.decode(answer).strip() for answer in answers]
    return sum(answer.startswith(needle.answer) for answer, needle in zip(said, needles, strict=True))


def continued(
    reader: Reader, policy: Policy, prompt_tokens: int, rest: Sequence[int]
) -> tuple[float, list[int]]:
    """Perplexity of `rest` after its first token, and the likeliest successor of each of its tokens."""
    blocks = prompt_tokens // BLOCK_SIZE
    attention = reader.attention(policy, blocks)
    table = [_own_table(blocks, -(-len(rest) // BLOCK_SIZE), 0)]
    logits = torch.cat(
        [reader.step(attention, [token], prompt_tokens + offset, table) for offset, token in enumerate(rest)]
    )
    chosen = logits[:-1].log_softmax(1).gather(1, torch.tensor(rest[1:])[:, None])
    return float(chosen.mean().neg().exp().item()), logits.argmax(1).tolist()


def _own_table(shared: int, own: int, place: int) -> list[BlockId]:
    return [
        BlockId(block) for block in (*range(shared), *range(shared + place * own, shared + (place + 1) * own))
    ]


def read_bytes(config: ModelConfig, policy: Policy, tokens: int) -> int:
    """Bytes of K, V and bounds that one more token reads at a context of so many."""
    row = config.head_dim + 4 if policy.stored == torch.int8 else config.head_dim * policy.stored.itemsize
    pages = -(-tokens // BLOCK_SIZE)
    page = 2 * BLOCK_SIZE * row * config.kv_heads
    if policy.pages is None or pages <= policy.pages:
        return config.layers * pages * page
    bounds = (pages - 1) * 2 * config.head_dim * 4 * config.kv_heads
    sparse = policy.pages * page + bounds
    return FULL_LAYERS * pages * page + (config.layers - FULL_LAYERS) * sparse


def held_bytes(reader: Reader, policy: Policy) -> float:
    """Bytes that a token of a full block takes, with its part of the bounds."""
    config = reader.config
    bounds = 0 if policy.pages is None else config.layers * config.kv_heads * 2 * config.head_dim * 4
    return (reader.cache.block_bytes + bounds) / BLOCK_SIZE
