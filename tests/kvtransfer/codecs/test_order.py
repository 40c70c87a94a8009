"""A growing offer is encoded as it grows: whole blocks first, then the last ones layer by layer."""

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.codecs.order import next_batch, with_batch
from kvtransfer.contract import BlockRange, KvReady

LAYERS = 4
NOTHING = KvReady(0, 0)
MANY = 1 << 20


def test_offer_that_is_whole_is_encoded_block_by_block() -> None:
    assert next_batch(KvReady(6, LAYERS), NOTHING, 6, LAYERS, 2 * LAYERS) == BlockRange(0, 2)
    assert with_batch(KvReady(4, 0), BlockRange(4, 2), 6, LAYERS) == KvReady(6, LAYERS)


def test_last_chunk_is_encoded_layer_by_layer_as_its_layers_get_ready() -> None:
    encoded = KvReady(2, 0)
    assert next_batch(KvReady(2, 0), encoded, 6, LAYERS, MANY) is None
    batch = next_batch(KvReady(2, 3), encoded, 6, LAYERS, MANY)
    assert batch == BlockRange(2, 4, 0, 3)
    encoded = with_batch(encoded, batch, 6, LAYERS)
    assert encoded == KvReady(2, 3)
    assert next_batch(KvReady(2, 3), encoded, 6, LAYERS, MANY) is None
    batch = next_batch(KvReady(6, LAYERS), encoded, 6, LAYERS, MANY)
    assert batch == BlockRange(2, 4, 3, 1)
    assert with_batch(encoded, batch, 6, LAYERS) == KvReady(6, LAYERS)


def test_blocks_that_got_whole_are_encoded_before_layers_of_the_others() -> None:
    assert next_batch(KvReady(4, 2), KvReady(2, 0), 6, LAYERS, MANY) == BlockRange(2, 2)


def test_layer_of_many_blocks_is_one_batch_at_least() -> None:
    assert next_batch(KvReady(0, 3), NOTHING, 100, LAYERS, 10) == BlockRange(0, 100, 0, 1)


@given(
    num_blocks=st.integers(1, 9),
    layers=st.integers(1, 5),
    most_parts=st.integers(1, 20),
    growth=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), max_size=8),
)
def test_every_part_is_encoded_once_and_never_before_it_is_ready(
    num_blocks: int, layers: int, most_parts: int, growth: list[tuple[int, int, int]]
) -> None:
    """`growth`: more blocks, more layers, and how many batches are encoded before it grows again."""
    done: set[tuple[int, int]] = set()
    encoded, ready = NOTHING, NOTHING
    final = (num_blocks, layers, num_blocks * layers + 1)
    for more_blocks, more_layers, batches in (*growth, final):
        ready = KvReady(min(num_blocks, ready.blocks + more_blocks), min(layers, ready.layers + more_layers))
        whole = ready.blocks == num_blocks or ready.layers == layers
        for _ in range(batches):
            batch = next_batch(ready, encoded, num_blocks, layers, most_parts)
            if batch is None:
                break
            held = range(batch.first_layer, batch.first_layer + (batch.num_layers or layers))
            for block in range(batch.first_block, batch.first_block + batch.num_blocks):
                for layer in held:
                    assert (block, layer) not in done
                    assert whole or block < ready.blocks or layer < ready.layers
                    done.add((block, layer))
            encoded = with_batch(encoded, batch, num_blocks, layers)
            promised = {
                (block, layer)
                for block in range(num_blocks)
                for layer in range(layers)
                if block < encoded.blocks or layer < encoded.layers
            }
            assert promised <= done
    assert encoded == KvReady(num_blocks, layers)
    assert len(done) == num_blocks * layers
