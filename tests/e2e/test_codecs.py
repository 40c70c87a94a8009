"""Two real workers and each wire codec between them: requests complete, and fewer bytes move."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.kv.kv_cache import KvCache
from engine.models.model_config import read_model_config
from kvtransfer.codecs.contract import BlockShape
from kvtransfer.codecs.registry import codec_named
from kvtransfer.codecs.thresholds import calibrate
from tandem.sampling import SamplingParams
from tests.e2e.worker_pair import save_tiny_model, start_decode, start_prefill, worker_pair

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71]
BLOCK_SIZE = 4
BLOCKS = -(-len(PROMPT) // BLOCK_SIZE)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shape(folder: Path) -> BlockShape:
    """Of the workers' blocks."""
    with KvCache(read_model_config(folder), 1, BLOCK_SIZE, torch.float32, torch.device("cpu")) as cache:
        return BlockShape.of_pool(cache.pool)


@pytest.fixture(scope="module")
def thresholds(tmp_path_factory: pytest.TempPathFactory, shape: BlockShape) -> Path:
    """For oaken; of random numbers, as the model's weights are."""
    file = tmp_path_factory.mktemp("thresholds") / "thresholds.json"
    numbers = torch.randn((64, *shape.dimensions), generator=torch.Generator().manual_seed(1))
    calibrate(numbers, shape).save(file)
    return file


async def answer(
    folder: Path, transport: str, codec: str, thresholds: Path | None = None
) -> tuple[list[int], int]:
    """The tokens of a greedy request, and the bytes of its KV that moved."""
    settings: dict[str, object] = {"codec": codec, "codec_thresholds": thresholds}
    async with worker_pair(folder, transport, both=settings) as pair:
        await pair.prefill.send(start_prefill(PROMPT, GREEDY))
        await pair.prefill.until("kv_offered")
        firsts = {sample: tokens[0] for sample, tokens in pair.prefill.tokens()[0].items()}
        await pair.decode.send(start_decode(pair, PROMPT, firsts, GREEDY))
        rest = await pair.decode.until_finished(1)
        (landed,) = await pair.decode.until("kv_landed")
        await pair.settled()
        assert landed.kv_landed.transport == transport
        return [firsts[0], *rest[0]], landed.kv_landed.moved_bytes


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("codec", ["fp8", "int8", "oaken"])
async def test_request_completes_over_a_codec_and_fewer_bytes_move(
    folder: Path,
    shape: BlockShape,
    thresholds: Path,
    codec: str,
    transport: str,
    record_property: Callable[[str, object], None],
) -> None:
    exact, whole_bytes = await answer(folder, transport, "identity")
    file = thresholds if codec == "oaken" else None
    tokens, moved_bytes = await answer(folder, transport, codec, file)
    assert len(tokens) == len(exact) == GREEDY.max_tokens
    assert tokens[0] == exact[0]
    assert whole_bytes == BLOCKS * shape.block_bytes
    assert moved_bytes == BLOCKS * codec_named(codec, shape, file).encoded_bytes < whole_bytes / 2
    same = sum(ours == theirs for ours, theirs in zip(tokens, exact, strict=True))
    record_property("same_greedy_tokens", f"{same} of {len(exact)}")
