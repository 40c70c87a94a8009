"""Edge: the adopt transport: no byte moves, the blocks change owners with the commit.

It is for pairs whose pools lie in one arena. What is granted over it stays where it is until the source has
agreed to the commit and taken as many of the sink's frames (kvtransfer/handoffs/adoption.py). A unix socket
is the pair's link: the kernel closes it when a process is gone.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from kvtransfer import links
from kvtransfer.contract import FrameArena, OnLanded, OnRefused, PeerId, PullGrant, Transfer, TransferConfig
from kvtransfer.listener import LinkListener, is_quiet
from kvtransfer.tcp import framing
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

ADOPT: Final = "adopt"
"""Name of the transport."""


@dataclass(frozen=True, slots=True)
class AdoptAddress:
    """Where a source's blocks can be adopted: the arena's name, its number there, and its socket's name."""

    arena: str
    member: int
    link: str

    def encode(self) -> str:
        """As text."""
        return f"{self.arena}/{self.member}/{self.link}"

    @classmethod
    def decode(cls, text: str) -> "AdoptAddress":
        """The inverse. Raises TransferError (UNSUPPORTED)."""
        arena, _, rest = text.partition("/")
        member, _, link = rest.partition("/")
        if not member.isdecimal() or len(member) > 9 or not link:
            raise TransferError(TransferFault.UNSUPPORTED, "The source's address in an arena makes no sense.")
        return cls(arena, int(member), link)


class AdoptSource:
    """Lets sinks in the same arena adopt blocks."""

    name = ADOPT
    direct = True
    same_host = True

    def __init__(self, arena: FrameArena, config: TransferConfig) -> None:
        self._arena = arena
        self._address = f"tandem-kv-{secrets.token_hex(16)}"
        self._listener = LinkListener(config.connect_timeout_s, self._serve)
        self._mapper = ThreadPoolExecutor(1, "kv-arena")

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Raises OSError when abstract sockets are not to be had."""
        self._listener.start(links.listening_as(self._address), on_link_lost, on_refused)

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """The arena, our number in it and the socket."""
        self._listener.admit(sink, ticket)
        return AdoptAddress(self._arena.name, self._arena.member, self._address).encode()

    def forget(self, sink: PeerId) -> None:
        """See SourceTransport."""
        self._listener.forget(sink)

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Nothing to do: the blocks change owners with the commit."""

    async def close(self) -> None:
        """Cuts all links."""
        await self._listener.close()
        self._mapper.shutdown(wait=True)

    async def _serve(self, connection: socket.socket, sink: PeerId) -> None:
        loop = asyncio.get_running_loop()
        accepted = links.same_user(connection)
        if not accepted:
            self._listener.refuse(TransferFault.REFUSED)
        await loop.sock_sendall(connection, framing.encode_welcome(accepted=accepted))
        if accepted:
            # What the sink gives in exchange is written by our steps, which should not meet unmapped pages.
            await loop.run_in_executor(self._mapper, self._arena.populate)
            await self._listener.until_end(connection)


class AdoptSink:
    """Finds out whether a source's blocks can be adopted; then there is nothing to receive."""

    name = ADOPT

    def __init__(self, arena: FrameArena, config: TransferConfig) -> None:
        self._arena = arena
        self._timeout_s = config.connect_timeout_s
        self._links: dict[PeerId, tuple[str, socket.socket]] = {}
        self._mapper = ThreadPoolExecutor(1, "kv-arena")
        self._mapping: set[asyncio.Future[None]] = set()

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Raises TransferError, UNSUPPORTED when the source's blocks lie in another arena."""
        known = self._links.get(source)
        if known is not None:
            if known[0] == address and is_quiet(known[1]):
                return
            await self.disconnect(source)
        told = AdoptAddress.decode(address)
        if told.arena != self._arena.name:
            raise TransferError(TransferFault.UNSUPPORTED, "The source's blocks lie in another arena.")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        greeting = framing.encode_greeting(ticket)
        link = await links.greet(connection, b"\0" + told.link.encode(), greeting, self._timeout_s)
        if source in self._links:
            link.close()
            return
        self._links[source] = (address, link)
        mapping = asyncio.get_running_loop().run_in_executor(self._mapper, self._arena.populate)
        self._mapping.add(mapping)
        mapping.add_done_callback(self._mapping.discard)

    async def receive(
        self, source: PeerId, grant: PullGrant, target: Sequence[BlockId], on_landed: OnLanded | None = None
    ) -> float:
        """Nothing moves. Raises TransferError (DISCONNECTED) when the source's process is gone."""
        known = self._links.get(source)
        if known is None or not is_quiet(known[1]):
            raise TransferError(TransferFault.DISCONNECTED, "The source's process is gone.")
        return 0.0

    async def disconnect(self, source: PeerId) -> None:
        """Closes the link."""
        known = self._links.pop(source, None)
        if known is not None:
            known[1].close()

    async def close(self) -> None:
        """Closes all links."""
        for source in tuple(self._links):
            await self.disconnect(source)
        await asyncio.gather(*self._mapping, return_exceptions=True)
        self._mapper.shutdown(wait=True)
