"""Edge: the sinks that a source has agreed with: over which transports, with which ticket and checksum."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from kvtransfer.contract import HeadRange, PeerId, SourceTransport, TransferConfig
from kvtransfer.handoffs.tickets import TICKET_BYTES, TicketBook
from kvtransfer.host import host_id
from tandem.errors import TransferError, TransferFault

QUIET_S = 60.0
"""A sink that lost a link and asked for nothing since is taken for gone after this time."""

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
        self._quiet_since: dict[PeerId, float] = {}

    def connect(self, who: Introduction) -> Agreement:
        """Admits a sink, and drops its older lives.

        Raises TransferError (UNSUPPORTED) when the two have no way in common.
        """
        if who.heads != self._config.heads:
            message = f"The sink holds KV heads {who.heads}, this source {self._config.heads}."
            raise TransferError(TransferFault.UNSUPPORTED, message)
        checksum = self._checksum(who.checksums)
        ticket = self._tickets.ticket_of(who.sink) or secrets.token_bytes(TICKET_BYTES)
        endpoints, reasons = [], {}
        for name in dict.fromkeys(who.transports):
            address = self._reach(name, who, ticket)
            if address.reason:
                reasons[name] = address.reason
            else:
                endpoints.append(Endpoint(name, address.text, ticket))
        if not endpoints:
            why = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
            raise TransferError(TransferFault.UNSUPPORTED, f"No transport in common: {why or 'none asked'}.")
        for older in self._tickets.older_lives(who.sink):
            self.drop(older)
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
        self._close_to(sink)

    def link_lost(self, sink: PeerId, now_s: float) -> None:
        """One of its links ended: it is gone, unless it is heard of within QUIET_S."""
        if self.knows(sink):
            self._quiet_since.setdefault(sink, now_s)

    def heard_of(self, sink: PeerId) -> None:
        """It asked for something: it lives."""
        self._quiet_since.pop(sink, None)

    @property
    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do; None when all are heard of."""
        return min(self._quiet_since.values()) + QUIET_S if self._quiet_since else None

    def tick(self, now_s: float) -> None:
        """Lets no new link in of a sink that is gone. One that lives all the same is told to connect anew."""
        for sink in [sink for sink, since_s in self._quiet_since.items() if now_s >= since_s + QUIET_S]:
            self._close_to(sink)

    def _close_to(self, sink: PeerId) -> None:
        self._quiet_since.pop(sink, None)
        for transport in self._transports.values():
            transport.forget(sink)

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
