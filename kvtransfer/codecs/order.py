"""Pure: in which order the blocks of a growing offer are encoded: by whole blocks, at the end by layers."""

from kvtransfer.contract import BlockRange, KvReady
from kvtransfer.handoffs.pieces import complete


def next_batch(
    ready: KvReady, encoded: KvReady, num_blocks: int, layers: int, most_parts: int
) -> BlockRange | None:
    """What of an offer to encode next; None when all that is ready is encoded.

    About `most_parts` layers of blocks at most. As long as no layers were encoded in all the blocks that are
    left, blocks are encoded whole, in their order; then those that are left, layer by layer.
    """
    left = num_blocks - encoded.blocks
    everything = complete(ready, num_blocks, layers)
    blocks = left if everything else ready.blocks - encoded.blocks
    if encoded.layers == 0 and blocks > 0:
        return BlockRange(encoded.blocks, min(blocks, max(1, most_parts // layers)))
    further = (layers if everything else ready.layers) - encoded.layers
    if left and further > 0:
        return BlockRange(encoded.blocks, left, encoded.layers, min(further, max(1, most_parts // left)))
    return None


def with_batch(encoded: KvReady, batch: BlockRange, num_blocks: int, layers: int) -> KvReady:
    """How far the encoding is once a batch that `next_batch` gave is done."""
    whole = batch.num_layers == 0
    after = KvReady(
        encoded.blocks + batch.num_blocks if whole else encoded.blocks,
        encoded.layers if whole else batch.first_layer + batch.num_layers,
    )
    return KvReady(num_blocks, layers) if complete(after, num_blocks, layers) else after
