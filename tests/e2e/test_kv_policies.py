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
        assert "digest" in dropped.leg_dropped.message
