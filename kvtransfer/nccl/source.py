"""Edge: the giving side of the nccl transport: one communicator for each sink and epoch, and its link.

The unique id of a sink's next communicator is drawn when the sink connects and travels in that answer. Both
sides open when the sink has opened its link, serve on it what the sink asks for, in its order, and end the
communicator with the link.
"""

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from kvtransfer import links
from kvtransfer.contract import BlockMemory, OnRefused, PeerId, Transfer, TransferConfig
from kvtransfer.device import Device, DevicePool
from kvtransfer.listener import LinkListener
from kvtransfer.nccl import link as nccl_link
from kvtransfer.nccl.address import NcclAddress
from kvtransfer.nccl.binding import NcclBinding
from kvtransfer.nccl.communicator import CommunicatorCounts
from kvtransfer.nccl.moves import Part, send_part
from kvtransfer.nccl.pairs import CommunicatorShelf
from kvtransfer.nccl.threaded_communicator import NcclKit, PairCommunicator, Rank
from kvtransfer.posts import Post, PostBox, refusal
from kvtransfer.tcp import framing
from kvtransfer.tcp.framing import Header, HeaderKind
from kvtransfer.threads import outlast
from kvtransfer.watch import Watch
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

MAX_ASKS = 64
"""Requests of one sink that wait; a sink of ours asks for one at a time."""

RANK = 0
"""The source's rank; the sink's is 1."""

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(slots=True, eq=False)
class _Pair:
    """What a sink was told, and what came of it."""

    address: NcclAddress
    communicator: PairCommunicator
    linked: bool = False
    asks: asyncio.Queue[Header] = field(default_factory=lambda: asyncio.Queue(MAX_ASKS))


class NcclSource:
    """Sends granted transfers to sinks over NCCL."""

    name = "nccl"
    direct = False
    same_host = False

    def __init__(self, memory: BlockMemory, config: TransferConfig, kit: NcclKit) -> None:
        self._memory = memory
        self._config = config
        self._kit = kit
        self._listener = LinkListener(config.connect_timeout_s, self._serve)
        self._port: int | None = None
        self._opened: tuple[NcclBinding, Device, DevicePool] | None = None
        self._pairs: dict[PeerId, _Pair] = {}
        self._shelf = CommunicatorShelf(kit.limits)
        self._epochs = itertools.count(1)
        self._box = PostBox(whole=True)

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Raises OSError, saying why, where there is no CuPy with NCCL or the pool is not on a GPU."""
        pool = DevicePool.of(self._memory)
        self._opened = self._kit.load_binding(), self._kit.open_device(pool.device_index), pool
        listener = links.listening_on(self._config.bind_host)
        self._port = listener.getsockname()[1]
        self._listener.start(listener, on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """The sink's communicator: the one it was told of while it can be used, else one of a new epoch."""
        if self._opened is None or self._port is None:
            return None
        pair = self._pairs.get(sink)
        if pair is None or pair.communicator.state.over:
            try:
                pair = self._new_pair(sink, self._opened, self._port)
            except TransferError as error:
                _log.warning("no NCCL id can be had", error=str(error))
                return None
        self._listener.admit(sink, ticket)
        return pair.address.encode()

    def forget(self, sink: PeerId) -> None:
        """See SourceTransport; ends its communicator, too."""
        self._listener.forget(sink)
        pair = self._pairs.pop(sink, None)
        if pair is not None:
            pair.communicator.end()

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Waits for the sink's request on its link, and sends; the caller bounds it by cancelling."""
        await self._box.serve(sink, transfer, blocks, part_offset, part_bytes)

    def counts(self) -> CommunicatorCounts:
        """For metrics and the watchdog."""
        return self._shelf.counts()

    async def close(self) -> None:
        """Ends all links and communicators within the bounds of the kit."""
        self._box.give_up_all()
        await self._listener.close()
        await self._shelf.close()
        self._pairs.clear()

    def _new_pair(self, sink: PeerId, opened: tuple[NcclBinding, Device, DevicePool], port: int) -> _Pair:
        binding, device, pool = opened
        slot_bytes = max(self._kit.limits.slot_bytes, pool.block_bytes)
        unique_id = binding.unique_id()
        host = self._config.advertise_host
        address = NcclAddress(host, port, next(self._epochs), slot_bytes, unique_id)
        communicator = PairCommunicator(Rank(unique_id, RANK), binding, device, self._kit.limits, slot_bytes)
        for known in [known for known in self._pairs if known.older_life_of(sink)]:
            self.forget(known)
        pair = self._pairs[sink] = _Pair(address, communicator)
        return pair

    async def _serve(self, connection: socket.socket, sink: PeerId) -> None:
        """One link, from the epoch that follows its greeting to its end."""
        nccl_link.tune(connection)
        with self._listener.counting():
            epoch = await nccl_link.read_epoch(connection, self._config.connect_timeout_s)
        pair = self._pairs.get(sink)
        current = pair is not None and pair.address.epoch == epoch and not pair.linked
        if pair is None or not current or not self._shelf.admit(pair.communicator):
            fault = TransferFault.UNSUPPORTED if current else TransferFault.STALE_EPOCH
            self._listener.refuse(fault)
            refusal = framing.encode_welcome(accepted=False, fault=fault)
            await asyncio.get_running_loop().sock_sendall(connection, refusal)
            return
        pair.linked = True
        pair.communicator.on_over = partial(links.cut, connection)
        answering = asyncio.create_task(self._answer(connection, sink, pair))
        reading = asyncio.create_task(self._read_asks(connection, pair.asks))
        try:
            await asyncio.wait((answering, reading), return_when=asyncio.FIRST_COMPLETED)
        finally:
            answering.cancel()
            reading.cancel()
            pair.communicator.end()
            await outlast(asyncio.gather(answering, reading, return_exceptions=True))
            await pair.communicator.ended()
            for task in (answering, reading):
                if not task.cancelled() and task.exception() is not None:
                    _log.info("link ended", sink=sink.worker_id, error=str(task.exception()))

    async def _read_asks(self, connection: socket.socket, asks: asyncio.Queue[Header]) -> None:
        """Until the link ends (OSError), or the sink says what makes no sense or too much (TransferError)."""
        while True:
            asked = await self._listener.read_ask(connection, self._config.connect_timeout_s)
            if asks.full():
                self._listener.refuse(TransferFault.REFUSED)
                raise TransferError(TransferFault.REFUSED, f"A sink waits for {MAX_ASKS} answers.")
            asks.put_nowait(asked)

    async def _answer(self, connection: socket.socket, sink: PeerId, pair: _Pair) -> None:
        """Opens the communicator and serves requests until one fails."""
        pair.communicator.open()
        welcome = framing.encode_welcome(accepted=True)
        await asyncio.get_running_loop().sock_sendall(connection, welcome)
        await pair.communicator.ready(self._kit.limits.open_s)
        while True:
            asked = await pair.asks.get()
            post = await self._box.meet(sink, asked.transfer)
            if post is None or not await self._served(connection, pair, post, asked):
                refused = refusal(asked, post)
                self._listener.refuse(refused.fault)
                await nccl_link.write_header(connection, refused)

    async def _served(self, connection: socket.socket, pair: _Pair, post: Post, asked: Header) -> bool:
        """Whether the sink was told, or half told, that its bytes come; raises when the pair is over.

        A transfer that is given up after its bytes are on their way leaves the pair as it was.
        """
        told = asyncio.Event()
        giving = asyncio.create_task(self._give(connection, pair, post, told))
        share = post.take(asked, giving.cancel)
        if share is None:
            giving.cancel()
            return False
        error: TransferError | None = TransferError(TransferFault.DISCONNECTED, "The transfer was stopped.")
        try:
            await giving
            error = None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if pair.communicator.state.over or (task is not None and task.cancelling()):
                raise
        except TransferError as failure:
            error = failure
            raise
        finally:
            post.share_ended(share, error)
        return told.is_set()

    async def _give(self, connection: socket.socket, pair: _Pair, post: Post, told: asyncio.Event) -> None:
        if self._opened is None:
            raise TransferError(TransferFault.DISCONNECTED, "The source is closed.")
        self._shelf.used(pair.communicator)
        part = Part(self._opened[2], post.blocks, post.part_offset, post.part_bytes)
        header = Header(HeaderKind.BYTES, post.transfer, len(post.blocks) * post.part_bytes)
        told.set()
        try:
            await nccl_link.write_header(connection, header)
        except BaseException:
            pair.communicator.end()
            raise
        await pair.communicator.run(partial(send_part, part=part), Watch())
