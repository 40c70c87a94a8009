"""Edge: prompts that are read once, and sequences that go on from them under a KV policy, a token a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kv_policy_tasks import BLOCK_SIZE
from engine.attention import AttentionBackend, Span
from engine.cpu.attention import CpuAttention
from engine.cpu.layout_choice import choose_linears
from engine.decoder import Decoder
from engine.kv.blocks import BlockPool
from engine.kv.kv_cache import KvCache
from engine.kv_policies.bounded_kv import NO_DROPS, KvBudget, KvDrop, KvDrops
from engine.kv_policies.bounded_sequence import BoundedSequence
from engine.kv_policies.page_attention import PageAttention, Reading
from engine.kv_policies.page_bounds import FULL_LAYERS
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.tokenizer import Tokenizer
from engine.models.weights import linear_shapes, read_weights
from engine.native.product import MOST_ROWS
from engine.native.team import Team, team_of_torch
from engine.step import StepPlan
from tandem.errors import ModelError
from tandem.ids import BlockId

CHUNK_TOKENS = 512
WINDOW = 16
CPU = torch.device("cpu")
ALL = Reading()


@dataclass(frozen=True, slots=True)
class Policy:
    """What is measured; `native` is the attention that a worker has by default."""

    name: str
    stored: torch.dtype = torch.float32
    reading: Reading = ALL
    native: bool = False


def _morph(tokens: int, largest: bool = False) -> Reading:
    return Reading(budget=KvBudget(tokens, WINDOW), largest=largest)


POLICIES = (
    Policy("full, float32"),
    *(Policy(f"quest {pages}, float32", reading=Reading(pages)) for pages in (64, 32, 16)),
    *(Policy(f"morph {tokens}, float32", reading=_morph(tokens)) for tokens in (1024, 512, 256)),
    Policy("morph 512 by max, float32", reading=_morph(512, largest=True)),
    Policy("full, int8", torch.int8),
    Policy("quest 32, int8", torch.int8, Reading(32)),
    Policy("morph 512, int8", torch.int8, _morph(512)),
)
DEFAULT = Policy("default back-end, float32", native=True)


@dataclass(frozen=True, slots=True)
class Prompt:
    """KV of a prompt of whole blocks."""

    table: tuple[BlockId, ...]
    tokens: int


@dataclass(slots=True)
class _Sequence:
    """One that goes on: its blocks, and how many tokens it has."""

    table: list[BlockId]
    computed: int
    bounded: BoundedSequence
    leaving: list[BlockId] = field(default_factory=list)


class Reader:
    """One model, and a pool of one type in which prompts stay."""

    def __init__(self, decoder: Decoder, config: ModelConfig, cache: KvCache, team: Team) -> None:
        self.decoder = decoder
        self.config = config
        self.cache = cache
        self.team = team
        self.pool = BlockPool(cache.num_blocks, BLOCK_SIZE, prefix_cache=False)

    def read(self, prompt: Sequence[int]) -> Prompt:
        """Reads a prompt of whole blocks with all of its KV."""
        attention = PageAttention(self.cache, self.config, self.team)
        table = self.pool.allocate(len(prompt) // BLOCK_SIZE)
        for start in range(0, len(prompt), CHUNK_TOKENS):
            part = torch.tensor(prompt[start : start + CHUNK_TOKENS])
            spans = attention.prepare([Span(0, len(part), start, table)])
            positions = torch.arange(start, start + len(part))
            self.decoder.features(part, positions, spans, torch.arange(0))
        return Prompt(table, len(prompt))

    def attention(self, policy: Policy) -> AttentionBackend:
        """What attends under a policy; it has heard of no block."""
        if policy.native:
            return CpuAttention(self.cache, self.config, self.team)
        return PageAttention(self.cache, self.config, self.team, policy.reading)

    @contextmanager
    def sequences(self, policy: Policy, prompts: Sequence[Prompt]) -> Iterator["Sequences"]:
        """Sequences that go on from prompts, which they share."""
        going = Sequences(self, policy, prompts)
        try:
            yield going
        finally:
            going.close()


class Sequences:
    """Sequences under one policy that are fed a token each at a time."""

    def __init__(self, reader: Reader, policy: Policy, prompts: Sequence[Prompt]) -> None:
        self._reader = reader
        self._budget = policy.reading.budget
        self._attention = reader.attention(policy)
        self._sequences: list[_Sequence] = []
        for key, prompt in enumerate(prompts):
            reader.pool.fork(prompt.table)
            self._sequences.append(_Sequence(list(prompt.table), prompt.tokens, BoundedSequence(key)))
        landed = {block: BLOCK_SIZE for prompt in prompts for block in prompt.table}
        self._hear(StepPlan(0, (), landed=tuple(landed.items())))

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Feeds each sequence its token; float32 logits [sequences, vocabulary]."""
        drops = [drop for sequence in self._sequences if (drop := self._make_room(sequence)) is not None]
        self._hear(StepPlan(0, (), drops=KvDrops(tuple(drops)) if drops else NO_DROPS))
        spans = [self._span(row, sequence) for row, sequence in enumerate(self._sequences)]
        logits = self._reader.decoder.forward(
            torch.tensor(tokens),
            torch.tensor([sequence.computed for sequence in self._sequences]),
            self._attention.prepare(spans),
            torch.arange(len(tokens)),
        )
        for sequence in self._sequences:
            self._reader.pool.release(sequence.leaving)
            sequence.leaving = []
            if self._budget is not None:
                sequence.bounded.fed(self._budget, sequence.computed, 1)
            sequence.computed += 1
        return logits

    def close(self) -> None:
        """Gives the sequences' blocks back."""
        for sequence in self._sequences:
            self._reader.pool.release(sequence.table)
        self._sequences = []

    def _hear(self, plan: StepPlan) -> None:
        if isinstance(self._attention, PageAttention):
            self._attention.begin_step(plan)

    def _make_room(self, sequence: _Sequence) -> KvDrop | None:
        pool, bounded, drop = self._reader.pool, sequence.bounded, None
        if self._budget is not None:
            found = bounded.drop(pool, self._budget, sequence.table, sequence.computed, 1)
            if found is not None:
                drop, sequence.leaving = found
        missing = pool.blocks_for(sequence.computed + 1 - bounded.dropped) - len(sequence.table)
        sequence.table += pool.allocate(max(0, missing))
        return drop

    def _span(self, row: int, sequence: _Sequence) -> Span:
        bounded = sequence.bounded
        note = None if self._budget is None else bounded.note(self._budget, sequence.computed, 1)
        return Span(row, 1, sequence.computed - bounded.dropped, sequence.table, bounded=note)


class Model:
    """The default model or another, float32 on the CPU."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Raises ModelError for a model that cannot be read, or a torch without threads for native loops."""
        team = team_of_torch(threads)
        if team is None:
            raise ModelError("KV policies need a torch whose threads have GOMP's entry points.")
        self._team = team
        self.config: ModelConfig = read_model_config(folder)
        self.tokenizer = Tokenizer.load(folder)
        weights = read_weights(folder, self.config, torch.float32, CPU, None)
        product = choose_linears(linear_shapes(self.config), torch.float32, native_rows=MOST_ROWS)
        self._decoder = Decoder(self.config, weights, product, team)

    @contextmanager
    def reader(self, blocks: int, stored: torch.dtype) -> Iterator[Reader]:
        """A reader with a pool of its own."""
        with KvCache(self.config, blocks, BLOCK_SIZE, stored, CPU) as cache:
            yield Reader(self._decoder, self.config, cache, self._team)


def held_tokens(policy: Policy, tokens: int) -> int:
    """Tokens that have KV at a context of so many, at most."""
    return tokens if policy.reading.budget is None else min(tokens, policy.reading.budget.tokens)


def read_bytes(config: ModelConfig, policy: Policy, tokens: int) -> int:
    """Bytes of K, V and bounds that one more token reads at a context of so many."""
    row = config.head_dim + 4 if policy.stored == torch.int8 else config.head_dim * policy.stored.itemsize
    pages, chosen = -(-held_tokens(policy, tokens) // BLOCK_SIZE), policy.reading.pages
    page = 2 * BLOCK_SIZE * row * config.kv_heads
    if chosen is None or pages <= chosen:
        return config.layers * pages * page
    bounds = (pages - 1) * 2 * config.head_dim * 4 * config.kv_heads
    return FULL_LAYERS * pages * page + (config.layers - FULL_LAYERS) * (chosen * page + bounds)


def held_bytes(config: ModelConfig, policy: Policy, tokens: int) -> int:
    """Bytes of K, V, bounds and scores of a sequence of so many tokens, in whole blocks."""
    row = config.head_dim + 4 if policy.stored == torch.int8 else config.head_dim * policy.stored.itemsize
    held, heads = held_tokens(policy, tokens), config.layers * config.kv_heads
    pages = -(-held // BLOCK_SIZE)
    kept = heads * pages * BLOCK_SIZE * 2 * row
    if policy.reading.pages is not None:
        return kept + heads * pages * 2 * config.head_dim * 4
    return kept if policy.reading.budget is None else kept + heads * pages * BLOCK_SIZE * 4
