"""Pure: which secret belongs to which sink."""

import hmac

from kvtransfer.contract import PeerId

TICKET_BYTES = 32
"""Bytes of a ticket, drawn at random for each pair."""

MAX_TICKETS = 1024
"""Sinks that are known at one time; each new one beyond replaces the one that was admitted longest ago."""


class TicketBook:
    """The tickets that are honoured; an older life of a worker loses its ticket to a newer one."""

    def __init__(self) -> None:
        self._tickets: dict[PeerId, bytes] = {}

    def admit(self, peer: PeerId, ticket: bytes) -> None:
        """Honours a ticket from now on; a sink that is admitted again counts as new."""
        for known in (*self.older_lives(peer), peer):
            self._tickets.pop(known, None)
        if len(self._tickets) >= MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        self._tickets[peer] = ticket

    def older_lives(self, peer: PeerId) -> list[PeerId]:
        """The sinks that a life of a worker replaces."""
        return [known for known in self._tickets if known.older_life_of(peer)]

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
