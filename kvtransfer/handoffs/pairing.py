"""Edge: the sinks that a source has agreed with: over which transports, with which ticket and checksum."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from kvtransfer.contract import HeadRange, PeerId, SourceTransport, TransferConfig
from kvtransfer.handoffs.tickets import TICKET_BYTES, TicketBook
from kvtransfer.host import host_id
from tandem.errors import TransferError, TransferFault

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a sink says of itself when it connects; see ConnectRequest in worker.proto."""

    sink: PeerId
    digest: str
    transports: tuple[str, ...]
    host_id: str
    checksums: tuple[str, ...]
    heads: HeadRange | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one transport reaches a source."""

    transport: str
    address: str
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a pair transfers: endpoints, best first as the sink named them, and a checksum ("" for none)."""

    endpoints: tuple[Endpoint, ...]
    checksum: str


class SourcePairs:
    """The admitted sinks of one source; `transports` are its own, by name, once they have started."""

    def __init__(
        self, config: TransferConfig, transports: Mapping[str, SourceTransport], checksums: Sequence[str]
    ) -> None:
        """`checksums` are the names of those that can be computed here, none to use none."""
        self._config = config
        self._own_checksums = tuple(checksums)
        self._transports = transports
        self._host_id = host_id()
        self._tickets = TicketBook()
        self._checksums: dict[PeerId, str] = {}

    def connect(self, who: Introduction) -> Agreement:
        """Admits a sink. Raises TransferError (UNSUPPORTED) when the two have no way in common."""
        if who.heads != self._config.heads:
            message = f"The sink holds KV heads {who.heads}, this source {self._config.heads}."
            raise TransferError(TransferFault.UNSUPPORTED, message)
        checksum = self._checksum(who.checksums)
        ticket = self._tickets.ticket_of(who.sink) or secrets.token_bytes(TICKET_BYTES)
        endpoints, reasons = [], {}
        for name in who.transports:
            address = self._reach(name, who, ticket)
            if address.reason:
                reasons[name] = address.reason
            else:
                endpoints.append(Endpoint(name, address.text, ticket))
        if not endpoints:
            why = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
            raise TransferError(TransferFault.UNSUPPORTED, f"No transport in common: {why or 'none asked'}.")
        self._tickets.admit(who.sink, ticket)
        self._checksums = {peer: kept for peer, kept in self._checksums.items() if self.knows(peer)}
        self._checksums[who.sink] = checksum
        roads = [endpoint.transport for endpoint in endpoints]
        _log.info("sink connected", sink=who.sink.worker_id, roads=roads, left_out=reasons)
        return Agreement(tuple(endpoints), checksum)

    def knows(self, sink: PeerId) -> bool:
        """Whether this life of a sink has connected."""
        return self._tickets.ticket_of(sink) is not None

    def checksum(self, sink: PeerId) -> str:
        """Name of the checksums that a sink has to show; empty when it shows none."""
        return self._checksums.get(sink, next(iter(self._own_checksums), ""))

    def drop(self, sink: PeerId) -> None:
        """Forgets a sink; idempotent."""
        self._tickets.drop(sink)
        self._checksums.pop(sink, None)

    def _checksum(self, offered: Sequence[str]) -> str:
        if not self._own_checksums and not offered:
            return ""
        for name in offered:
            if name in self._own_checksums:
                return name
        message = f"Checksums: the sink has {', '.join(offered) or 'none'}, this source "
        raise TransferError(
            TransferFault.UNSUPPORTED, f"{message}{', '.join(self._own_checksums) or 'none'}."
        )

    def _reach(self, name: str, who: Introduction, ticket: bytes) -> "_Reach":
        transport = self._transports.get(name)
        if transport is None:
            return _Reach(reason="not served here")
        if transport.same_host and who.host_id != self._host_id:
            return _Reach(reason="on another host")
        address = transport.endpoint(who.sink, ticket)
        return _Reach(reason="no endpoint") if address is None else _Reach(text=address)


@dataclass(frozen=True, slots=True)
class _Reach:
    """An address, or the reason why there is none."""

    text: str = ""
    reason: str = ""
