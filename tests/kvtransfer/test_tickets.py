"""Which sinks a source lets in: their tickets end with them, and there are never more than a bound."""

from collections.abc import Callable

import pytest

from kvtransfer.contract import OnRefused, PeerId, SourceTransport, TransferConfig
from kvtransfer.handoffs.pairing import QUIET_S, Introduction, SourcePairs
from kvtransfer.handoffs.tickets import MAX_TICKETS, TICKET_BYTES, TicketBook
from tandem.ids import Incarnation, WorkerId


def sink(number: int, life: int = 1) -> PeerId:
    return PeerId(WorkerId(f"decode-{number}"), Incarnation(life))


class Doors:
    """A giving side that only knows whom it lets in."""

    name = "tcp"
    direct = False
    same_host = False

    def __init__(self) -> None:
        self.book = TicketBook()

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None: ...

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        self.book.admit(sink, ticket)
        return "somewhere"

    def forget(self, sink: PeerId) -> None:
        self.book.drop(sink)

    async def send(self, *_transfer: object) -> None: ...

    async def close(self) -> None: ...


def lets_in(doors: Doors, ticket: bytes) -> bool:
    return doors.book.holder(ticket) is not None


def connect(pairs: SourcePairs, peer: PeerId) -> bytes:
    """The ticket that it got."""
    who = Introduction(peer, "d", ("tcp",), "", ())
    (endpoint,) = pairs.connect(who).endpoints
    return endpoint.ticket


@pytest.fixture
def doors() -> Doors:
    return Doors()


@pytest.fixture
def pairs(doors: Doors) -> SourcePairs:
    served: SourceTransport = doors
    return SourcePairs(TransferConfig(), {"tcp": served}, ())


def test_no_more_tickets_than_the_bound_and_the_oldest_go_first() -> None:
    book = TicketBook()
    for number in range(MAX_TICKETS):
        book.admit(sink(number), number.to_bytes(TICKET_BYTES, "big"))
    book.admit(sink(0), b"0" * TICKET_BYTES)
    book.admit(sink(MAX_TICKETS), b"n" * TICKET_BYTES)
    assert book.holder(b"n" * TICKET_BYTES) == sink(MAX_TICKETS)
    assert book.holder(b"0" * TICKET_BYTES) == sink(0), "it was admitted again"
    assert book.ticket_of(sink(1)) is None
    assert book.ticket_of(sink(2)) is not None


def test_lost_sink_gets_no_new_link(doors: Doors, pairs: SourcePairs) -> None:
    ticket, other = connect(pairs, sink(0)), connect(pairs, sink(1))
    pairs.drop(sink(0))
    assert not lets_in(doors, ticket)
    assert not pairs.knows(sink(0))
    assert lets_in(doors, other)


def test_newer_life_takes_the_ticket_of_the_older_one(doors: Doors, pairs: SourcePairs) -> None:
    old = connect(pairs, sink(0, life=1))
    new = connect(pairs, sink(0, life=2))
    assert (lets_in(doors, old), lets_in(doors, new)) == (False, True)
    assert not pairs.knows(sink(0, life=1))


def test_sink_whose_link_ended_and_that_asks_for_nothing_is_let_in_no_more(
    doors: Doors, pairs: SourcePairs
) -> None:
    ticket = connect(pairs, sink(0))
    pairs.link_lost(sink(0), 100.0)
    pairs.link_lost(sink(0), 130.0)
    assert pairs.next_deadline_s == 100.0 + QUIET_S
    pairs.tick(99.0 + QUIET_S)
    assert lets_in(doors, ticket)
    pairs.tick(100.0 + QUIET_S)
    assert not lets_in(doors, ticket)
    assert pairs.next_deadline_s is None


def test_sink_that_lives_after_all_pulls_on_and_is_let_in_when_it_connects(
    doors: Doors, pairs: SourcePairs
) -> None:
    ticket = connect(pairs, sink(0))
    pairs.link_lost(sink(0), 100.0)
    pairs.tick(100.0 + QUIET_S)
    assert pairs.knows(sink(0)), "what it pulls over a link that it still has"
    assert connect(pairs, sink(0)) == ticket
    assert lets_in(doors, ticket)


def test_sink_that_is_heard_of_is_not_gone(doors: Doors, pairs: SourcePairs) -> None:
    ticket = connect(pairs, sink(0))
    pairs.link_lost(sink(0), 100.0)
    pairs.heard_of(sink(0))
    pairs.tick(1000.0)
    assert lets_in(doors, ticket)


def test_link_of_a_sink_that_is_not_known_is_no_news(pairs: SourcePairs) -> None:
    pairs.link_lost(sink(0), 100.0)
    assert pairs.next_deadline_s is None
