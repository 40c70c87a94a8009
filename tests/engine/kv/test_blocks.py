"""The block pool: sharing, copy-on-write, the prefix cache, its events, and what it refuses."""

import pytest
import xxhash

import engine.kv.prefix_tree
from engine.kv.block_hash import chain_hashes
from engine.kv.blocks import BlockPool, distinct_blocks
from tandem.errors import OutOfBlocks, ProtocolError
from tandem.ids import BlockHash, BlockId

FIRST = [1, 2, 3, 4]
SECOND = [5, 6, 7, 8]


def cached_pool(tokens: list[int], num_blocks: int = 4) -> tuple[BlockPool, tuple[BlockId, ...]]:
    """A pool of blocks of 4 tokens whose cache holds the full blocks of `tokens`, unreferenced."""
    pool = BlockPool(num_blocks, 4)
    blocks = pool.allocate(len(tokens) // 4)
    pool.publish(tokens, blocks)
    pool.release(blocks)
    return pool, blocks


def test_chain_hash_is_xxh3_128_of_parent_and_little_endian_tokens() -> None:
    first = xxhash.xxh3_128_digest(bytes(16) + b"\x01\0\0\0\x02\0\0\0")
    second = xxhash.xxh3_128_digest(first + b"\x03\0\0\0\xff\xff\xff\xff")
    assert chain_hashes([1, 2, 3, 2**32 - 1, 9], 2) == [first, second]
    assert chain_hashes([1], 2) == []


def test_allocation_beyond_the_pool_allocates_nothing() -> None:
    pool = BlockPool(3, 4)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    assert pool.free_blocks == 1
    assert pool.allocated_blocks == 2


def test_block_is_free_only_after_its_last_release() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.fork(blocks)
    pool.release(blocks)
    assert pool.allocated_blocks == 1
    pool.release(blocks)
    assert pool.free_blocks == 2
    with pytest.raises(ProtocolError):
        pool.release(blocks)


def test_free_block_cannot_be_shared_or_published() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(ProtocolError):
        pool.fork([BlockId(0)])
    with pytest.raises(ProtocolError):
        pool.publish(FIRST, [BlockId(0)])


def test_match_gives_the_longest_cached_prefix_but_leaves_a_token_to_compute() -> None:
    pool, blocks = cached_pool(FIRST + SECOND)
    assert pool.match(FIRST + SECOND) == blocks[:1]
    assert pool.match(FIRST + SECOND, whole=True) == blocks
    assert pool.match([*FIRST, *SECOND, 9]) == blocks
    assert pool.match([*FIRST, 5, 6, 7, 9, 9]) == blocks[:1]
    assert pool.match([0, 2, 3, 4, 9]) == ()
    assert pool.references(blocks[0]) == 4


def test_hash_collision_never_gives_other_tokens_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.kv.prefix_tree, "extend_hash", lambda parent, tokens: BlockHash(b"same" * 4))
    pool, blocks = cached_pool(FIRST + SECOND)
    assert pool.match([*SECOND, *SECOND, 9]) == ()
    assert pool.match([*FIRST, *FIRST, 9]) == blocks[:1]


def test_without_prefix_cache_nothing_is_matched_or_kept() -> None:
    pool = BlockPool(2, 4, prefix_cache=False)
    blocks = pool.allocate(1)
    pool.publish(FIRST, blocks)
    pool.release(blocks)
    assert pool.match([*FIRST, 9]) == ()
    assert pool.drain_events().stored == ()


def test_least_recently_used_prefix_is_evicted_first_and_its_end_before_its_start() -> None:
    pool, old = cached_pool(FIRST + SECOND)
    other = [9, 9, 9, 9]
    young = pool.allocate(1)
    pool.publish(other, young)
    pool.release(young)
    pool.allocate(2)
    assert pool.match([*FIRST, *SECOND, 9]) == old[:1]
    assert pool.match([*other, 9]) == young


def test_use_makes_a_prefix_young_again() -> None:
    pool, old = cached_pool(FIRST, num_blocks=2)
    young = pool.allocate(1)
    pool.publish(SECOND, young)
    pool.release(young)
    pool.release(pool.match([*FIRST, 9]))
    pool.allocate(1)
    assert pool.match([*FIRST, 9]) == old
    assert pool.match([*SECOND, 9]) == ()


def test_evicting_a_prefix_forgets_what_extends_it() -> None:
    pool, (cached, *_) = cached_pool(FIRST, num_blocks=3)
    own = pool.allocate(2)
    pool.publish(FIRST + SECOND, own)
    assert set(pool.drain_events().stored) == set(chain_hashes(FIRST + SECOND, 4))
    assert pool.allocate(1) == (cached,)
    assert pool.match([*FIRST, *SECOND, 9]) == ()
    assert set(pool.drain_events().removed) == set(chain_hashes(FIRST + SECOND, 4))
    pool.release(own)
    pool.check_integrity([[cached]])
    assert pool.free_blocks == 2


def test_same_prefix_computed_twice_is_cached_once() -> None:
    pool, (cached, *_) = cached_pool(FIRST)
    own = pool.allocate(1)
    pool.publish(FIRST, own)
    pool.release(own)
    assert pool.match([*FIRST, 9]) == (cached,)
    assert pool.drain_events().stored == tuple(chain_hashes(FIRST, 4))


def test_shared_or_cached_block_is_copied_before_it_is_written() -> None:
    pool = BlockPool(4, 4)
    (own,) = pool.allocate(1)
    assert pool.writable(own) == (own, None)
    pool.fork([own])
    copy, pair = pool.writable(own)
    assert copy != own
    assert pair == (own, copy)
    assert pool.references(own) == 2
    (published,) = pool.allocate(1)
    pool.publish(FIRST, [published])
    assert pool.writable(published)[1] is not None


def test_events_are_net_changes_numbered_without_gaps() -> None:
    pool, _ = cached_pool(FIRST + SECOND)
    stored = pool.drain_events()
    assert set(stored.stored) == set(chain_hashes(FIRST + SECOND, 4))
    taken = pool.allocate(4)
    pool.publish(FIRST, taken)
    removed = pool.drain_events()
    assert removed.first_event == stored.first_event + 2
    assert removed.removed == (chain_hashes(FIRST + SECOND, 4)[1],)
    assert removed.stored == ()


def test_snapshot_is_followed_by_the_next_delta_without_a_gap() -> None:
    pool, _ = cached_pool(FIRST + SECOND)
    pool.drain_events()
    pool.allocate(3)
    snapshot = pool.snapshot()
    assert snapshot.first_event >= 0
    assert set(snapshot.stored) == set(chain_hashes(FIRST + SECOND, 4))
    delta = pool.drain_events()
    assert delta.first_event == snapshot.first_event + len(snapshot.stored)
    assert set(snapshot.stored) - set(delta.removed) == {chain_hashes(FIRST, 4)[0]}


def test_integrity_check_finds_a_leak_and_a_forgotten_owner() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    pool.check_integrity([blocks])
    with pytest.raises(ProtocolError):
        pool.check_integrity([blocks[:1]])
    with pytest.raises(ProtocolError):
        pool.check_integrity([blocks, blocks[:1]])
    assert pool.allocated_blocks - distinct_blocks([blocks[:1]]) == 1


def test_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        BlockPool(0, 16)


def test_promised_blocks_are_counted_before_they_are_named() -> None:
    pool = BlockPool(4, 4)
    pool.promise(3)
    assert (pool.free_blocks, pool.allocated_blocks, pool.promised_blocks) == (1, 3, 3)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.promise(2)
    named = pool.redeem(2)
    assert [pool.references(block) for block in named] == [1, 1]
    assert (pool.free_blocks, pool.promised_blocks) == (1, 1)


def test_more_than_was_promised_cannot_be_redeemed() -> None:
    pool = BlockPool(4, 4)
    pool.promise(1)
    with pytest.raises(ProtocolError):
        pool.redeem(2)


def test_a_promise_evicts_cached_blocks_at_once() -> None:
    pool, _ = cached_pool([*FIRST, *SECOND], num_blocks=2)
    pool.promise(1)
    assert pool.match([*FIRST, *SECOND, 9]) == pool.match([*FIRST, 9])
    assert pool.free_blocks == 0


def test_blocks_that_leave_are_replaced_by_those_that_come() -> None:
    pool = BlockPool(3, 4, False, [BlockId(4), BlockId(5), BlockId(6)], below=8)
    first, second = pool.allocate(2)
    pool.exchange([(first, BlockId(0)), (second, BlockId(7))])
    pool.check_integrity([[BlockId(0), BlockId(7)]])
    pool.release([BlockId(0), BlockId(7)])
    assert {*pool.allocate(3)} == {0, 7, 6}


def test_shared_cached_and_free_blocks_do_not_leave() -> None:
    pool, cached = cached_pool(FIRST)
    (shared,) = pool.allocate(1)
    pool.fork([shared])
    pool.match(FIRST, whole=True)
    free = next(BlockId(block) for block in range(4) if not pool.references(BlockId(block)))
    for block in (shared, cached[0], free):
        with pytest.raises(ProtocolError):
            pool.exchange([(block, BlockId(9))])


def test_block_of_the_pool_does_not_come_again() -> None:
    pool = BlockPool(2, 4, below=4)
    first, second = pool.allocate(2)
    with pytest.raises(ProtocolError):
        pool.exchange([(first, second)])
    pool.check_integrity([[first, second]])
