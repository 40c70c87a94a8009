"""Hand-offs that begin while the prompt is read: what both workers' Attach streams promise."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtransfer.handoffs.pieces
from engine.contract import LayerListener
from engine.step import StepPlan, StepResult
from engine.torch_runner import TorchStepRunner
from prefill_worker.service import PrefillWorker
from tandem.sampling import SamplingParams
from tandem.v1 import worker_pb2 as wpb
from tests.e2e.test_worker_pair import GREEDY, PROMPT, _reference
from tests.e2e.worker_pair import (
    WAIT_S,
    Pair,
    prefetch_kv,
    save_tiny_model,
    start_decode,
    start_prefill,
    worker_pair,
)

LONG = [*PROMPT, *PROMPT, *PROMPT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's KV is far below what is worth a piece of its own."""
    monkeypatch.setattr(kvtransfer.handoffs.pieces, "MIN_PIECE_BYTES", 1)


@pytest.fixture
def last_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Steps that draw a prompt's first token wait for this event."""
    gate = threading.Event()
    run = TorchStepRunner.run

    def gated(self: TorchStepRunner, plan: StepPlan, on_layers: LayerListener | None = None) -> StepResult:
        if any(part.samples and len(part.token_ids) > 1 for part in plan.slices):
            gate.wait(WAIT_S)
        return run(self, plan, on_layers)

    monkeypatch.setattr(TorchStepRunner, "run", gated)
    yield gate
    gate.set()


async def _offer(pair: Pair, params: SamplingParams = GREEDY) -> None:
    """Begins to read the long prompt, and to pull its KV."""
    await pair.prefill.send(start_prefill(LONG, params))
    (offer,) = await pair.prefill.until("kv_offered")
    assert offer.kv_offered.growing
    assert offer.kv_offered.kv_tokens == len(LONG)
    await pair.decode.send(prefetch_kv(pair, LONG))


def _in_flight(pair: Pair) -> int:
    worker = pair.prefill.worker
    assert isinstance(worker, PrefillWorker)
    return worker.handoffs_in_flight()


async def _pulled(pair: Pair) -> None:
    """Waits until the source's blocks are under a lease."""
    async with asyncio.timeout(WAIT_S):
        while not _in_flight(pair):
            await asyncio.sleep(0.01)


async def _first_token(pair: Pair) -> int:
    """The second offer comes with the first token, for the same hand-off."""
    first, second = await pair.prefill.until("kv_offered", count=2)
    assert not second.kv_offered.growing
    assert second.kv_offered.epoch == first.kv_offered.epoch
    return pair.prefill.tokens()[0][0][0]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_pull_begins_before_the_prompt_is_read_and_changes_no_token(
    folder: Path, transport: str, last_step: threading.Event
) -> None:
    async with worker_pair(folder, transport, overlap_min_tokens=16) as pair:
        await _offer(pair)
        await _pulled(pair)
        assert pair.prefill.tokens() == ({}, 0), "the last step has not begun"
        last_step.set()
        first = await _first_token(pair)
        await pair.decode.send(start_decode(pair, LONG, {0: first}, GREEDY))
        rest = await pair.decode.until_finished(1)
        assert [first, *rest[0]] == _reference(folder, LONG, 12)
        (landed,) = await pair.decode.until("kv_landed")
        assert landed.kv_landed.transport == transport
        await pair.settled()


async def test_kv_that_is_there_before_the_leg_is_started_waits_for_it(folder: Path) -> None:
    async with worker_pair(folder, "shm", overlap_min_tokens=16) as pair:
        await _offer(pair)
        first = await _first_token(pair)
        async with asyncio.timeout(WAIT_S):
            while not pair.prefill.worker.handoffs_committed():
                await asyncio.sleep(0.01)
        await pair.decode.send(start_decode(pair, LONG, {0: first}, GREEDY))
        rest = await pair.decode.until_finished(1)
        assert [first, *rest[0]] == _reference(folder, LONG, 12)
        await pair.settled()


async def test_cancel_in_the_middle_frees_both_sides(folder: Path, last_step: threading.Event) -> None:
    async with worker_pair(folder, "tcp", overlap_min_tokens=16) as pair:
        await _offer(pair)
        await _pulled(pair)
        for hand in (pair.prefill, pair.decode):
            await hand.send(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id="leg")))
        last_step.set()
        await pair.settled()
        for hand in (pair.prefill, pair.decode):
            assert not [m for m in hand.news if m.WhichOneof("body") in ("leg_dropped", "prefetch_lost")]


async def test_a_prompt_that_ends_with_its_first_token_takes_its_offer_back(
    folder: Path, last_step: threading.Event
) -> None:
    ends = SamplingParams(temperature=0.0, stop_token_ids=(_reference(folder, LONG, 1)[0],))
    async with worker_pair(folder, "tcp", overlap_min_tokens=16) as pair:
        await _offer(pair, ends)
        await _pulled(pair)
        last_step.set()
        await pair.prefill.until_finished(1)
        await pair.decode.send(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id="leg")))
        await pair.settled()


async def test_a_leg_whose_early_fetch_fails_is_started_as_any_other(
    folder: Path, last_step: threading.Event
) -> None:
    async with worker_pair(folder, "shm", overlap_min_tokens=16) as pair:
        await pair.prefill.send(start_prefill(LONG, GREEDY))
        await pair.prefill.until("kv_offered")
        await pair.decode.send(prefetch_kv(pair, LONG, epoch=7))
        (lost,) = await pair.decode.until("prefetch_lost")
        assert lost.prefetch_lost.leg_id == "leg"
        assert not [m for m in pair.decode.news if m.WhichOneof("body") == "leg_dropped"]
        last_step.set()
        first = await _first_token(pair)
        await pair.decode.send(start_decode(pair, LONG, {0: first}, GREEDY))
        rest = await pair.decode.until_finished(1)
        assert [first, *rest[0]] == _reference(folder, LONG, 12)
        await pair.settled()


async def test_a_drained_decode_worker_gives_an_early_fetch_up_and_the_prompt_is_read_on(
    folder: Path, last_step: threading.Event
) -> None:
    async with worker_pair(folder, "tcp", overlap_min_tokens=16) as pair:
        await _offer(pair)
        await _pulled(pair)
        await pair.decode.worker.drain(0.0)
        (lost,) = await pair.decode.until("prefetch_lost")
        assert lost.prefetch_lost.leg_id == "leg"
        async with asyncio.timeout(WAIT_S):
            while _in_flight(pair):
                await asyncio.sleep(0.01)
        last_step.set()
        first_offer, second = await pair.prefill.until("kv_offered", count=2)
        assert second.kv_offered.epoch == first_offer.kv_offered.epoch + 1
        for hand in (pair.prefill, pair.decode):
            assert not [m for m in hand.news if m.WhichOneof("body") == "leg_dropped"]
        await pair.prefill.send(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id="leg")))
        await pair.settled()


async def test_an_offer_that_is_lost_is_made_anew_when_the_prompt_is_read(
    folder: Path, last_step: threading.Event
) -> None:
    async with worker_pair(folder, "shm", overlap_min_tokens=16) as pair:
        await _offer(pair)
        await _pulled(pair)
        await pair.decode.send(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id="leg")))
        async with asyncio.timeout(WAIT_S):
            while _in_flight(pair):
                await asyncio.sleep(0.01)
        last_step.set()
        first_offer, second = await pair.prefill.until("kv_offered", count=2)
        assert second.kv_offered.epoch == first_offer.kv_offered.epoch + 1
        first = pair.prefill.tokens()[0][0][0]
        await pair.decode.send(start_decode(pair, LONG, {0: first}, GREEDY, epoch=second.kv_offered.epoch))
        rest = await pair.decode.until_finished(1)
        assert [first, *rest[0]] == _reference(folder, LONG, 12)
        await pair.settled()


async def test_a_leg_that_waits_goes_on_when_an_early_fetch_is_given_up(folder: Path) -> None:
    """The fetch had landed, so that no pull ends and no step is done that would look for room."""
    other = [token + 1 for token in LONG]
    async with worker_pair(folder, "shm", overlap_min_tokens=16, pool_blocks=24) as pair:
        await pair.prefill.send(start_prefill(LONG, GREEDY))
        await pair.prefill.until("kv_offered")
        await pair.decode.send(prefetch_kv(pair, LONG, remaining_s=2.0))
        async with asyncio.timeout(WAIT_S):
            while not pair.prefill.worker.handoffs_committed():
                await asyncio.sleep(0.01)
        await pair.prefill.send(start_prefill(other, GREEDY, leg_id="other"))
        await pair.prefill.until("kv_offered", count=4)
        entries = [entry for message in pair.prefill.news for entry in message.step.sequences]
        first = next(entry.token_ids[0] for entry in entries if entry.leg_id == "other")
        await pair.decode.send(start_decode(pair, other, {0: first}, GREEDY, leg_id="other"))
        (lost,) = await pair.decode.until("prefetch_lost")
        assert lost.prefetch_lost.leg_id == "leg"
        rest = await pair.decode.until_finished(1)
        assert [first, *rest[0]] == _reference(folder, other, 12)
        await pair.settled()
