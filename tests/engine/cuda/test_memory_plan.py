"""The KV pool gets what the model, its peak and the graphs leave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda.memory_plan import GRAPH_BYTES, DeviceMemory, bucket_for, graph_buckets, kv_blocks
from tandem.errors import ConfigError

GIB = 1024**3


def test_an_h200_with_an_eight_billion_model() -> None:
    """139 GiB, 16 GiB of weights, 4 GiB of peak, nine tenths used: what is left in blocks of 2 MiB."""
    memory = DeviceMemory(total=139 * GIB, free_with_weights=123 * GIB, activation_peak=4 * GIB)
    blocks = kv_blocks(memory, 2 * 1024**2, share=0.9, least_blocks=512)
    left = int(139 * GIB * 0.9) - 16 * GIB - 4 * GIB - GRAPH_BYTES
    assert left - 2 * 2 * 1024**2 < blocks * 2 * 1024**2 <= left - 2 * 1024**2


def test_too_small_a_device_is_refused_with_what_is_missing() -> None:
    memory = DeviceMemory(total=16 * GIB, free_with_weights=2 * GIB, activation_peak=GIB)
    with pytest.raises(ConfigError, match="bytes are missing"):
        kv_blocks(memory, 2 * 1024**2, share=0.9, least_blocks=64)


@given(max_batch=st.integers(1, 300), batch=st.integers(1, 400))
def test_every_batch_up_to_the_largest_has_the_smallest_bucket_that_holds_it(
    max_batch: int, batch: int
) -> None:
    buckets = graph_buckets(max_batch)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == max_batch
    found = bucket_for(batch, buckets)
    assert found == min((size for size in buckets if size >= batch), default=None)
