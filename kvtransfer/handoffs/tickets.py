"""Pure: which secret belongs to which sink."""

import hmac

from kvtransfer.contract import PeerId

TICKET_BYTES = 32
"""Bytes of a ticket, drawn at random for each pair."""


class TicketBook:
    """The tickets that are honoured; an older life of a worker loses its ticket to a newer one."""

    def __init__(self) -> None:
        self._tickets: dict[PeerId, bytes] = {}

    def admit(self, peer: PeerId, ticket: bytes) -> None:
        """Honours a ticket from now on."""
        older = [
            known
            for known in self._tickets
            if known.worker_id == peer.worker_id and known.incarnation < peer.incarnation
        ]
        for known in older:
            del self._tickets[known]
        self._tickets[peer] = ticket

    def ticket_of(self, peer: PeerId) -> bytes | None:
        """The ticket of a sink; None when it has none (any more)."""
        return self._tickets.get(peer)

    def drop(self, peer: PeerId) -> None:
        """Honours a sink's ticket no longer; idempotent."""
        self._tickets.pop(peer, None)

    def holder(self, ticket: bytes) -> PeerId | None:
        """Whose ticket it is; None for a wrong one. Compares all, each in constant time."""
        found = None
        for peer, known in self._tickets.items():
            if hmac.compare_digest(known, ticket):
                found = peer
        return found
