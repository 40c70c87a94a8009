"""Pure: the blocks of one sample in the batch: for its next slice, for guesses, and after a step."""

from decode_worker.decode_leg import SampleRecord
from engine.drafting.draft import Draft
from engine.kv.blocks import BlockPool


def grow(pool: BlockPool, sample: SampleRecord, chunk_tokens: int, dropped: int = 0) -> None:
    """Makes the blocks of the sample's next slice its own; after OutOfBlocks it can be called again.

    KV of `dropped` of its tokens is there no more, so that the others lie so many slots before.
    """
    size, held = pool.block_size, sample.computed - dropped
    sample.slice_tokens = min(len(sample.tokens) - sample.computed, chunk_tokens)
    if held % size and sample.pending_copy is None:
        index = held // size
        sample.table[index], sample.pending_copy = pool.writable(sample.table[index])
    _cover(pool, sample, held + sample.slice_tokens)


def add_draft(pool: BlockPool, sample: SampleRecord, draft: Draft, keep_free: int) -> None:
    """Lets the sample's next slice end with guesses: as many as fit without the last `keep_free` blocks."""
    fed = sample.computed + sample.slice_tokens
    spare = max(pool.free_blocks - keep_free, 0)
    sample.draft = draft.first((len(sample.table) + spare) * pool.block_size - fed)
    _cover(pool, sample, fed + len(sample.draft))


def settle(pool: BlockPool, sample: SampleRecord) -> None:
    """The step is done: its tokens have KV, and the source of a copy is needed no more."""
    sample.computed += sample.slice_tokens
    sample.slice_tokens = 0
    if sample.pending_copy is not None:
        pool.release(sample.pending_copy[:1])
        sample.pending_copy = None


def trim(pool: BlockPool, sample: SampleRecord) -> None:
    """Gives back the blocks that hold nothing but guesses which did not hold."""
    used = pool.blocks_for(sample.computed)
    pool.release(sample.table[used:])
    del sample.table[used:]


def _cover(pool: BlockPool, sample: SampleRecord, tokens: int) -> None:
    missing = pool.blocks_for(tokens) - len(sample.table)
    if missing > 0:
        sample.table += pool.allocate(missing)
