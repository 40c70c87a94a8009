"""Edge: the sources that a sink knows: one channel for each life of a worker, agreed upon once."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from kvtransfer.contract import PeerId, TransferConfig
from kvtransfer.handoffs.client import HandoffClient
from kvtransfer.handoffs.pairing import Endpoint
from kvtransfer.host import host_id
from kvtransfer.turns import Turns
from tandem.errors import TransferError, TransferFault
from tandem.worker import WorkerRecord

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(frozen=True, slots=True)
class KnownSource:
    """A connected source; `endpoints` are in our order of preference; `checksum` names the
    checksums that it wants to be shown, empty for none."""

    peer: PeerId
    client: HandoffClient
    endpoints: tuple[Endpoint, ...]
    block_bytes: int
    checksum: str

    def endpoint(self, transport: str) -> Endpoint:
        """Where one of its transports is. Raises TransferError (UNSUPPORTED) when it has none of the name."""
        for found in self.endpoints:
            if found.transport == transport:
                return found
        raise TransferError(TransferFault.UNSUPPORTED, f"The source no longer offers {transport}.")


class KnownSources:
    """Connects to sources on demand and keeps them until they fail or a newer life appears."""

    def __init__(
        self,
        transports: Sequence[str],
        make_client: Callable[[WorkerRecord], HandoffClient],
        config: TransferConfig,
        checksums: Sequence[str],
        on_older_life: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        """`checksums` are those that can be computed here, best first.

        `on_older_life` is told of each connected life that a newer one has replaced; it forgets it.
        """
        self._on_older_life = on_older_life
        self._transports = tuple(transports)
        self._make_client = make_client
        self._config = config
        self._checksums = tuple(checksums)
        self._host_id = host_id()
        self._known: dict[PeerId, KnownSource] = {}
        self._connecting: Turns[PeerId] = Turns()

    async def get(self, source: WorkerRecord) -> KnownSource:
        """The connected source. Raises TransferError when it cannot be reached or does not fit."""
        peer = PeerId.of(source)
        known = self._known.get(peer)
        if known is not None:
            return known
        async with self._connecting.of(peer):
            known = self._known.get(peer)
            if known is None:
                known = await self._connect(peer, source)
                self._known[peer] = known
        for other in [other for other in self._known if other.older_life_of(peer)]:
            await self._on_older_life(other)
        return known

    async def renew(self, source: KnownSource) -> KnownSource:
        """Asks a connected source for its addresses anew. Raises TransferError when it cannot be asked."""
        async with self._connecting.of(source.peer):
            fresh = await self._agree(source.peer, source.client)
            if source.peer in self._known:
                self._known[source.peer] = fresh
        return fresh

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The sources that are connected now."""
        return tuple(self._known)

    async def forget_failed(self, failed: KnownSource) -> None:
        """Closes the channel that failed, unless another pull has replaced it already."""
        known = self._known.get(failed.peer)
        # Addresses that were asked for anew came over the same channel.
        if known is not None and known.client is failed.client:
            await self.forget(failed.peer)

    async def forget(self, peer: PeerId) -> None:
        """Closes the channel to a source; the next pull connects anew. Idempotent."""
        known = self._known.pop(peer, None)
        if known is not None:
            await known.client.close()

    async def close(self) -> None:
        """Closes all channels."""
        for peer in tuple(self._known):
            await self.forget(peer)

    async def _connect(self, peer: PeerId, source: WorkerRecord) -> KnownSource:
        client = self._make_client(source)
        try:
            return await self._agree(peer, client)
        except BaseException:
            await client.close()
            raise

    async def _agree(self, peer: PeerId, client: HandoffClient) -> KnownSource:
        config = self._config
        answer = await client.connect(
            *(self._transports, self._host_id, config.connect_timeout_s, self._checksums, config.heads)
        )
        if answer.checksum not in (self._checksums or ("",)):
            message = f"The source asks for the checksum {answer.checksum or 'none'}."
            raise TransferError(TransferFault.UNSUPPORTED, message)
        offered = {
            found.transport: Endpoint(found.transport, found.address, found.ticket)
            for found in answer.endpoints
        }
        ordered = tuple(offered[name] for name in self._transports if name in offered)
        left_out = {name: "not offered by the source" for name in self._transports if name not in offered}
        roads = [endpoint.transport for endpoint in ordered]
        _log.info("source connected", source=peer.worker_id, roads=roads, left_out=left_out)
        return KnownSource(peer, client, ordered, answer.block_bytes, answer.checksum)
