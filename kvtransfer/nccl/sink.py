"""Edge: the taking side of the nccl transport.

A pair's communicator opens in the background after the link does; until it is open, `connect` says TIMEOUT
and the pull takes another road. One transfer runs on a pair at a time, so that both sides enqueue in the
order of the requests on the link.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvtransfer import links
from kvtransfer.contract import BlockMemory, OnLanded, PeerId, PullGrant, TransferConfig
from kvtransfer.device import Device, DevicePool
from kvtransfer.listener import read_header
from kvtransfer.nccl import link as nccl_link
from kvtransfer.nccl.address import NcclAddress
from kvtransfer.nccl.binding import NcclBinding
from kvtransfer.nccl.communicator import CommunicatorCounts
from kvtransfer.nccl.moves import Part, receive_part
from kvtransfer.nccl.pairs import CommunicatorShelf
from kvtransfer.nccl.threaded_communicator import NcclKit, PairCommunicator, Rank
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from kvtransfer.threads import outlast, to_its_end
from kvtransfer.turns import Turns
from kvtransfer.watch import Watch
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

RANK = 1
"""The sink's rank; the source's is 0."""


@dataclass(slots=True, eq=False)
class _Pair:
    """A link and its communicator; `answers` come from the task that reads the link."""

    address: NcclAddress
    communicator: PairCommunicator
    link: socket.socket
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: asyncio.Queue[Header | TransferError] = field(default_factory=lambda: asyncio.Queue(1))
    watching: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        """Whether transfers may still go over it."""
        watched = self.watching is not None and not self.watching.done()
        return watched and not self.communicator.state.over


class NcclSink:
    """Receives granted blocks over NCCL."""

    name = "nccl"

    def __init__(
        self, memory: BlockMemory, config: TransferConfig, clock: Callable[[], float], kit: NcclKit
    ) -> None:
        self._memory = memory
        self._config = config
        self._clock = clock
        self._kit = kit
        self._opened: tuple[NcclBinding, Device, DevicePool] | None = None
        self._pairs: dict[PeerId, _Pair] = {}
        self._joining: Turns[PeerId] = Turns()
        self._shelf = CommunicatorShelf(kit.limits)

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Joins the source's communicator unless that is done.

        Raises TransferError: STALE_EPOCH when this address is used up and the source must be asked for
        another, TIMEOUT while the communicator still opens, UNSUPPORTED where there is no NCCL or no room.
        """
        if block_bytes != self._memory.block_bytes:
            message = f"The source's blocks have {block_bytes} bytes, ours {self._memory.block_bytes}."
            raise TransferError(TransferFault.LENGTH, message)
        told = NcclAddress.parse(address)
        async with self._joining.of(source):
            pair = self._pairs.get(source)
            if pair is not None and not pair.usable and pair.address.epoch >= told.epoch:
                raise TransferError(TransferFault.STALE_EPOCH, "The communicator of this address is over.")
            if pair is None or pair.address.epoch < told.epoch:
                await self._part_from(source)
                pair = await self._join(source, told, ticket)
        await pair.communicator.ready(self._config.connect_timeout_s)

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Asks on the link, then receives in a thread. What fails half way ends the communicator.

        `on_landed` is not called: what has landed is not in any cache of the CPU.
        """
        pair = self._pairs.get(source)
        if pair is None or self._opened is None or not pair.usable:
            raise TransferError(TransferFault.DISCONNECTED, "There is no communicator with the source.")
        if len(target) * grant.part_bytes != grant.length_bytes:
            message = f"{grant.length_bytes} bytes were granted for {len(target)} blocks."
            raise TransferError(TransferFault.LENGTH, message)
        part = Part(self._opened[2], tuple(target), grant.part_offset, grant.part_bytes)
        async with pair.turn:
            self._shelf.used(pair.communicator)
            began_s = self._clock()
            await self._ask(pair, grant)
            watch = Watch(self._clock, grant.lease_until_s)
            await pair.communicator.run(partial(receive_part, part=part), watch)
            return self._clock() - began_s

    async def disconnect(self, source: PeerId) -> None:
        """Ends what runs with a source and forgets it."""
        await self._part_from(source)

    def counts(self) -> CommunicatorCounts:
        """For metrics and the watchdog."""
        return self._shelf.counts()

    async def close(self) -> None:
        """Ends all links and communicators within the bounds of the kit."""
        await asyncio.gather(*(self.disconnect(source) for source in tuple(self._pairs)))
        await self._shelf.close()

    async def _join(self, source: PeerId, told: NcclAddress, ticket: bytes) -> _Pair:
        binding, device, pool = self._open()
        if told.slot_bytes < pool.block_bytes:
            message = f"The source stages {told.slot_bytes} bytes, less than a block."
            raise TransferError(TransferFault.LENGTH, message)
        communicator = PairCommunicator(
            Rank(told.unique_id, RANK), binding, device, self._kit.limits, told.slot_bytes
        )
        if not self._shelf.admit(communicator):
            raise TransferError(TransferFault.UNSUPPORTED, "There is no room for another communicator.")
        try:
            link = await nccl_link.open_link(told, ticket, self._config.connect_timeout_s)
        except BaseException:
            communicator.end()
            raise
        communicator.on_over = partial(links.cut, link)
        pair = self._pairs[source] = _Pair(told, communicator, link)
        pair.watching = asyncio.create_task(_watch_link(pair, self._config.connect_timeout_s))
        communicator.open()
        return pair

    async def _part_from(self, source: PeerId) -> None:
        pair = self._pairs.pop(source, None)
        if pair is not None:
            await to_its_end(_ended(pair))

    async def _ask(self, pair: _Pair, grant: PullGrant) -> None:
        """Returns when the source begins to send. Raises TransferError; unless REFUSED the pair is over."""
        agreed = False
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                ask = Header(HeaderKind.ASK, grant.transfer, grant.length_bytes)
                await nccl_link.write_header(pair.link, ask)
                answer = await pair.answers.get()
            if isinstance(answer, TransferError):
                raise answer
            agreed = answer.kind is HeaderKind.REFUSED
            framing.check_header(answer, grant.transfer, grant.length_bytes)
            agreed = True
        except TimeoutError as error:
            raise TransferError(TransferFault.TIMEOUT, "The source did not begin to send.") from error
        except OSError as error:
            raise TransferError(TransferFault.DISCONNECTED, f"The link broke: {error}.") from error
        finally:
            if not agreed:
                pair.communicator.end()

    def _open(self) -> tuple[NcclBinding, Device, DevicePool]:
        """Loads NCCL at first use. Raises TransferError (UNSUPPORTED), saying why, where it cannot be had."""
        if self._opened is None:
            try:
                pool = DevicePool.of(self._memory)
                self._opened = self._kit.load_binding(), self._kit.open_device(pool.device_index), pool
            except OSError as error:
                raise TransferError(TransferFault.UNSUPPORTED, str(error)) from error
        return self._opened


async def _ended(pair: _Pair) -> None:
    """Ends its communicator, and with it its link."""
    pair.communicator.end()
    await pair.communicator.ended()
    if pair.watching is not None:
        await outlast(pair.watching)


async def _watch_link(pair: _Pair, within_s: float) -> None:
    """Passes answers on; the link's end ends the communicator, and with it what runs there.

    Whoever waits for an answer then is told why there is none.
    """
    try:
        while True:
            pair.answers.put_nowait(await read_header(pair.link, within_s))
    except (OSError, TransferError, asyncio.QueueFull) as error:
        pair.communicator.end()
        if pair.answers.empty():
            broke = TransferError(TransferFault.DISCONNECTED, f"The link ended: {error}")
            pair.answers.put_nowait(error if isinstance(error, TransferError) else broke)
    finally:
        pair.link.close()
