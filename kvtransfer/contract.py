"""Pure: what a transport of KV blocks promises, and the messages at its border.

The puller (sink) drives: it asks the source for a lease on a piece of a leg's KV, moves it over one
transport, asks for the next one, and commits with the checksums of what it holds, which the source compares.
The contract fits one-sided transports (shm, cuda_ipc: the sink reads the source's memory under the lease) and
two-sided, ordered ones (tcp, nccl: the source sends when it grants the pull; the sink numbers the transfers
of a pair and the source serves them in that order).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kvtransfer.nccl.communicator import CommunicatorLimits
from tandem.errors import TransferFault
from tandem.ids import BlockId, Incarnation, LegId, WorkerId
from tandem.worker import WorkerRecord
from tandem.worker_config import TlsConfig


class BlockMemory(Protocol):
    """The bytes of a worker's KV pool, block by block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        ...

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer in a block: layers [a, b) of a block are its bytes [a, b) * layer_bytes."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        ...

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one block, length block_bytes, without a copy."""
        ...

    def window(self, begin: int, length: int) -> memoryview:
        """Writable bytes [begin, begin + length) of the pool, no copy; block i is at i * block_bytes."""
        ...

    def fileno(self) -> int | None:
        """Descriptor of the shared memory with block i at offset i * block_bytes; None if there is none."""
        ...


@runtime_checkable
class DeviceBlockMemory(Protocol):
    """Where a KV pool lies on an accelerator; a BlockMemory may have this form, too.

    A pool on a device has no `view` and no `fileno`. An offered block's bytes are complete on the device
    when it is offered: the step that wrote them was waited for.
    """

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        ...

    @property
    def device_index(self) -> int | None:
        """Which CUDA device holds the pool; None when it is in host memory."""
        ...

    @property
    def device_address(self) -> int:
        """Address of block 0; block i lies at device_address + i * block_bytes."""
        ...


class FrameArena(Protocol):
    """One worker's part in an arena: memory in which several workers have their pools.

    A block has one number for all of them and one owner; blocks change owners by exchanges, pair by pair.
    """

    @property
    def name(self) -> str:
        """The arena's: equal names mean the same memory."""
        ...

    @property
    def member(self) -> int:
        """This worker's number in it, which nobody else ever had."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole arena."""
        ...

    def offer(self, giver: int, taken: Sequence[BlockId]) -> None:
        """The giver may have these of our blocks, each for one of its own, until `settle`."""
        ...

    def settle(
        self, giver: int, given: Sequence[BlockId], taken: Sequence[BlockId]
    ) -> tuple[tuple[BlockId, BlockId], ...]:
        """Ends an offer at once: (taken, given) of the pairs that changed owners."""
        ...

    def give(
        self, taker: int, given: Sequence[BlockId], taken: Sequence[BlockId]
    ) -> tuple[tuple[BlockId, BlockId], ...]:
        """Takes what a taker has on offer, for blocks of ours: (given, taken) of the pairs."""
        ...

    def populate(self) -> None:
        """Fills this process's page table for what has owners; for a thread."""
        ...


class KvGiver(Protocol):
    """Gives blocks of a leg away; called on the event loop."""

    def give(self, leg_id: LegId, taker: int, given: Sequence[BlockId], taken: Sequence[BlockId]) -> bool:
        """Whether the leg's blocks `given` are the taker's now; `taken` are at their places in the leg then.

        False, and nothing happened, while a step touches them, or when the taker has taken its offer back.
        """
        ...


@dataclass(frozen=True, slots=True)
class PeerId:
    """One life of a worker."""

    worker_id: WorkerId
    incarnation: Incarnation

    @classmethod
    def of(cls, record: WorkerRecord) -> "PeerId":
        """The life that a record describes."""
        return cls(record.worker_id, record.incarnation)

    def older_life_of(self, other: "PeerId") -> bool:
        """Whether it is the same worker before it was started anew."""
        return self.worker_id == other.worker_id and self.incarnation < other.incarnation


@dataclass(frozen=True, slots=True)
class HandoffKey:
    """Names one hand-off; a source refuses an epoch older than the one it offered."""

    leg_id: LegId
    epoch: int


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Part of a leg's KV: blocks by index in its block list, layers by number.

    num_layers 0 means all from first_layer on.
    """

    first_block: int
    num_blocks: int
    first_layer: int = 0
    num_layers: int = 0


@dataclass(frozen=True, slots=True)
class KvReady:
    """How much of a growing offer may be pulled; both numbers only grow.

    The offer's first `blocks` blocks are complete in every layer. Layers [0, `layers`) are complete in
    *every* block of the offer: while later prompt chunks are still to come it is 0, in the last chunk's step
    it counts that step's finished layers. All blocks, or all layers, make the offer complete.
    """

    blocks: int
    layers: int


@dataclass(frozen=True, slots=True)
class HeadRange:
    """The KV heads that a tensor-parallel rank holds: [first, first + count) of `total`."""

    first: int
    count: int
    total: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Names one attempt to move one range; both sides of a two-sided transport check all of it.

    `number` grows with every attempt of a sink, so a source can tell a late message from a new one.
    """

    key: HandoffKey
    number: int
    block_range: BlockRange


@dataclass(frozen=True, slots=True)
class PullGrant:
    """The source's consent: its blocks stay put until `lease_until_s` on the sink's monotonic clock.

    `lease_until_s` is computed by the sink from the time it *sent* the request, so it never ends later than
    the source believes. `transfer.block_range` is what is granted, which may be less than what was asked for.
    `source_blocks` index the source's pool; of each block (there and here) only the bytes [part_offset,
    part_offset + part_bytes) are granted. `length_bytes` is part_bytes for each block together.
    """

    transfer: Transfer
    source_blocks: tuple[BlockId, ...]
    part_offset: int
    part_bytes: int
    length_bytes: int
    lease_until_s: float


class OnLanded(Protocol):
    """Is told what landed of one transfer."""

    def __call__(self, first: int, count: int, xxh3: Sequence[int] | None = None) -> None:
        """target[first : first + count] are whole, and written no more by this receive.

        `xxh3` are the XXH3-64 of their parts, where the transport computed them from what lies there now.
        """
        ...


OnRefused = Callable[[TransferFault], None]
"""Is told on the event loop of a data connection, or a request on one, that a source refused."""


class SourceTransport(Protocol):
    """The giving side of one transport, for all sinks of a worker."""

    @property
    def name(self) -> str:
        """Name in cluster.yaml and in the messages."""
        ...

    @property
    def direct(self) -> bool:
        """Whether sinks read this process's memory themselves, so that only they know when they stopped."""
        ...

    @property
    def same_host(self) -> bool:
        """Whether it only works between processes of one host."""
        ...

    async def start(self, on_link_lost: Callable[[PeerId], None], on_refused: OnRefused) -> None:
        """Opens what must be open before `endpoint` is asked; raises OSError if it cannot.

        `on_link_lost` is called on the event loop when the last link to a sink broke: the sink is dead, or it
        had ended all its reading before it closed the link. `on_refused` is called for every peer, and every
        request of one, that is turned away.
        """
        ...

    def endpoint(self, sink: PeerId, ticket: bytes) -> str | None:
        """Address for this sink, who will prove `ticket`; None if the pair cannot use this transport."""
        ...

    def forget(self, sink: PeerId) -> None:
        """The sink is gone: it gets no new link until `endpoint` is asked for it again; idempotent.

        Where sinks read this process's memory, a link that it still has stays: only its end proves that the
        sink reads nothing any more.
        """
        ...

    async def send(
        self, sink: PeerId, transfer: Transfer, blocks: Sequence[BlockId], part_offset: int, part_bytes: int
    ) -> None:
        """Gives the bytes [part_offset, part_offset + part_bytes) of each block, in order.

        When it returns, raises TransferError or was cancelled, nothing here reads them. Direct transports
        return at once. Bounded by the lease that the caller enforces by cancelling.
        """
        ...

    async def close(self) -> None:
        """Ends everything within 2 s; idempotent."""
        ...


class SinkTransport(Protocol):
    """The taking side of one transport, for all sources of a worker."""

    @property
    def name(self) -> str:
        """Name in cluster.yaml and in the messages."""
        ...

    async def connect(self, source: PeerId, address: str, ticket: bytes, block_bytes: int) -> None:
        """Makes the pair usable; raises TransferError. Cheap when the link to the same incarnation lives.

        The fault STALE_EPOCH says that this address is used up and the source must be asked for another.
        """
        ...

    async def receive(
        self,
        source: PeerId,
        grant: PullGrant,
        target: Sequence[BlockId],
        on_landed: OnLanded | None = None,
    ) -> float:
        """Writes the granted part of each block into the same part of the target blocks, in order.

        Gives the seconds from when its thread began on the bytes (by asking for them, where they come over a
        connection) until the last was there: all but the ways between the event loop and the thread.

        `on_landed` may be called from any thread, at most once for a block, as soon as the block is there
        (its caller hashes it while it is in the CPU's cache, and sees that the transfer goes on); blocks it
        was not called for are looked at when `receive` has returned. It may raise; then the transfer fails
        so. Raises TransferError on failure or when the lease would be overrun. When it returns, raises or was
        cancelled, nothing writes the target blocks or reads the source's any more.
        """
        ...

    async def disconnect(self, source: PeerId) -> None:
        """Forgets one incarnation of a source, ending what runs with it first; idempotent."""
        ...

    async def close(self) -> None:
        """Ends everything within 2 s; idempotent."""
        ...


class TransferObserver(Protocol):
    """Is told what metrics count; every method returns at once and is called on the event loop."""

    def transferred(self, transport: str) -> None:
        """A transfer (a piece of a hand-off) landed."""
        ...

    def failed(self, transport: str, fault: TransferFault) -> None:
        """A transfer over a transport failed, or the transport could not be connected."""
        ...

    def road_taken(self, source: PeerId, before: str, now: str) -> None:
        """A transfer from a source landed over another transport than the one before; empty for none.

        `now` is empty when the source is forgotten.
        """
        ...

    def refused(self, fault: TransferFault) -> None:
        """A sink's request, or the bytes of one, were refused here."""
        ...

    def link_refused(self, transport: str, fault: TransferFault) -> None:
        """A data connection to this source, or a request on one, was refused."""
        ...


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a successful pull cost; `transport` is that of the last piece, empty when no block had to move.

    Seconds of all pieces together: `accept_s` for the source to grant, `ready_s` waiting for a growing offer,
    `queue_s` for a turn among this sink's transfers, `move_s` for the bytes (hashing that the transport does
    on the way included), `copy_s` for what SinkTransport.receive says of it, `verify_s` for hashing what it
    left, `commit_s` for the source to compare and agree, `decode_s` for a wire codec to write what it had
    not written of the pool's blocks by then.
    """

    transport: str
    moved_bytes: int
    pieces: int
    accept_s: float
    ready_s: float
    queue_s: float
    move_s: float
    copy_s: float
    verify_s: float
    commit_s: float
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How a worker gives and takes KV; `transports` are tried in this order.

    `heads` are the KV heads of this worker's blocks; None means all. `fence_margin_s` is how long after a
    lease's end the source still keeps blocks that a sink may be reading. `regrasp_s` is how long a sink whose
    link broke has to pull again before its hand-off is given up. `settle_s` bounds the wait for a commit to
    be acknowledged; `forget_s` is how long a source remembers an ended hand-off. `max_pulls` bounds the
    transfers of a sink at one time; others wait by priority. A transfer that shows no progress for `stall_s`,
    not counting what its bytes take at `slowest_bytes_per_s`, is given up. A transport that failed is left
    aside for `backoff_s`, doubled with every failure in a row up to `backoff_cap_s`. With `tls`, tcp speaks
    TLS and only with those whom its authority knows. `communicators` bounds what NCCL may take.
    """

    transports: tuple[str, ...] = ("shm", "tcp")
    bind_host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    heads: HeadRange | None = None
    lease_s: float = 5.0
    park_s: float = 30.0
    connect_timeout_s: float = 1.5
    checksum: bool = True
    max_pulls: int = 4
    fence_margin_s: float = 0.25
    regrasp_s: float = 1.0
    settle_s: float = 2.0
    forget_s: float = 10.0
    stall_s: float = 1.5
    slowest_bytes_per_s: float = 16e6
    backoff_s: float = 1.0
    backoff_cap_s: float = 30.0
    tls: TlsConfig | None = None
    communicators: CommunicatorLimits = field(default_factory=CommunicatorLimits)
