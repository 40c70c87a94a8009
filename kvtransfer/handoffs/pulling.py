"""Edge: one pull from beginning to end: piece after piece, over another transport when one fails.

The state is a SinkHandoff of sink_protocol.py; what is still wanted is a list of block ranges. A piece that
landed is not moved again, unless the source finds at the commit that it holds other bytes.
"""

import asyncio
from dataclasses import dataclass

import structlog

from kvtransfer.contract import (
    BlockRange,
    PullGrant,
    PullReport,
    Transfer,
)
from kvtransfer.handoffs.adoption import Adoption
from kvtransfer.handoffs.client import CommitStatus, PullTerms
from kvtransfer.handoffs.landing import Landing
from kvtransfer.handoffs.offers import FrameExchange
from kvtransfer.handoffs.pieces import layer_span, remainder
from kvtransfer.handoffs.pull_order import PullOrder, PullTools
from kvtransfer.handoffs.sink_protocol import SinkHandoff
from kvtransfer.shm.adopt import ADOPT, AdoptAddress
from kvtransfer.threads import outlast
from tandem.errors import TransferError, TransferFault
from tandem.ids import BlockId

COMMIT_CALL_S = 0.75
"""Bound of one commit; the source may still be hashing. A lost one is repeated within the settle time."""

RETRY_PAUSE_S = 0.05
"""Pause before a call that failed at once is repeated."""

BUSY_PAUSE_S = 0.005
"""Pause before blocks are asked for again that a step of the source still touches."""

WAIT_S = 0.5
"""How long the source may let us wait for more of a growing offer in one call."""

_log = structlog.get_logger("tandem.kvtransfer")


@dataclass(frozen=True, slots=True)
class _Held:
    """A piece that landed."""

    block_range: BlockRange
    road: str
    checksum: int


@dataclass(slots=True)
class _Costs:
    """The sums of a PullReport, in seconds."""

    accept_s: float = 0.0
    ready_s: float = 0.0
    queue_s: float = 0.0
    move_s: float = 0.0
    copy_s: float = 0.0
    verify_s: float = 0.0
    commit_s: float = 0.0


class Pulling:
    """Runs one pull."""

    def __init__(
        self, tools: PullTools, machine: SinkHandoff, order: PullOrder, adoption: Adoption | None = None
    ) -> None:
        """With an `adoption` the blocks are adopted where the pair can."""
        self._adoption = adoption
        self._tools = tools
        self._machine = machine
        self._order = order
        self._layers = tools.memory.block_bytes // tools.memory.layer_bytes
        self._wanted = [order.block_range]
        self._held: dict[int, _Held] = {}
        self._failures: dict[str, TransferError] = {}
        self._road = ""
        self._moved_bytes = 0
        self._costs = _Costs()

    async def run(self) -> PullReport:
        """Until the source agreed. Raises TransferError when no transport brought the right bytes in time."""
        while self._wanted:
            while self._wanted:
                if not await self._next_piece():
                    await self._wait_until_ready()
            await self._commit()
        costs = self._costs
        return PullReport(
            *(self._road, self._moved_bytes, len(self._held), costs.accept_s, costs.ready_s),
            *(costs.queue_s, costs.move_s, costs.copy_s, costs.verify_s, costs.commit_s),
        )

    async def _next_piece(self) -> bool:
        """Moves one piece, or notes that a transport failed; False when the source has nothing ready."""
        queued_s = self._tools.clock()
        async with self._tools.gate.turn(self._order.priority):
            self._costs.queue_s += self._tools.clock() - queued_s
            road = self._choose_road()
            try:
                await self._connect(road)
            except TransferError as error:
                self._note_failure(road, error)
                return True
            grant = await self._ask(road)
            if grant is None:
                return False
            try:
                await self._fetch(grant, road)
            except TransferError as error:
                self._note_failure(road, error)
                if self._machine.state.terminal or not road:
                    raise
            return True

    def _choose_road(self) -> str:
        """The best transport that has not failed in this pull; empty when nothing has to move."""
        if not self._wanted[0].num_blocks:
            return ""
        source = self._order.source
        names = [found.transport for found in source.endpoints if found.transport not in self._failures]
        held = {piece.road for piece in self._held.values()}
        if ADOPT in held:
            # Part of a block cannot be adopted and part of it copied.
            return ADOPT
        if ADOPT in names and (held or self._adoption is None):
            names.remove(ADOPT)
        if names:
            return self._tools.roads.order(source.peer, names)[0]
        none = TransferError(TransferFault.UNSUPPORTED, "No transport was left to try.")
        raise next(reversed(self._failures.values()), none)

    async def _connect(self, road: str) -> None:
        """Makes the pair usable; an address that is used up or refused is asked for anew, once.

        Refused is, too, what an earlier attempt used up without knowing, since it was cancelled half way.
        """
        if not road:
            return
        source, transport = self._order.source, self._tools.transports[road]
        told = source.endpoint(road)
        try:
            await transport.connect(source.peer, told.address, told.ticket, source.block_bytes)
        except TransferError as error:
            if error.fault not in (TransferFault.STALE_EPOCH, TransferFault.REFUSED):
                raise
            told = (await self._tools.sources.renew(source)).endpoint(road)
            await transport.connect(source.peer, told.address, told.ticket, source.block_bytes)

    async def _ask(self, road: str) -> PullGrant | None:
        """A lease on the next piece, None when nothing is ready yet.

        An unanswered pull is repeated once under the same number: it grants only once.
        """
        tools, machine = self._tools, self._machine
        terms = self._begin_ask(road)
        number = terms.transfer.number
        began_s = tools.clock()
        for last in (False, True):
            asked_s = tools.clock()
            try:
                grant = await self._order.source.client.pull(terms, asked_s, tools.times.answer_s / 2)
            except TransferError as error:
                await self._ask_failed(number, error, last)
                continue
            self._costs.accept_s += tools.clock() - began_s
            if grant is None:
                machine.not_ready(number)
                return None
            machine.granted(number, grant.lease_until_s)
            self._check_grant(grant)
            return grant
        raise TransferError(TransferFault.TIMEOUT, "The pull was not answered.")

    def _begin_ask(self, road: str) -> PullTerms:
        tools, machine = self._tools, self._machine
        number = next(tools.numbers)
        now_s = tools.clock()
        machine.ask(number, now_s)
        transfer = Transfer(machine.key, number, self._wanted[0])
        return PullTerms(transfer, road, self._order.priority, max(0.0, self._order.deadline_s - now_s))

    async def _ask_failed(self, number: int, error: TransferError, last: bool) -> None:
        """Returns after a pause when the call may be repeated; raises the error otherwise."""
        unanswered = error.fault in (TransferFault.DISCONNECTED, TransferFault.TIMEOUT)
        if unanswered and not last:
            await asyncio.sleep(RETRY_PAUSE_S)
            return
        if unanswered:
            await self._tools.sources.forget_failed(self._order.source)
        self._machine.refused(number)
        raise error

    def _check_grant(self, grant: PullGrant) -> None:
        """Raises TransferError (LENGTH) for a grant that is not a piece of what was asked for."""
        memory, part = self._tools.memory, grant.transfer.block_range
        try:
            remainder(self._wanted[0], part, self._layers)
            first, end = layer_span(part, self._layers)
            expected = (first * memory.layer_bytes, (end - first) * memory.layer_bytes)
            length = expected[1] * part.num_blocks
            if (grant.part_offset, grant.part_bytes) != expected or grant.length_bytes != length:
                message = (
                    f"{grant.length_bytes} bytes were granted for {part.num_blocks} parts of {expected}."
                )
                raise TransferError(TransferFault.LENGTH, message)
        except TransferError as error:
            self._machine.cancel()
            self._tools.roads.refused(error.fault)
            raise

    async def _fetch(self, grant: PullGrant, road: str) -> None:
        """Moves and hashes one piece."""
        tools, machine = self._tools, self._machine
        part = grant.transfer.block_range
        begin = part.first_block - self._order.block_range.first_block
        targets = self._order.targets[begin : begin + part.num_blocks]
        adopts = self._adoption is not None and road == ADOPT
        if self._adoption is not None and adopts:
            self._adoption.note(grant)
        # What does not move is not hashed: it would be compared with itself.
        hasher = None if adopts else tools.hashers.get(self._order.source.checksum)
        landing = Landing(grant, targets, hasher)
        began_s = tools.clock()
        machine.move_started()
        try:
            if road:
                self._costs.copy_s += await self._receive(grant, road, targets, landing)
            moved_s = tools.clock()
            if not machine.moved(moved_s):
                raise TransferError(TransferFault.LEASE, "The lease ended before all blocks had come.")
            checksum = await landing.checksum(tools.executor)
        except (TransferError, asyncio.CancelledError):
            machine.move_failed()
            raise
        rest = remainder(self._wanted.pop(0), part, self._layers)
        if rest is not None:
            self._wanted.insert(0, rest)
        machine.held(not self._wanted, tools.clock())
        self._costs.move_s += moved_s - began_s
        self._costs.verify_s += tools.clock() - moved_s
        self._moved_bytes += grant.length_bytes
        if road:
            self._road = road
            self._held[grant.transfer.number] = _Held(part, road, checksum)
            tools.roads.worked(self._order.source.peer, road)
            self._order.on_piece(part)

    async def _receive(
        self, grant: PullGrant, road: str, targets: tuple[BlockId, ...], landing: Landing
    ) -> float:
        """As SinkTransport.receive; ends what overruns its lease or shows no progress for too long."""
        config, transport = self._tools.config, self._tools.transports[road]
        receiving = asyncio.create_task(
            transport.receive(self._order.source.peer, grant, targets, landing.landed)
        )
        left_bytes = -1
        try:
            async with asyncio.timeout(grant.lease_until_s - self._tools.clock()):
                while not receiving.done():
                    if landing.left_bytes == left_bytes:
                        raise TransferError(TransferFault.TIMEOUT, "The transfer makes no progress.")
                    left_bytes = landing.left_bytes
                    bound_s = config.stall_s + left_bytes / config.slowest_bytes_per_s
                    await asyncio.wait((receiving,), timeout=bound_s)
                return await receiving
        except TimeoutError as error:
            raise TransferError(TransferFault.LEASE, "The lease ended during the transfer.") from error
        finally:
            receiving.cancel()
            if await outlast(receiving):
                # Else the pull would go on over another transport, and its deadline is used up.
                raise asyncio.CancelledError

    async def _wait_until_ready(self) -> None:
        """Lets the source tell when more is ready; a lost answer costs one more question."""
        tools, machine = self._tools, self._machine
        terms = self._begin_ask(self._road or self._first_road())
        number = terms.transfer.number
        began_s = tools.clock()
        try:
            await self._order.source.client.wait(terms, WAIT_S, WAIT_S + tools.times.answer_s)
        except TransferError as error:
            if error.fault not in (TransferFault.DISCONNECTED, TransferFault.TIMEOUT):
                machine.refused(number)
                raise
            await asyncio.sleep(RETRY_PAUSE_S)
        machine.not_ready(number)
        self._costs.ready_s += tools.clock() - began_s

    def _first_road(self) -> str:
        return self._order.source.endpoints[0].transport if self._order.source.endpoints else ""

    async def _commit(self) -> None:
        """Until the source agrees, or some pieces are wanted again. Raises TransferError when it is over."""
        machine, began_s = self._machine, self._tools.clock()
        if self._adoption is None or self._road != ADOPT:
            failure = await self._agree(None)
        else:
            told = AdoptAddress.decode(self._order.source.endpoint(ADOPT).address)
            with self._adoption.on_offer(told.member) as exchange:
                failure = await self._agree(exchange)
            if machine.may_use and not self._adoption.complete:
                raise TransferError(TransferFault.LEASE, "The source agreed and gave nothing.")
        self._costs.commit_s += self._tools.clock() - began_s
        if machine.state.terminal and not machine.may_use:
            raise failure

    async def _agree(self, exchange: FrameExchange | None) -> TransferError:
        """Commits until the hand-off is over or wanted again; why it failed, should it have failed."""
        tools, machine = self._tools, self._machine
        sums = {number: held.checksum for number, held in self._held.items()}
        number, lost = machine.number or 0, 0
        failure = TransferError(TransferFault.LEASE, "The source had taken its offer back before the commit.")
        while not machine.state.terminal:
            try:
                status = await self._order.source.client.commit(
                    machine.key, number, sums, COMMIT_CALL_S, exchange
                )
            except TransferError as error:
                if error.fault in (TransferFault.REFUSED, TransferFault.LENGTH):
                    machine.cancel()
                    raise
                failure = error
                lost += error.fault is TransferFault.DISCONNECTED
                if lost > 1:
                    machine.source_lost()
                else:
                    machine.tick(tools.clock())
                    await asyncio.sleep(RETRY_PAUSE_S)
                continue
            if status.mismatched:
                self._take_back(status)
                break
            machine.status(status.state, tools.clock())
            machine.tick(tools.clock())
            if not machine.state.terminal:
                # The source still holds it, which a commit of now ends or finds wanting: asked in vain. Or a
                # step of the source still touches blocks that are to be adopted.
                await asyncio.sleep(RETRY_PAUSE_S if exchange is None else BUSY_PAUSE_S)
        return failure

    def _take_back(self, status: CommitStatus) -> None:
        """Wants the pieces again that are not as the source has them, over other transports."""
        self._machine.mismatched()
        wrong = TransferError(TransferFault.CHECKSUM, "Bytes did not arrive as they were sent.")
        found = [self._held.pop(number) for number in status.mismatched if number in self._held]
        if not found:
            raise wrong
        for held in found:
            self._wanted.append(held.block_range)
            if held.road not in self._failures:
                self._note_failure(held.road, wrong)

    def _note_failure(self, road: str, error: TransferError) -> None:
        source = self._order.source.peer
        _log.info(
            "transfer failed",
            leg=self._machine.key.leg_id,
            source=source.worker_id,
            transport=road,
            fault=error.fault.value,
            error=str(error),
        )
        if road and road not in self._failures:
            self._failures[road] = error
            self._tools.roads.failed(source, road, error.fault)
        if road == ADOPT:
            # All of it is copied, then.
            self._wanted += [held.block_range for held in self._held.values()]
            self._held.clear()
