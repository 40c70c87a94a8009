"""Prefill and decode workers without Ray, Redis and router: what their Attach streams promise."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
import torch
import transformers

from prefill_worker.scheduler import PrefillScheduler
from tandem import grpc_edge
from tandem.errors import ProtocolError
from tandem.ids import LegId
from tandem.sampling import SamplingParams
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.worker_config import SpeculativeConfig
from tests.e2e.worker_pair import WAIT_S, Pair, save_tiny_model, start_decode, start_prefill, worker_pair

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def _reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    make = transformers.AutoModelForCausalLM
    model = make.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


async def _run(pair: Pair, prompt: list[int], params: SamplingParams, samples: int) -> dict[int, list[int]]:
    await pair.prefill.send(start_prefill(prompt, params, tuple(range(samples))))
    (offer,) = await pair.prefill.until("kv_offered")
    firsts, _ = pair.prefill.tokens()
    assert pair.prefill.news.index(offer) > 0, "tokens come before the offer"
    start = start_decode(pair, prompt, {index: tokens[0] for index, tokens in firsts.items()}, params)
    await pair.decode.send(start)
    rest = await pair.decode.until_finished(samples)
    return {index: [*firsts[index], *rest[index]] for index in firsts}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("samples", [1, 3])
async def test_tokens_of_the_pair_are_those_of_one_model(folder: Path, transport: str, samples: int) -> None:
    async with worker_pair(folder, transport) as pair:
        tokens = await _run(pair, PROMPT, GREEDY, samples)
        assert tokens == dict.fromkeys(range(samples), _reference(folder, PROMPT, 12))
        (landed,) = await pair.decode.until("kv_landed")
        assert landed.kv_landed.transport == transport
        assert landed.kv_landed.moved_bytes > 0
        await pair.settled()


async def test_a_decode_worker_that_guesses_writes_the_same_tokens_in_fewer_steps(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    async with worker_pair(folder, "shm", speculative=SpeculativeConfig("ngram", tokens=4)) as pair:
        tokens = await _run(pair, PROMPT, params, samples=1)
        assert tokens == {0: _reference(folder, PROMPT, 80)}
        guessed = pair.decode.worker.metrics.registry.get_sample_value
        accepted = guessed("tandem_worker_guessed_tokens_total", {"outcome": "accepted"})
        assert accepted
        assert pair.decode.worker.load().steps == 79 - accepted
        await pair.settled()


async def test_a_sample_that_ends_with_its_first_token_is_never_handed_off(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1)
    async with worker_pair(folder, "shm") as pair:
        await pair.prefill.send(start_prefill(PROMPT, params))
        tokens = await pair.prefill.until_finished(1)
        assert tokens == {0: _reference(folder, PROMPT, 1)}
        await pair.settled()
        assert not [m for m in pair.prefill.news if m.WhichOneof("body") == "kv_offered"]


async def test_a_leg_that_waits_goes_on_when_the_one_before_it_expires(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    async with worker_pair(folder, "shm", max_batch=1) as pair:
        for leg_id in ("first", "second"):
            await pair.prefill.send(start_prefill(PROMPT, params, leg_id=leg_id))
        await pair.prefill.until("kv_offered", count=2)
        first = _reference(folder, PROMPT, 1)[0]
        start = start_decode(pair, PROMPT, {0: first}, params, leg_id="first")
        start.start_decode.remaining_s = 0.05
        await pair.decode.send(start)
        await pair.decode.send(start_decode(pair, PROMPT, {0: first}, params, leg_id="second"))
        (dropped,) = await pair.decode.until("leg_dropped")
        assert (dropped.leg_dropped.leg_id, dropped.leg_dropped.reason) == ("first", wpb.DROP_REASON_DEADLINE)
        landed = await pair.decode.until("kv_landed")
        if landed[-1].kv_landed.leg_id == "first":
            landed = await pair.decode.until("kv_landed", count=2)
        assert landed[-1].kv_landed.leg_id == "second"


async def test_a_worker_that_is_closed_in_the_middle_of_steps_ends_in_order(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    for _ in range(5):
        async with worker_pair(folder, "shm") as pair:
            await pair.prefill.send(start_prefill(PROMPT, params))
            await pair.prefill.until("kv_offered")
            firsts, _ = pair.prefill.tokens()
            await pair.decode.send(start_decode(pair, PROMPT, {0: firsts[0][0]}, params))
            await pair.decode.until("step", count=2)


async def test_cancel_frees_parked_kv_and_a_later_pull_is_refused(folder: Path) -> None:
    async with worker_pair(folder, "tcp") as pair:
        await pair.prefill.send(start_prefill(PROMPT, GREEDY))
        await pair.prefill.until("kv_offered")
        assert pair.prefill.worker.load().parked_legs == 1
        await pair.prefill.send(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id="leg")))
        await pair.settled()
        assert not [m for m in pair.prefill.news if m.WhichOneof("body") == "leg_dropped"]
        await pair.decode.send(start_decode(pair, PROMPT, {0: 5}, GREEDY))
        (dropped,) = await pair.decode.until("leg_dropped")
        assert dropped.leg_dropped.reason == wpb.DROP_REASON_HANDOFF_FAILED
        await pair.settled()


async def test_a_worker_whose_blocks_cannot_come_back_asks_to_be_started_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: PrefillScheduler, leg_id: LegId, _handed_over: bool = False) -> None:
        raise ProtocolError(f"The leg {leg_id} has no blocks.")

    async with worker_pair(folder, "shm") as pair:
        await pair.prefill.send(start_prefill(PROMPT, GREEDY))
        await pair.prefill.until("kv_offered")
        assert pair.prefill.worker.wedged() is None
        with monkeypatch.context() as broken:
            broken.setattr(PrefillScheduler, "release", refuse)
            await pair.prefill.send(wpb.RouterMessage(cancel=wpb.CancelLeg(leg_id="leg")))
            async with asyncio.timeout(WAIT_S):
                while pair.prefill.worker.wedged() is None:
                    await asyncio.sleep(0.01)


async def test_a_router_that_goes_away_takes_its_legs_with_it(folder: Path) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    async with worker_pair(folder, "shm") as pair:
        await pair.prefill.send(start_prefill(PROMPT, long))
        await pair.prefill.until("kv_offered")
        firsts, _ = pair.prefill.tokens()
        await pair.decode.send(start_decode(pair, PROMPT, {0: firsts[0][0]}, long))
        await pair.decode.until("step", count=3)
        await pair.prefill.send(start_prefill(PROMPT, long, leg_id="parked"))
        await pair.prefill.until("kv_offered", count=2)
        await pair.decode.detach()
        await pair.prefill.detach()
        await pair.settled()


async def test_a_decode_worker_without_room_gives_the_youngest_back(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    async with worker_pair(folder, "shm", pool_blocks=32) as pair:
        for leg_id in ("old", "young"):
            await pair.prefill.send(start_prefill(PROMPT, params, leg_id=leg_id))
        await pair.prefill.until("kv_offered", count=2)
        first = _reference(folder, PROMPT, 1)[0]
        for leg_id in ("old", "young"):
            await pair.decode.send(start_decode(pair, PROMPT, {0: first}, params, leg_id=leg_id))
        (dropped,) = await pair.decode.until("leg_dropped")
        assert dropped.leg_dropped.leg_id == "young"
        assert dropped.leg_dropped.reason == wpb.DROP_REASON_PREEMPTED
        await pair.decode.until_finished(1)
        await pair.settled()


async def test_a_drained_worker_takes_no_more_and_ends_when_it_is_empty(folder: Path) -> None:
    async with worker_pair(folder, "shm") as pair:
        await _run(pair, PROMPT, GREEDY, 1)
        await pair.prefill.worker.drain(timeout_s=5.0)
        await pair.prefill.send(start_prefill(PROMPT, GREEDY, leg_id="too-late"))
        (dropped,) = await pair.prefill.until("leg_dropped")
        assert dropped.leg_dropped.reason == wpb.DROP_REASON_DRAINING


async def test_a_stranger_is_refused(folder: Path) -> None:
    async with worker_pair(folder, "shm") as pair:
        record = pair.prefill.worker.record
        async with grpc_edge.channel(record.address) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            for metadata, digest, code in (
                ((), record.digest, grpc.StatusCode.UNAUTHENTICATED),
                (grpc_edge.bearer("wrong"), record.digest, grpc.StatusCode.UNAUTHENTICATED),
                (grpc_edge.bearer("cluster-token"), "other", grpc.StatusCode.FAILED_PRECONDITION),
            ):
                hello = wpb.RouterHello(router_id="stranger", digest=digest)
                call = stub.Attach(iter([wpb.RouterMessage(hello=hello)]), metadata=metadata, timeout=10.0)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is code
