"""The KV pool is one contiguous shared memory in which block i lies at i * block_bytes."""

import mmap
import os

import pytest
import torch

from engine.kv.kv_cache import KvCache
from engine.models.model_config import ModelConfig, RopeConfig
from kvtransfer.contract import BlockMemory
from tandem.errors import ModelError
from tandem.ids import BlockId

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocabulary_tokens=10,
    hidden_size=8,
    intermediate_size=8,
    layers=3,
    heads=2,
    kv_heads=2,
    head_dim=4,
    norm_eps=1e-6,
    rope=RopeConfig(10000.0),
    context_tokens=64,
    tied_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None, None, None),
    eos_ids=(),
)


def make(dtype: torch.dtype = torch.float32, num_blocks: int = 6) -> KvCache:
    return KvCache(CONFIG, num_blocks, 4, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_the_bytes_of_the_tensor(dtype: torch.dtype) -> None:
    with make(dtype) as cache:
        memory: BlockMemory = cache
        assert tuple(cache.pool.shape) == (6, 3, 2, 4, 2, 4)
        assert memory.block_bytes == 3 * 2 * 4 * 2 * 4 * dtype.itemsize
        cache.pool.copy_(torch.arange(cache.pool.numel()).view(cache.pool.shape))
        expected = cache.pool[4].clone().view(torch.uint8).numpy().tobytes()
        assert bytes(memory.view(BlockId(4))) == expected
        memory.view(BlockId(5))[:] = memory.view(BlockId(4))
        assert torch.equal(cache.pool[5], cache.pool[4])


def test_another_mapping_of_the_descriptor_sees_every_block() -> None:
    with make() as cache:
        descriptor = cache.fileno()
        assert descriptor is not None
        cache.pool[3].fill_(2.5)
        with mmap.mmap(os.dup(descriptor), 6 * cache.block_bytes, prot=mmap.PROT_READ) as other:
            start = 3 * cache.block_bytes
            assert other[start : start + cache.block_bytes] == bytes(cache.view(BlockId(3)))


def test_a_peer_cannot_shrink_the_pool_under_its_owner() -> None:
    with make() as cache:
        descriptor = cache.fileno()
        assert descriptor is not None
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)


def test_copies_are_made_in_order() -> None:
    with make() as cache:
        cache.pool[0].fill_(1.0)
        cache.pool[1].fill_(2.0)
        cache.copy_blocks([(BlockId(0), BlockId(2)), (BlockId(2), BlockId(3)), (BlockId(1), BlockId(0))])
        assert [float(cache.pool[block].max()) for block in range(4)] == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("block", [-1, 6])
def test_no_view_outside_the_pool(block: int) -> None:
    with make() as cache, pytest.raises(IndexError):
        cache.view(BlockId(block))


def test_closing_returns_the_descriptor_and_is_idempotent() -> None:
    cache = make()
    descriptor = cache.fileno()
    assert descriptor is not None
    cache.close()
    cache.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(ModelError, match="closed"):
        _ = cache.pool


def test_closing_while_a_view_is_held_keeps_its_bytes_readable() -> None:
    cache = make()
    cache.pool[1].fill_(1.0)
    view = cache.view(BlockId(1))
    cache.close()
    assert view[3] == 0x3F


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ModelError, match="0 blocks"):
        make(num_blocks=0)
