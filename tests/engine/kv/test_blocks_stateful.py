"""The block pool under random use, against a plain model of who owns what and which prefix was computed."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv.block_hash import chain_hashes
from engine.kv.blocks import BlockPool, distinct_blocks
from tandem.errors import OutOfBlocks
from tandem.ids import BlockHash, BlockId

BLOCKS, SIZE = 8, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class PoolMachine(RuleBasedStateMachine):
    """Owners with tables; `content` says for which tokens a block was computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.owners: list[list[BlockId]] = []
        self.content: dict[BlockId, tuple[int, ...]] = {}
        self.router: set[BlockHash] = set()
        self.next_event = self.pool.drain_events().first_event

    @rule(tokens=TOKENS)
    def compute(self, tokens: list[int]) -> None:
        """A prompt comes: cached prefix, new blocks for the rest, computed and published."""
        free = self.pool.free_blocks
        cached = self.pool.match(tokens)
        assert len(cached) * SIZE < len(tokens)
        for index, block in enumerate(cached):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        try:
            fresh = self.pool.allocate(self.pool.blocks_for(len(tokens)) - len(cached))
        except OutOfBlocks:
            self.pool.release(cached)
            assert self.pool.free_blocks == free
            return
        table = [*cached, *fresh]
        for index in range(len(cached), len(table)):
            assert all(table[index] not in owner for owner in self.owners)
            self.content[table[index]] = tuple(tokens[: (index + 1) * SIZE])
        self.pool.publish(tokens, table)
        self.owners.append(table)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.owners))
        self.pool.fork(table)
        self.owners.append(list(table))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """An owner wants to write a block of its own; afterwards nobody finds it."""
        owner = data.draw(st.integers(0, len(self.owners) - 1))
        block = data.draw(st.sampled_from(self.owners[owner]))
        alone = sum(block in table for table in self.owners) == 1
        assert self.pool.withdraw(block) is alone
        assert self.pool.private(block) is alone
        if alone:
            self.content[block] = ()

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.pool.release(self.owners.pop(index))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def write_last_block(self, data: st.DataObject) -> None:
        """Copy-on-write: nobody else may see the block that is written."""
        table = data.draw(st.sampled_from(self.owners))
        others = [owner for owner in self.owners if owner is not table]
        try:
            block, pair = self.pool.writable(table[-1])
        except OutOfBlocks:
            return
        assert all(block not in owner for owner in others)
        if pair is not None:
            assert pair == (table[-1], block)
            self.pool.release(pair[:1])
            self.content.pop(block, None)
        table[-1] = block

    @rule()
    def tell_router(self) -> None:
        delta = self.pool.drain_events()
        assert delta.first_event == self.next_event
        self.next_event += len(delta.stored) + len(delta.removed)
        assert not set(delta.stored) & self.router
        assert set(delta.removed) <= self.router
        self.router = (self.router | set(delta.stored)) - set(delta.removed)

    @rule(tokens=TOKENS)
    def router_knows_the_cache(self, tokens: list[int]) -> None:
        self.tell_router()
        matched = self.pool.match(tokens, whole=True)
        hashes = chain_hashes(tokens, SIZE)
        assert all(known in self.router for known in hashes[: len(matched)])
        assert len(matched) == len(hashes) or hashes[len(matched)] not in self.router
        self.pool.release(matched)

    @rule()
    def snapshot_equals_what_the_router_was_told(self) -> None:
        snapshot = self.pool.snapshot()
        assert set(snapshot.stored) == self.router
        assert snapshot.first_event + len(snapshot.stored) == self.next_event
        assert snapshot.first_event >= 0

    @invariant()
    def accounts_agree(self) -> None:
        self.pool.check_integrity(self.owners)
        assert self.pool.allocated_blocks == distinct_blocks(self.owners)

    def teardown(self) -> None:
        for table in self.owners:
            self.pool.release(table)
        assert self.pool.allocated_blocks == 0
        assert len(self.pool.allocate(BLOCKS)) == BLOCKS


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
