"""Two workers with other KV than all of it in the weights' type: hand-off, sharing and refusal hold."""

from pathlib import Path

import pytest

from engine.loading import load_engine
from engine.step import SampleRequest, SequenceSlice, StepPlan
from tandem.ids import BlockId
from tandem.sampling import SamplingParams
from tandem.v1 import worker_pb2 as wpb
from tandem.worker import Role
from tandem.worker_config import KvSelectionConfig, SpeculativeConfig
from tests.e2e.worker_pair import (
    VOCABULARY,
    Pair,
    save_tiny_model,
    start_decode,
    start_prefill,
    worker_config,
    worker_pair,
)

PROMPT = [(7 * place * place + 3) % VOCABULARY for place in range(45)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
QUEST = KvSelectionConfig("quest", pages=3)
MORPH = KvSelectionConfig("morph", budget_tokens=32, window_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def _alone(folder: Path, kv_dtype: str | None, selection: KvSelectionConfig | None) -> list[int]:
    """The tokens of one engine that reads the prompt in one step and writes one token a step."""
    config = worker_config(folder, Role.DECODE, kv_dtype=kv_dtype, kv_selection=selection)
    table = [BlockId(block) for block in range(30)]
    fed, start, written = PROMPT, 0, list[int]()
    with load_engine(config) as engine:
        while len(written) < 40:
            request = SampleRequest(0, 0, len(written), GREEDY)
            result = engine.runner.run(StepPlan(0, (SequenceSlice(fed, start, table, (request,)),)))
            start += len(fed)
            fed = [result.tokens[0].token_id]
            written += fed
    return written


async def _run(pair: Pair, samples: int) -> dict[int, list[int]]:
    await pair.prefill.send(start_prefill(PROMPT, GREEDY, tuple(range(samples))))
    await pair.prefill.until("kv_offered")
    firsts, _ = pair.prefill.tokens()
    start = start_decode(pair, PROMPT, {index: tokens[0] for index, tokens in firsts.items()}, GREEDY)
    await pair.decode.send(start)
    rest = await pair.decode.until_finished(samples)
    return {index: [*firsts[index], *rest[index]] for index in firsts}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("kv_dtype", "selection"),
    [("int8", None), (None, QUEST), ("int8", QUEST)],
    ids=["int8", "quest", "int8-quest"],
)
async def test_a_pair_writes_the_tokens_of_one_engine(
    folder: Path, transport: str, kv_dtype: str | None, selection: KvSelectionConfig | None
) -> None:
    expected = _alone(folder, kv_dtype, selection)
    async with worker_pair(folder, transport, kv_dtypes=(kv_dtype, kv_dtype), kv_selection=selection) as pair:
        assert await _run(pair, samples=3) == dict.fromkeys(range(3), expected)
        (landed,) = await pair.decode.until("kv_landed")
        assert landed.kv_landed.moved_bytes > 0
        await pair.settled()


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
async def test_samples_under_morph_write_all_their_tokens_in_bounded_blocks(
    folder: Path, kv_dtype: str | None
) -> None:
    """A window of tokens is that of full attention; then each sample has its budget, and the prompt goes."""
    full = _alone(folder, kv_dtype, None)
    async with worker_pair(folder, "shm", kv_dtypes=(kv_dtype, kv_dtype), kv_selection=MORPH) as pair:
        written = await _run(pair, samples=3)
        assert [len(tokens) for tokens in written.values()] == [40] * 3
        assert written[0] == written[1] == written[2], "greedy samples of one prompt"
        assert written[0][:9] == full[:9]
        await pair.settled()


async def test_morph_with_room_for_all_changes_no_token(folder: Path) -> None:
    roomy = KvSelectionConfig("morph", budget_tokens=96, window_tokens=8)
    async with worker_pair(folder, "shm", kv_selection=roomy) as pair:
        assert await _run(pair, samples=2) == dict.fromkeys(range(2), _alone(folder, None, None))
        await pair.settled()


async def test_blocks_beyond_the_budget_are_free_while_the_sample_runs(folder: Path) -> None:
    """The prompt took 12 blocks; a window later the sample has 8, and the others are there for anybody."""
    long = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    async with worker_pair(folder, "shm", kv_selection=MORPH) as pair:
        await pair.prefill.send(start_prefill(PROMPT, long))
        await pair.prefill.until("kv_offered")
        firsts, _ = pair.prefill.tokens()
        await pair.decode.send(start_decode(pair, PROMPT, {0: firsts[0][0]}, long))
        await pair.decode.until("step", MORPH.window_tokens + 2)
        load = pair.decode.worker.scheduler_load()
        assert load.running_sequences == 1
        assert load.allocated_blocks == load.referenced_blocks <= MORPH.budget_tokens // 4
        tokens = await pair.decode.until_finished(1)
        assert len(tokens[0]) == 149
        await pair.settled()


async def test_guesses_over_an_eight_bit_pool_change_no_token(folder: Path) -> None:
    speculative = SpeculativeConfig("ngram", tokens=4)
    async with worker_pair(folder, "shm", kv_dtypes=("int8", "int8"), speculative=speculative) as pair:
        assert await _run(pair, samples=1) == {0: _alone(folder, "int8", None)}
        await pair.settled()


@pytest.mark.parametrize("kv_dtypes", [("int8", None), (None, "int8")])
async def test_kv_that_is_stored_otherwise_is_not_taken(
    folder: Path, kv_dtypes: tuple[str | None, str | None]
) -> None:
    async with worker_pair(folder, "shm", kv_dtypes=kv_dtypes) as pair:
        await pair.prefill.send(start_prefill(PROMPT, GREEDY))
        await pair.prefill.until("kv_offered")
        await pair.decode.send(start_decode(pair, PROMPT, {0: 5}, GREEDY))
        (dropped,) = await pair.decode.until("leg_dropped")
        assert dropped.leg_dropped.reason == wpb.DROP_REASON_HANDOFF_FAILED
        assert "The sink has" in dropped.leg_dropped.message, "both digests are named"
