"""Pure: the blocks of one worker's KV pool: free, referenced, shared, cached."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.kv.prefix_tree import PrefixTree
from tandem.errors import OutOfBlocks, ProtocolError
from tandem.ids import BlockHash, BlockId


@dataclass(frozen=True, slots=True)
class CacheDelta:
    """Changes of the prefix cache; `stored` and `removed` are disjoint.

    The next delta starts at `first_event` + len(stored) + len(removed), as CacheEvents in worker.proto says.
    """

    first_event: int
    stored: tuple[BlockHash, ...]
    removed: tuple[BlockHash, ...]


def distinct_blocks(tables: Iterable[Sequence[BlockId]]) -> int:
    """How many different blocks the owners' tables name; the account to hold against `allocated_blocks`."""
    return len({block for table in tables for block in table})


class BlockPool:
    """Hands out blocks, counts their references, keeps computed ones for reuse and evicts the oldest of them.

    Every reference given out by match, allocate and fork is given back by one release. A block in the prefix
    cache is never written again. All operations cost O(blocks named in the call), eviction amortised.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_cache: bool = True,
        blocks: Sequence[BlockId] | None = None,
        below: int | None = None,
    ) -> None:
        """A pool of `num_blocks` blocks of `block_size` tokens; both at least 1, else ValueError.

        `blocks` names them where not all that lie in the same memory are this pool's; every number that a
        block of the pool may ever have is less than `below`.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens is not possible")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = prefix_cache
        self._references = [0] * (num_blocks if below is None else below)
        self._promised = 0
        names = [BlockId(index) for index in range(num_blocks)] if blocks is None else blocks
        self._own = set(names)
        self._free = list(reversed(names))
        # Unreferenced cached blocks, least recently used first. A prefix is released after what extends it,
        # so it is never older than its extensions.
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()
        self._tree = PrefixTree(block_size)
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}
        # Starts here so that a snapshot, whose hashes count as events too, never starts below 0.
        self._next_event = num_blocks

    @property
    def caches(self) -> bool:
        """Whether computed blocks are kept for reuse; if not, publish and match do nothing."""
        return self._caching

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated now: free ones and cached ones that nobody refers to."""
        return len(self._free) + len(self._evictable) - self._promised

    @property
    def allocated_blocks(self) -> int:
        """Blocks that the pool believes somebody refers to, promised ones among them."""
        return self.num_blocks - self.free_blocks

    @property
    def promised_blocks(self) -> int:
        """Blocks that were promised and not redeemed."""
        return self._promised

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def references(self, block: BlockId) -> int:
        """How many references to a block are out."""
        return self._references[block]

    def match(self, token_ids: Sequence[int], *, whole: bool = False) -> tuple[BlockId, ...]:
        """Takes references to the longest cached prefix, in full blocks.

        At least one token stays uncovered, because logits come from computing it; `whole` allows all.
        """
        if not self._caching:
            return ()
        usable = len(token_ids) if whole else len(token_ids) - 1
        blocks = tuple(self._tree.walk(token_ids, max(usable, 0) // self.block_size))
        self.fork(blocks)
        return blocks

    def allocate(self, count: int) -> tuple[BlockId, ...]:
        """Gives `count` blocks with undefined content and one reference each; OutOfBlocks gives none."""
        if count > self.free_blocks:
            raise OutOfBlocks(f"{count} blocks asked for, {self.free_blocks} of {self.num_blocks} are free")
        while len(self._free) - self._promised < count:
            self._evict()
        return self._name(count)

    def promise(self, count: int) -> None:
        """Sets `count` blocks aside for one owner, who names them later by redeem; OutOfBlocks sets none.

        Costs O(evicted blocks), so that an owner can count on growing without touching each block.
        """
        if count > self.free_blocks:
            raise OutOfBlocks(f"{count} blocks asked for, {self.free_blocks} of {self.num_blocks} are free")
        self._promised += count
        while len(self._free) < self._promised:
            self._evict()

    def redeem(self, count: int) -> tuple[BlockId, ...]:
        """Names `count` of the promised blocks, with one reference each. ProtocolError for more of them."""
        if count > self._promised:
            raise ProtocolError(f"{count} blocks redeemed, {self._promised} were promised")
        self._promised -= count
        return self._name(count)

    def fork(self, blocks: Sequence[BlockId]) -> None:
        """Takes one more reference to each block; they must be referenced or cached."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._evictable:
                    raise ProtocolError(f"block {block} is free and cannot be shared")
                del self._evictable[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Gives one reference to each block back; the first blocks of the sequence are evicted last."""
        references, cached = self._references, self._tree if len(self._tree) else ()
        for block in reversed(blocks):
            count = references[block] - 1
            if count < 0:
                raise ProtocolError(f"block {block} is released more often than it was taken")
            references[block] = count
            if count > 0:
                continue
            if block in cached:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def private(self, block: BlockId) -> bool:
        """Whether its one owner may write a block without copying it."""
        return self._references[block] == 1 and block not in self._tree

    def writable(self, block: BlockId) -> tuple[BlockId, tuple[BlockId, BlockId] | None]:
        """Copy-on-write: the block itself if nobody else refers to it, else a new one and the pair to copy.

        The caller keeps its reference to the source until the copy is done, so that nobody else writes it
        meanwhile, and releases it then. OutOfBlocks allocates nothing.
        """
        if self.private(block):
            return block, None
        (copy,) = self.allocate(1)
        return copy, (block, copy)

    def exchange(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Blocks that left the pool, each with the one that came in its stead and has its reference now.

        Raises ProtocolError, nothing being changed, unless each that left was private, and each that came was
        no block of the pool.
        """
        left, came = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if not all(map(self.private, left)) or not self._own.isdisjoint(came):
            raise ProtocolError(f"{len(pairs)} blocks cannot leave the pool: not all of them are to be had")
        self._own.difference_update(left)
        self._own.update(came)
        for block in left:
            self._references[block] = 0
        for block in came:
            self._references[block] = 1

    def publish(self, token_ids: Sequence[int], blocks: Sequence[BlockId]) -> None:
        """Puts the full blocks of one sequence into the prefix cache; they must be referenced.

        `token_ids` are the sequence's computed tokens from its start, `blocks` its block table.
        """
        if not self._caching:
            return
        if any(self._references[block] == 0 for block in blocks):
            raise ProtocolError("a block that nobody refers to cannot be published")
        for node in self._tree.insert(token_ids, blocks):
            self._note(node.chain_hash, self._stored, self._removed)

    def withdraw(self, block: BlockId) -> bool:
        """Takes a block with one reference out of the prefix cache; whether its owner may write it now.

        What extends its prefix goes too, though it stays with those who refer to it.
        """
        if self._references[block] == 1 and block in self._tree:
            self._uncache(block)
        return self.private(block)

    def drain_events(self) -> CacheDelta:
        """Takes the net changes since the last call; their number is bounded by twice the pool's size."""
        delta = CacheDelta(self._next_event, tuple(self._stored), tuple(self._removed))
        self._next_event += len(delta.stored) + len(delta.removed)
        self._stored.clear()
        self._removed.clear()
        return delta

    def snapshot(self) -> CacheDelta:
        """The whole cache as of the last drain_events, numbered so that the next delta follows at once."""
        hashes = [node.chain_hash for node in self._tree.nodes()]
        kept = [chain_hash for chain_hash in hashes if chain_hash not in self._stored]
        stored = (*kept, *self._removed)
        return CacheDelta(self._next_event - len(stored), stored, ())

    def check_integrity(self, owned: Iterable[Sequence[BlockId]]) -> None:
        """Raises ProtocolError unless the owners' tables explain every reference and each block once."""
        held = Counter(block for table in owned for block in table)
        for index, count in enumerate(self._references):
            if held[BlockId(index)] != count:
                raise ProtocolError(f"block {index}: pool counts {count}, owners hold {held[BlockId(index)]}")
        unreferenced = {block for block in self._own if self._references[block] == 0}
        free, evictable = set(self._free), set(self._evictable)
        if len(free) != len(self._free) or free & evictable or free | evictable != unreferenced:
            raise ProtocolError("free and evictable blocks are not exactly the unreferenced ones")
        cached = {node.block for node in self._tree.nodes()}
        if free & cached or evictable - cached:
            raise ProtocolError("a free block is cached, or an evictable one is not")

    def _name(self, count: int) -> tuple[BlockId, ...]:
        """Takes free blocks, the last freed first."""
        if count == 0:
            return ()
        blocks = tuple(self._free[: -count - 1 : -1])
        del self._free[-count:]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _evict(self) -> None:
        self._uncache(next(iter(self._evictable)))

    def _uncache(self, block: BlockId) -> None:
        """Takes a block out of the prefix cache, and all that extend its prefix."""
        for node in self._tree.remove(block):
            self._note(node.chain_hash, self._removed, self._stored)
            # A node below may be referenced still, by who computed the prefix in blocks of its own.
            if node.block in self._evictable:
                del self._evictable[node.block]
                self._free.append(node.block)

    @staticmethod
    def _note(chain_hash: BlockHash, happened: dict[BlockHash, None], undone: dict[BlockHash, None]) -> None:
        if chain_hash in undone:
            del undone[chain_hash]
        else:
            happened[chain_hash] = None
