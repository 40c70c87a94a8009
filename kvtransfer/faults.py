"""Edge: transports that fail by a seeded schedule, for tests and for drills on a running cluster.

Some faults are loud (an error is raised), the dangerous ones are silent (wrong or missing bytes, no error):
the checksums must catch those.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from kvtransfer.contract import (
    BlockMemory,
    OnLanded,
    OnRefused,
    PeerId,
    PullGrant,
    SinkTransport,
    SourceTransport,
    Transfer,
)
from kvtransfer.threads import outlast
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId


class Fault(Enum):
    """What befalls one transfer."""

    NONE = "none"
    DELAY = "delay"
    """It begins late."""
    DROP = "drop"
    """Nothing happens until somebody gives up."""
    TRUNCATE = "truncate"
    """The last block is missing, silently."""
    CORRUPT = "corrupt"
    """A bit is flipped (sink) or two blocks are exchanged (source), silently."""
    REORDER = "reorder"
    """The blocks of the piece arrive in each other's places, silently."""
    DISCONNECT = "disconnect"
    """The link breaks half way."""


@dataclass(slots=True)
class FaultSchedule:
    """Draws one fault for each transfer; equal seeds draw equal faults."""

    seed: int
    weights: Mapping[Fault, float]
    delay_s: float = 0.05
    drawn: list[Fault] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.weights = MappingProxyType(dict(self.weights))
        self._random = random.Random(self.seed)

    def draw(self) -> Fault:
        """The next transfer's fault."""
        fault = self._random.choices(tuple(self.weights), tuple(self.weights.values()))[0]
        self.drawn.append(fault)
        return fault

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1, for where in the bytes a fault strikes."""
        return self._random.randrange(limit)


class FaultySink:
    """A taking side around another one."""

    def __init__(self, inner: SinkTransport, memory: BlockMemory, schedule: FaultSchedule) -> None:
        self._inner = inner
        self._memory = memory
        self._schedule = schedule

    @property
    def name(self) -> str:
        """The name of what is inside."""
        return self._inner.name

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Never fails by schedule."""
        await self._inner.connect(source, address, ticket, block_bytes)

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Receives with the next fault of the schedule."""
        fault = self._schedule.draw()
        if fault is Fault.DROP:
            await asyncio.Event().wait()
        if fault is Fault.DELAY:
            await asyncio.sleep(self._schedule.delay_s)
        last = bytes(self._memory.view(target[-1]))
        # What is spoilt afterwards must not be hashed before.
        spoilt = fault in (Fault.TRUNCATE, Fault.CORRUPT, Fault.REORDER)
        heard = None if spoilt else on_landed
        if fault is Fault.DISCONNECT:
            receiving = asyncio.create_task(self._inner.receive(source, grant, target, heard))
            try:
                await asyncio.sleep(0)
                await self._inner.disconnect(source)
            finally:
                receiving.cancel()
                await outlast(receiving)
            raise TransferError(TransferFault.DISCONNECTED, "The schedule broke the link.")
        copy_s = await self._inner.receive(source, grant, target, heard)
        if fault is Fault.TRUNCATE:
            self._memory.view(target[-1])[:] = last
        if fault is Fault.CORRUPT:
            view = self._part(grant, target[self._schedule.below(len(target))])
            view[self._schedule.below(len(view))] ^= 1 << self._schedule.below(8)
        if fault is Fault.REORDER:
            arrived = [bytes(self._part(grant, block)) for block in target]
            for block, other in zip(target, arrived[1:] + arrived[:1], strict=True):
                self._part(grant, block)[:] = other
        return copy_s

    async def disconnect(self, source: PeerId) -> None:
        """Never fails by schedule."""
        await self._inner.disconnect(source)

    async def close(self) -> None:
        """Never fails by schedule."""
        await self._inner.close()

    def _part(self, grant: PullGrant, block: BlockId) -> memoryview:
        return self._memory.view(block)[grant.part_offset : grant.part_offset + grant.part_bytes]


class SourceAround:
    """A giving side that is another one in all but what a subclass says."""

    def __init__(self, inner: SourceTransport) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """The name of what is inside."""
        return self._inner.name

    @property
    def direct(self) -> bool:
        """As what is inside."""
        return self._inner.direct

    @property
    def same_host(self) -> bool:
        """As what is inside."""
        return self._inner.same_host

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """As what is inside."""
        await self._inner.start(on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """As what is inside."""
        return self._inner.endpoint(sink, ticket)

    def forget(self, sink: PeerId) -> None:
        """As what is inside."""
        self._inner.forget(sink)

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """As what is inside."""
        await self._inner.send(sink, transfer, blocks, part_offset, part_bytes)

    async def close(self) -> None:
        """As what is inside."""
        await self._inner.close()


class FaultySource(SourceAround):
    """A giving side around another one; only transports that send feel its faults."""

    def __init__(self, inner: SourceTransport, schedule: FaultSchedule) -> None:
        super().__init__(inner)
        self._schedule = schedule

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Sends with the next fault of the schedule."""
        fault = self._schedule.draw()
        if fault is Fault.DROP:
            await asyncio.Event().wait()
        if fault is Fault.DELAY:
            await asyncio.sleep(self._schedule.delay_s)
        if fault is Fault.DISCONNECT:
            raise TransferError(TransferFault.DISCONNECTED, "The schedule broke the link.")
        if fault is Fault.TRUNCATE:
            blocks = blocks[:-1]
        if fault is Fault.REORDER:
            blocks = [*blocks[1:], *blocks[:1]]
        if fault is Fault.CORRUPT and len(blocks) > 1:
            first = self._schedule.below(len(blocks) - 1)
            blocks = [*blocks[:first], blocks[first + 1], blocks[first], *blocks[first + 2 :]]
        await self._inner.send(sink, transfer, blocks, part_offset, part_bytes)


class ThrottledSource(SourceAround):
    """A giving side behind one slow link: `bytes_per_s` for all sinks together, one transfer after the other.

    Each transfer takes up to `jitter` of its time more or less, drawn by the seed. Only transports that send
    feel it. `clock` is monotonic, in seconds.
    """

    def __init__(
        self,
        inner: SourceTransport,
        bytes_per_s: float,
        *,
        seed: int = 0,
        jitter: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner)
        self._bytes_per_s = bytes_per_s
        self._jitter = jitter
        self._random = random.Random(seed)
        self._clock = clock
        self._busy_until_s = clock()

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Sends when the link would have carried the last byte."""
        now_s = self._clock()
        slower = 1.0 + self._jitter * self._random.uniform(-1.0, 1.0)
        took_s = len(blocks) * part_bytes / self._bytes_per_s * slower
        self._busy_until_s = max(now_s, self._busy_until_s) + took_s
        await asyncio.sleep(self._busy_until_s - now_s)
        await super().send(sink, transfer, blocks, part_offset, part_bytes)
