"""Two workers whose pools lie in one arena: KV changes owners, and the tokens are those of one model."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import kvtransfer.handoffs.pieces
from engine.worker_process.worker import Worker
from kvtransfer.shm.arena import Arena, arena_of
from tests.e2e.test_worker_pair import GREEDY, PROMPT, _reference, _run
from tests.e2e.worker_pair import Pair, prefetch_kv, save_tiny_model, start_decode, start_prefill, worker_pair

LONG = [*PROMPT, *PROMPT, *PROMPT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def path() -> Iterator[Path]:
    """Where an arena may be made."""
    with TemporaryDirectory(dir="/dev/shm") as shared:
        yield Path(shared) / "arena"


def _arena(worker: Worker[Any]) -> Arena:
    found = arena_of(worker._engine.cache)
    assert found is not None
    return found


def _account(pair: Pair) -> None:
    """Each worker owns in the arena what its pool counts, and nobody else does."""
    pools = []
    for worker in (pair.prefill.worker, pair.decode.worker):
        worker._pool.check_integrity([])
        pools.append({*_arena(worker).owned()})
        assert pools[-1] == worker._pool._own
        assert len(pools[-1]) == worker.load().total_blocks
    assert not pools[0] & pools[1]


@pytest.mark.parametrize("samples", [1, 3])
async def test_adopted_kv_gives_the_tokens_of_one_model(folder: Path, path: Path, samples: int) -> None:
    settings = {"kv_arena": path, "prefix_cache": False}
    async with worker_pair(folder, "shm", both=settings) as pair:
        before = {*_arena(pair.decode.worker).owned()}
        tokens = await _run(pair, PROMPT, GREEDY, samples)
        assert tokens == dict.fromkeys(range(samples), _reference(folder, PROMPT, 12))
        (landed,) = await pair.decode.until("kv_landed")
        assert landed.kv_landed.transport == "adopt"
        await pair.settled()
        _account(pair)
        # 21 tokens in blocks of 4.
        assert len({*_arena(pair.decode.worker).owned()} - before) == 6
    assert not list(path.parent.iterdir())


async def test_kv_that_is_fetched_while_the_prompt_is_read_can_be_adopted(
    folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvtransfer.handoffs.pieces, "MIN_PIECE_BYTES", 1)
    settings = {"kv_arena": path, "prefix_cache": False}
    async with worker_pair(folder, "shm", overlap_min_tokens=16, both=settings) as pair:
        for leg_id in ("first", "second"):
            await pair.prefill.send(start_prefill(LONG, GREEDY, leg_id=leg_id))
            offers = await pair.prefill.until("kv_offered", count=1 if leg_id == "first" else 3)
            assert offers[-1].kv_offered.growing
            await pair.decode.send(prefetch_kv(pair, LONG, leg_id=leg_id))
            await pair.prefill.until("kv_offered", count=2 if leg_id == "first" else 4)
            first = pair.prefill.tokens()[0][0][-1]
            await pair.decode.send(start_decode(pair, LONG, {0: first}, GREEDY, leg_id=leg_id))
            tokens = await pair.decode.until_finished(1 if leg_id == "first" else 2)
            assert [first, *tokens[0][-11:]] == _reference(folder, LONG, 12)
        assert {m.kv_landed.transport for m in await pair.decode.until("kv_landed", count=2)} == {"adopt"}
        await pair.settled()
        _account(pair)


@pytest.mark.parametrize("kept", ["by the prefix cache", "by a pool in no arena"])
async def test_what_cannot_be_adopted_is_copied(folder: Path, path: Path, kept: str) -> None:
    both: dict[str, object] = {"kv_arena": path, "prefix_cache": kept == "by the prefix cache"}
    decodes_in = path if both["prefix_cache"] else path.parent / "missing" / "arena"
    async with worker_pair(folder, "shm", both=both, kv_arena=decodes_in) as pair:
        tokens = await _run(pair, PROMPT, GREEDY, 1)
        assert tokens == {0: _reference(folder, PROMPT, 12)}
        (landed,) = await pair.decode.until("kv_landed")
        assert landed.kv_landed.transport == "shm"
        await pair.settled()
