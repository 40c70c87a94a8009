"""Pure: a step runner whose KV is a chain over the tokens before it, so that any misuse of a block shows.

A slot holds (token, chain); chain(i) is a function of chain(i-1) and token(i). The token drawn is a function
of the last chain, the sample and the output index. Whoever reads a block that was reused, not copied or
computed from other tokens breaks the chain.
"""

from collections.abc import Sequence
from dataclasses import replace

from engine.contract import LayerListener
from engine.step import SampledToken, SequenceSlice, StepPlan, StepResult
from tandem.ids import BlockId

_START = 0x1234_5678


def _chain(before: int, token_id: int) -> int:
    return (before * 1_000_003 + token_id * 7919 + 12345) % (1 << 61)


def toy_token(token_ids: Sequence[int], sample_index: int, output_index: int, vocabulary: int) -> int:
    """The token that follows `token_ids` in the toy language."""
    chain = _START
    for token_id in token_ids:
        chain = _chain(chain, token_id)
    return _draw(chain, sample_index, output_index, vocabulary)


def toy_output(
    prompt: Sequence[int], sample_index: int, count: int, vocabulary: int, known: Sequence[int] = ()
) -> list[int]:
    """The first `count` output tokens of a sample that nothing disturbs."""
    tokens = [*prompt, *known]
    while len(tokens) < len(prompt) + count:
        tokens.append(toy_token(tokens, sample_index, len(tokens) - len(prompt), vocabulary))
    return tokens[len(prompt) :]


def _draw(chain: int, sample_index: int, output_index: int, vocabulary: int) -> int:
    return (_chain(_chain(chain, sample_index), output_index) >> 20) % vocabulary


class ToyStepInFlight:
    """A step whose result nobody has seen."""

    def __init__(self, in_flight: list[StepResult]) -> None:
        self._in_flight = in_flight
        self._step = in_flight[-1].step

    def result(self) -> StepResult:
        """See StepInFlight: the results come in the order of the steps."""
        result = self._in_flight.pop(0)
        assert result.step == self._step
        return result


class ToyRunner:
    """Memory of a pool and the runner over it; raises AssertionError where KV is not what it should be."""

    def __init__(self, num_blocks: int, block_size: int, vocabulary: int) -> None:
        self._size = block_size
        self._vocabulary = vocabulary
        self._in_flight: list[StepResult] = []
        self.most_in_flight = 0
        self._slots: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]

    def run(self, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        """Carries out a plan, checking the KV that it reads; its one layer is done at the end."""
        assert not any(part.follows for part in plan.slices), "a slice follows a step that is over"
        for source, target in plan.copies:
            self._slots[target] = list(self._slots[source])
        drawn: list[SampledToken] = []
        for part in plan.slices:
            drawn += self._feed(part)
        if on_layers is not None:
            on_layers(1)
        return StepResult(plan.step, tuple(drawn), 0.001)

    def begin(self, plan: StepPlan, on_layers: LayerListener | None = None) -> "ToyStepInFlight":
        """Carries a plan out, and keeps the result to itself until it is asked for.

        A slice that follows finds its token in the step before, whose result must not have been taken.
        """
        assert len(self._in_flight) < 2, "a third step is begun"
        known = {token.key: token.token_id for token in self._in_flight[-1].tokens} if self._in_flight else {}
        slices = tuple(
            replace(part, token_ids=(known[part.samples[0].key],), follows=False) if part.follows else part
            for part in plan.slices
        )
        self._in_flight.append(self.run(replace(plan, slices=slices), on_layers))
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        return ToyStepInFlight(self._in_flight)

    def pull(self, token_ids: Sequence[int], targets: Sequence[BlockId], first_block: int) -> None:
        """Writes the KV of `token_ids` from its block `first_block` on into `targets`, as a hand-off does."""
        chain, start = _START, first_block * self._size
        for token_id in token_ids[:start]:
            chain = _chain(chain, token_id)
        for offset, token_id in enumerate(token_ids[start:]):
            chain = self._write(offset, targets, chain, token_id)

    def scribble(self, blocks: Sequence[BlockId]) -> None:
        """Destroys blocks, as a hand-off that is under way may."""
        for block in blocks:
            self._slots[block] = [None] * self._size

    def check(self, token_ids: Sequence[int], table: Sequence[BlockId]) -> int:
        """Asserts that the table holds the KV of exactly these tokens; returns the chain at their end."""
        chain = _START
        for position, token_id in enumerate(token_ids):
            chain = _chain(chain, token_id)
            slot = self._slots[table[position // self._size]][position % self._size]
            assert slot == (token_id, chain), f"position {position} of {len(token_ids)}"
        return chain

    def _feed(self, part: SequenceSlice) -> list[SampledToken]:
        chains = [self._chain_before(part)]
        known = len(part.token_ids) - len(part.draft)
        for offset, token_id in enumerate(part.token_ids):
            # A guess of a tree goes on from its parent, wherever that lies.
            parent = offset if offset < known else known + part.draft.parent(offset - known) + 1
            chains.append(self._write(part.start + offset, part.block_table, chains[parent], token_id))
        return [
            SampledToken(
                request.key,
                request.sample_index,
                _draw(chains[request.row], request.sample_index, request.output_index, self._vocabulary),
                None,
                request.row,
            )
            for request in part.samples
        ]

    def _chain_before(self, part: SequenceSlice) -> int:
        chain = _START
        for position in range(part.start):
            slot = self._slots[part.block_table[position // self._size]][position % self._size]
            assert slot is not None, f"position {position} was never written"
            chain = _chain(chain, slot[0])
            assert slot[1] == chain, f"position {position} holds the KV of another sequence"
        return chain

    def _write(self, position: int, table: Sequence[BlockId], chain: int, token_id: int) -> int:
        chain = _chain(chain, token_id)
        self._slots[table[position // self._size]][position % self._size] = (token_id, chain)
        return chain


def written_blocks(plan: StepPlan, block_size: int) -> list[BlockId]:
    """The blocks that a plan's slices write, once for each slice that does."""
    return [
        part.block_table[index]
        for part in plan.slices
        for index in range(part.start // block_size, (part.start + len(part.token_ids) - 1) // block_size + 1)
    ]


def touched_blocks(plan: StepPlan) -> set[BlockId]:
    """All blocks that a plan reads or writes."""
    touched = {block for pair in plan.copies for block in pair}
    for part in plan.slices:
        touched.update(part.block_table)
    for drop in plan.drops.drops:
        touched.update(drop.source, drop.target)
    return touched
