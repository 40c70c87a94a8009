"""Edge: a worker without a model: speaks WorkerService on a real socket and writes tokens by a formula.

For benchmarks of the router, and for tests that script faults. Started by hand as
`python -m benchmarks.stub_worker --role prefill` it prints a line of JSON with its address, and serves until
SIGTERM.
"""

import argparse
import asyncio
import json
import signal
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import uvloop

from benchmarks.stub_script import COPIES, Fault, FaultKind, StubSettings, mixed, token_of
from tandem import grpc_edge
from tandem.ids import Incarnation, WorkerId
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import worker_pb2 as wpb
from tandem.v1 import worker_pb2_grpc
from tandem.wire import ROLE_TO_WIRE, address_to_wire
from tandem.worker import Role, WorkerRecord

LOAD_INTERVAL_S = 0.25
BLOCK_TOKENS = 16


@dataclass(slots=True)
class _Sequence:
    leg_id: str
    sample_index: int
    next_index: int
    base: int
    params: pb.SamplingParams


class _Context(Protocol):
    async def read(self) -> Any: ...
    async def write(self, message: wpb.WorkerMessage) -> None: ...


class _Attachment:
    """One router's stream: its messages are answered in the order they come."""

    def __init__(self, worker: "StubWorker") -> None:
        self._worker = worker
        self._settings = worker.settings
        self._unsent: deque[wpb.WorkerMessage] = deque()
        self._news = asyncio.Event()
        self._work = asyncio.Event()
        self._running: dict[tuple[str, int], _Sequence] = {}
        self._steps = 0
        self._silent = False
        self._later: set[asyncio.TimerHandle] = set()

    async def serve(self, messages: AsyncIterator[wpb.RouterMessage], context: _Context) -> None:
        """Until the router closes the stream or the worker dies."""
        try:
            async with asyncio.TaskGroup() as tasks:
                owned = [
                    tasks.create_task(self._write(context)),
                    tasks.create_task(self._step_for_ever()),
                    tasks.create_task(self._report_load()),
                ]
                async for message in messages:
                    self._hear(message)
                for task in owned:
                    task.cancel()
        finally:
            for handle in self._later:
                handle.cancel()

    def _hear(self, message: wpb.RouterMessage) -> None:
        kind = message.WhichOneof("body")
        if kind == "start_prefill":
            self._worker.prefills.append(message.start_prefill)
            self._after(self._settings.prefill_s, self._prefill, message.start_prefill)
        elif kind == "start_decode":
            self._worker.decodes.append(message.start_decode)
            self._after(self._settings.landing_s, self._land, message.start_decode)
        elif kind == "cancel":
            self._worker.cancels.append(message.cancel)
            self._cancel(message.cancel)
        elif kind == "ping":
            self._send(wpb.WorkerMessage(pong=wpb.Pong(number=message.ping.number)))
        elif kind == "cache_snapshot":
            self._send(wpb.WorkerMessage(cache=wpb.CacheEvents(snapshot=True)))

    def _after(self, delay_s: float, call: Any, message: Any) -> None:
        if delay_s == 0:
            call(message)
            return
        loop = asyncio.get_running_loop()

        def due() -> None:
            self._later.discard(handle)
            call(message)

        handle = loop.call_later(delay_s, due)
        self._later.add(handle)

    def _prefill(self, start: wpb.StartPrefill) -> None:
        if start.leg_id in self._worker.cancelled:
            return
        index = len(start.token_ids) - start.prompt_tokens
        base = mixed(start.token_ids[: start.prompt_tokens])
        sequences = [
            _Sequence(start.leg_id, sample, index, base, start.sampling) for sample in start.sample_indices
        ]
        alive = self._emit(sequences)
        if alive and not self._silent:
            offer = wpb.KvOffered(leg_id=start.leg_id, kv_tokens=len(start.token_ids), epoch=1, park_s=30.0)
            self._send(wpb.WorkerMessage(kv_offered=offer))

    def _land(self, start: wpb.StartDecode) -> None:
        if start.leg_id in self._worker.cancelled:
            return
        landed = wpb.KvLanded(leg_id=start.leg_id, transport="stub", moved_bytes=len(start.token_ids))
        self._worker.handoffs += 1
        self._send(wpb.WorkerMessage(kv_landed=landed))
        base = mixed(start.token_ids[: start.prompt_tokens])
        known = len(start.token_ids) - start.prompt_tokens
        for sample in start.samples:
            index = known + len(sample.token_ids)
            sequence = _Sequence(start.leg_id, sample.sample_index, index, base, start.sampling)
            self._running[start.leg_id, sample.sample_index] = sequence
        self._work.set()

    def _cancel(self, cancel: wpb.CancelLeg) -> None:
        if not cancel.sample_indices:
            self._worker.cancelled.add(cancel.leg_id)
        for key in [key for key in self._running if key[0] == cancel.leg_id]:
            if not cancel.sample_indices or key[1] in cancel.sample_indices:
                del self._running[key]

    async def _step_for_ever(self) -> None:
        while True:
            if not self._running:
                self._work.clear()
                await self._work.wait()
            await asyncio.sleep(self._settings.step_s)
            running = list(self._running.values())
            alive = self._emit(running)
            if len(alive) < len(running):
                keep = {(sequence.leg_id, sequence.sample_index) for sequence in alive}
                self._running = {key: item for key, item in self._running.items() if key in keep}

    def _emit(self, sequences: Sequence[_Sequence]) -> list[_Sequence]:
        """Sends the next token of each in one message; returns those that go on."""
        self._steps += 1
        step = wpb.StepOutput(step=self._steps, batch_size=len(sequences))
        alive, after = [], []
        for sequence in sequences:
            fault = self._fault_at(sequence.next_index)
            if fault is not None and fault.kind is FaultKind.DROP:
                after.append(self._dropped(sequence, fault))
                continue
            entry = self._entry(sequence)
            copies = 1 if fault is None else COPIES.get(fault.kind, 1)
            step.sequences.extend([entry] * copies)
            after += self._side_effects(fault, sequence, step)
            if entry.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
                sequence.next_index += 1
                alive.append(sequence)
        if step.sequences:
            self._send(wpb.WorkerMessage(step=step))
        for message in after:
            self._send(message)
        return alive

    def _entry(self, sequence: _Sequence) -> wpb.SequenceTokens:
        settings, index, params = self._settings, sequence.next_index, sequence.params
        token_id = token_of(sequence.base, sequence.sample_index, index, settings)
        entry = wpb.SequenceTokens(
            leg_id=sequence.leg_id, sample_index=sequence.sample_index, first_index=index
        )
        if settings.end_id is not None and index == settings.end_index:
            token_id = settings.end_id
            if not params.ignore_eos and index >= params.min_tokens:
                entry.finish_reason = pb.FINISH_REASON_STOP
                entry.stop_token_id = token_id
        if entry.finish_reason == pb.FINISH_REASON_UNSPECIFIED and index + 1 >= params.max_tokens:
            entry.finish_reason = pb.FINISH_REASON_LENGTH
        entry.token_ids.append(token_id)
        if params.HasField("logprobs"):
            top = [pb.TopLogprob(token_id=token_id + i, logprob=-0.5 - i) for i in range(params.logprobs)]
            entry.logprobs.append(pb.TokenLogprob(token_id=token_id, logprob=-0.5, top=top))
        return entry

    def _fault_at(self, index: int) -> Fault | None:
        for fault in self._settings.faults:
            if fault.at_index == index and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def _dropped(self, sequence: _Sequence, fault: Fault) -> wpb.WorkerMessage:
        dropped = wpb.LegDropped(
            leg_id=sequence.leg_id,
            sample_indices=[sequence.sample_index],
            reason=fault.reason,
            message="scripted",
        )
        return wpb.WorkerMessage(leg_dropped=dropped)

    def _side_effects(
        self, fault: Fault | None, sequence: _Sequence, step: wpb.StepOutput
    ) -> list[wpb.WorkerMessage]:
        if fault is None:
            return []
        if fault.kind is FaultKind.STALE:
            for leg_id, sample in (("unknown-leg", 0), (sequence.leg_id, 999)):
                step.sequences.add(leg_id=leg_id, sample_index=sample, first_index=0, token_ids=[9, 9])
        if fault.kind is FaultKind.LAND_TWICE:
            return [wpb.WorkerMessage(kv_landed=wpb.KvLanded(leg_id=sequence.leg_id, transport="stub"))]
        if fault.kind is FaultKind.SILENCE:
            self._silent = True
        if fault.kind is FaultKind.DIE:
            self._silent = True
            self._worker.die()
        return []

    def _send(self, message: wpb.WorkerMessage) -> None:
        if not self._silent:
            self._unsent.append(message)
            self._news.set()

    async def _write(self, context: _Context) -> None:
        await context.write(wpb.WorkerMessage(welcome=self._worker.welcome()))
        while True:
            while self._unsent:
                await context.write(self._unsent.popleft())
            self._news.clear()
            await self._news.wait()

    async def _report_load(self) -> None:
        while True:
            load = self._worker.load(len(self._running), self._steps)
            self._send(wpb.WorkerMessage(load=load))
            await asyncio.sleep(LOAD_INTERVAL_S)


class StubWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One stub; keeps what it was told for tests to look at."""

    def __init__(self, record: WorkerRecord, settings: StubSettings) -> None:
        self.record = record
        self.settings = settings
        self.prefills: deque[wpb.StartPrefill] = deque(maxlen=10_000)
        self.decodes: deque[wpb.StartDecode] = deque(maxlen=10_000)
        self.cancels: deque[wpb.CancelLeg] = deque(maxlen=10_000)
        self.cancelled: set[str] = set()
        self.handoffs = 0
        self.draining = False
        self.dead = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def serving(
        cls,
        role: Role,
        worker_id: str,
        digest: str,
        settings: StubSettings | None = None,
        port: int = 0,
        incarnation: int = 1,
        token: str | None = None,
    ) -> AsyncIterator["StubWorker"]:
        """A stub on a loopback port; gone when the block ends. `record` tells its address."""
        server = grpc_edge.server(token)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        record = WorkerRecord(
            WorkerId(worker_id), Incarnation(incarnation), role, f"127.0.0.1:{bound}", digest
        )
        worker = cls(record, settings or StubSettings())
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
        await server.start()
        dying = asyncio.create_task(worker.stop_when_dead(server))
        try:
            yield worker
        finally:
            worker.die()
            await dying

    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[wpb.RouterMessage], context: Any
    ) -> None:
        """Serves one router."""
        first = await anext(request_iterator)
        if first.WhichOneof("body") != "hello" or first.hello.digest != self.record.digest:
            return
        try:
            await _Attachment(self).serve(request_iterator, context)
        except ExceptionGroup:
            # A stream that breaks because we died on purpose is no news.
            if not self.dead.is_set():
                raise

    def welcome(self) -> wpb.WorkerWelcome:
        """Who it is."""
        return wpb.WorkerWelcome(
            worker=address_to_wire(self.record),
            role=ROLE_TO_WIRE[self.record.role],
            block_size_tokens=BLOCK_TOKENS,
            pool_blocks=self.settings.pool_blocks,
            block_bytes=1,
            context_tokens=1 << 20,
        )

    def load(self, running: int, steps: int) -> wpb.LoadSnapshot:
        """A pool that never fills."""
        return wpb.LoadSnapshot(
            running_sequences=running,
            total_blocks=self.settings.pool_blocks,
            free_blocks=self.settings.pool_blocks,
            steps=steps,
            handoffs_committed=self.handoffs,
            draining=self.draining,
        )

    def die(self) -> None:
        """Breaks all streams; idempotent."""
        self.dead.set()

    async def stop_when_dead(self, server: Any) -> None:
        """Waits for `die`, then stops the server at once."""
        await self.dead.wait()
        await server.stop(None)


async def _serve(options: argparse.Namespace) -> None:
    settings = StubSettings(
        vocabulary_tokens=options.vocabulary,
        prefill_s=options.prefill_ms / 1000,
        landing_s=options.landing_ms / 1000,
        step_s=options.step_ms / 1000,
    )
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    role = Role(options.role)
    async with StubWorker.serving(
        role, options.worker_id or f"stub-{role.value}", options.digest, settings, options.port
    ) as worker:
        print(json.dumps({**asdict(worker.record), "role": role.value}), flush=True)
        await stop.wait()


def main() -> None:
    """Serves one stub until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(description="A worker without a model.")
    parser.add_argument("--role", choices=[role.value for role in Role], required=True)
    parser.add_argument("--worker-id", default="")
    parser.add_argument("--digest", default="stub")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--prefill-ms", type=float, default=0.0)
    parser.add_argument("--landing-ms", type=float, default=0.0)
    parser.add_argument("--step-ms", type=float, default=5.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
