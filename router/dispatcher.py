"""Edge: between sessions and workers: carries out what sessions command, tells them what workers say."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import structlog

from engine.leg import DropReason
from router.admission import Admission
from router.commands import Cancel, Command, PlaceDecode, PlacePrefetch, PlacePrefill, SendDecode
from router.config import RouterConfig
from router.fleet import Fleet
from router.leg_messages import prefetch_kv, start_decode, start_prefill
from router.live import LiveRequest
from router.metrics import RouterMetrics
from router.pacing import Pacer
from router.placement import Placement, WaitingLeg, Windows
from router.readiness import Readiness
from router.worker_key import WorkerKey
from router.worker_load import ReportedLoad, WorkerLoad
from tandem.errors import ProtocolError
from tandem.ids import BlockHash, LegId
from tandem.v1 import worker_pb2 as wpb
from tandem.wire import FINISH_FROM_WIRE, ROLE_FROM_WIRE, logprob_from_wire
from tandem.worker import WorkerRecord

log = structlog.get_logger(__name__)

SNAPSHOT_PAUSE_S = 1.0
"""Shortest time between two requests for a worker's whole prefix cache."""

DROP_FROM_WIRE: Mapping[int, DropReason] = MappingProxyType(
    {wpb.DropReason.Value(f"DROP_REASON_{reason.name}"): reason for reason in DropReason}
)


class Dispatcher:
    """Owns the map from legs to requests, and the placement; is the listener of all worker links."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        admission: Admission,
        readiness: Readiness,
        metrics: RouterMetrics,
        pacer: Pacer,
        clock: Callable[[], float],
    ) -> None:
        windows = Windows(config.prefill_window_tokens, config.decode_window_legs)
        self.placement = Placement(config.dispatch, config.block_size, windows)
        self.snapshots: dict[WorkerKey, wpb.LoadSnapshot] = {}
        self.welcomes: dict[WorkerKey, wpb.WorkerWelcome] = {}
        self.pair_attached = asyncio.Event()
        self._fleet = fleet
        self._admission = admission
        self._readiness = readiness
        self._metrics = metrics
        self._pacer = pacer
        self._held: list[LiveRequest] = []
        self._clock = clock
        self._by_leg: dict[LegId, LiveRequest] = {}
        self._snapshot_asked_s: dict[WorkerKey, float] = {}
        self._handlers: Mapping[str, Callable[[WorkerKey, wpb.WorkerMessage], None]] = MappingProxyType(
            {
                "step": self._step,
                "kv_offered": self._kv_offered,
                "kv_landed": self._kv_landed,
                "leg_dropped": self._leg_dropped,
                "prefetch_lost": self._prefetch_lost,
                "load": self._load,
                "cache": self._cache,
            }
        )

    def carry_out(self, live: LiveRequest, commands: Sequence[Command]) -> None:
        """Does what a session's input called for, and lets its reader look."""
        for command in commands:
            if isinstance(command, Cancel):
                cancel = wpb.CancelLeg(leg_id=command.leg_id, sample_indices=command.samples)
                self._fleet.send(command.worker, wpb.RouterMessage(cancel=cancel))
            elif isinstance(command, PlaceDecode):
                self.placement.wait_for_decode(self._waiting(live, command.leg_id))
            elif isinstance(command, PlacePrefetch):
                self._place_prefetch(live, command.leg_id)
            elif isinstance(command, SendDecode):
                self.placement.start_prefetched(command.leg_id, command.worker)
                self._send_decode(command.leg_id, command.worker, self._clock())
            else:
                self._place_prefill(live, command)
        gone = [leg_id for leg_id in live.leg_ids if leg_id not in live.session.legs]
        for leg_id in gone:
            live.leg_ids.discard(leg_id)
            self._by_leg.pop(leg_id, None)
            self.placement.forget(leg_id)
        live.news.set()
        self.pump()

    def pump(self) -> None:
        """Sends waiting legs to workers as long as there is room."""
        now_s = self._clock()
        while (placed := self.placement.next_prefill(self._admission.may_start)) is not None:
            self._send_prefill(*placed, now_s)
        while (placed := self.placement.next_decode()) is not None:
            self._send_decode(*placed, now_s)

    def owner(self, leg_id: LegId) -> LiveRequest | None:
        """The request that a leg belongs to; None when the leg is over."""
        return self._by_leg.get(leg_id)

    def attached(self, record: WorkerRecord, welcome: wpb.WorkerWelcome) -> None:
        """A worker can be sent legs from now on."""
        key = WorkerKey(record.worker_id, record.incarnation)
        role = ROLE_FROM_WIRE.get(welcome.role, record.role)
        self.welcomes[key] = welcome
        self.placement.attach(WorkerLoad(key, role, welcome.pool_blocks))
        log.info("worker attached", worker_id=key.worker_id, incarnation=key.incarnation, role=role.value)
        self._ask_snapshot(key)
        self.pair_attached.set()
        self.pump()

    def heard(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        """A message came from an attached worker."""
        handler = self._handlers.get(message.WhichOneof("body") or "")
        if handler is not None:
            handler(key, message)

    def lost(self, key: WorkerKey, reason: str) -> None:
        """A worker is gone: its legs are placed anew."""
        log.warning("worker lost", worker_id=key.worker_id, incarnation=key.incarnation, reason=reason)
        self.placement.detach(key)
        self.snapshots.pop(key, None)
        self.welcomes.pop(key, None)
        self._snapshot_asked_s.pop(key, None)
        for live in set(self._by_leg.values()):
            commands = live.session.worker_lost(key, self._clock())
            if commands or live.session.ended:
                self._note_replacement(live, "worker_lost", key)
                self.carry_out(live, commands)

    def _step(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        """The hot path: all tokens of one step in one pass."""
        now_s = self._clock()
        by_leg = self._by_leg
        for entry in message.step.sequences:
            leg_id = LegId(entry.leg_id)
            live = by_leg.get(leg_id)
            if live is None:
                continue
            logprobs = [logprob_from_wire(item) for item in entry.logprobs] if entry.logprobs else ()
            finish, stop_token_id = None, None
            if entry.finish_reason:
                finish = FINISH_FROM_WIRE.get(entry.finish_reason)
                stop_token_id = entry.stop_token_id if entry.HasField("stop_token_id") else None
            try:
                commands = live.session.tokens(
                    key,
                    leg_id,
                    entry.sample_index,
                    entry.first_index,
                    entry.token_ids,
                    logprobs,
                    finish,
                    stop_token_id,
                    now_s,
                )
            except ProtocolError as error:
                self._violated(live, leg_id, key, error)
                continue
            if commands or finish is not None:
                if any(isinstance(command, PlacePrefill) for command in commands):
                    self._note_replacement(live, "gap", key)
                self.carry_out(live, commands)
            else:
                self._token_came(live)

    def _token_came(self, live: LiveRequest) -> None:
        """Lets the reader look: at once for the first token, else when the pacer's hold is over."""
        if self._pacer.hold_s == 0.0 or not live.emitting:
            live.emitting = True
            live.news.set()
            return
        self._held.append(live)
        if len(self._held) == 1:
            asyncio.get_running_loop().call_later(self._pacer.hold_s, self._release_held)

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for live in held:
            live.news.set()

    def _kv_offered(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        offer = message.kv_offered
        leg_id = LegId(offer.leg_id)
        live = self._by_leg.get(leg_id)
        if live is None:
            return
        try:
            if offer.growing:
                self.carry_out(live, live.session.kv_growing(key, leg_id, offer.epoch))
                return
            commands = live.session.kv_offered(key, leg_id, offer.epoch, offer.cached_tokens)
        except ProtocolError as error:
            self._violated(live, leg_id, key, error)
            return
        if commands:
            self.placement.offered(leg_id, key)
            self.carry_out(live, commands)

    def _kv_landed(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        landed = message.kv_landed
        leg_id = LegId(landed.leg_id)
        live = self._by_leg.get(leg_id)
        if live is None:
            return
        now_s = self._clock()
        try:
            news = live.session.kv_landed(key, leg_id, landed.transport, landed.moved_bytes, now_s)
        except ProtocolError as error:
            self._violated(live, leg_id, key, error)
            return
        if news:
            self._readiness.handoff_landed(now_s)
            self._metrics.observe_handoff(landed)
            self.placement.landed(leg_id, key)
            self.pump()

    def _leg_dropped(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        dropped = message.leg_dropped
        leg_id = LegId(dropped.leg_id)
        live = self._by_leg.get(leg_id)
        if live is None:
            return
        reason = DROP_FROM_WIRE.get(dropped.reason, DropReason.INTERNAL)
        commands = live.session.dropped(
            key, leg_id, tuple(dropped.sample_indices), reason, dropped.message, self._clock()
        )
        if commands or live.session.ended:
            self._note_replacement(live, reason.value, key, dropped.message)
            self.carry_out(live, commands)

    def _prefetch_lost(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        lost = message.prefetch_lost
        leg_id = LegId(lost.leg_id)
        live = self._by_leg.get(leg_id)
        if live is not None and live.session.prefetch_lost(key, leg_id):
            self.placement.prefetch_lost(leg_id, key)
            log.info("early fetch lost", leg_id=leg_id, worker_id=key.worker_id, message=lost.message)

    def _load(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        load = message.load
        books = self.placement.loads.get(key)
        if books is None:
            return
        self.snapshots[key] = load
        reported = ReportedLoad(
            waiting_prefill_tokens=load.waiting_prefill_tokens,
            waiting_legs=load.waiting_legs,
            running_sequences=load.running_sequences,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            draining=load.draining,
            stalled_s=load.stalled_s,
        )
        books.heard(reported, self._clock())
        self.pump()

    def _cache(self, key: WorkerKey, message: wpb.WorkerMessage) -> None:
        cache = message.cache
        stored = [BlockHash(item) for item in cache.stored]
        removed = [BlockHash(item) for item in cache.removed]
        if self.placement.index.apply(key, cache.first_event, stored, removed, cache.snapshot):
            self._ask_snapshot(key)

    def _ask_snapshot(self, key: WorkerKey) -> None:
        now_s = self._clock()
        if now_s - self._snapshot_asked_s.get(key, float("-inf")) >= SNAPSHOT_PAUSE_S:
            self._snapshot_asked_s[key] = now_s
            self._fleet.send(key, wpb.RouterMessage(cache_snapshot=wpb.CacheSnapshotRequest()))

    def _violated(self, live: LiveRequest, leg_id: LegId, key: WorkerKey, error: ProtocolError) -> None:
        log.error(
            "protocol violated by worker",
            request_id=live.session.request.request_id,
            worker_id=key.worker_id,
            leg_id=leg_id,
            error=str(error),
        )
        commands = live.session.violated(leg_id, self._clock())
        self._note_replacement(live, "protocol", key)
        self.carry_out(live, commands)

    def _note_replacement(self, live: LiveRequest, reason: str, key: WorkerKey, message: str = "") -> None:
        self._metrics.replacements.labels(reason).inc()
        log.info(
            "leg placed anew",
            request_id=live.session.request.request_id,
            reason=reason,
            worker_id=key.worker_id,
            message=message,
        )

    def _place_prefill(self, live: LiveRequest, command: PlacePrefill) -> None:
        leg_id = command.leg_id
        leg = live.session.legs.get(leg_id)
        if leg is None:
            return
        live.leg_ids.add(leg_id)
        self._by_leg[leg_id] = live
        pause_s = leg.not_before_s - self._clock()
        if pause_s > 0:
            asyncio.get_running_loop().call_later(pause_s, self._end_pause, leg_id)
        else:
            self.placement.wait_for_prefill(self._waiting(live, leg_id))

    def _end_pause(self, leg_id: LegId) -> None:
        live = self._by_leg.get(leg_id)
        if live is not None:
            self.placement.wait_for_prefill(self._waiting(live, leg_id))
            self.pump()

    def _waiting(self, live: LiveRequest, leg_id: LegId) -> WaitingLeg:
        session = live.session
        leg = session.legs[leg_id]
        return WaitingLeg(
            leg_id,
            leg.token_ids,
            len(leg.samples),
            leg.avoid,
            session.request.priority,
            session.rules.deadline_s,
            self._clock(),
            live.started or session.request.internal,
        )

    def _send_prefill(self, leg_id: LegId, key: WorkerKey, now_s: float) -> None:
        live = self._by_leg[leg_id]
        session = live.session
        if not live.started:
            live.started = True
            if not session.request.internal:
                self._admission.started()
        session.prefill_sent(leg_id, key, now_s)
        self._fleet.send(key, start_prefill(session, live.sampling, leg_id, now_s))

    def _place_prefetch(self, live: LiveRequest, leg_id: LegId) -> None:
        """Lets a decode worker with room fetch the KV early; else the leg is placed once it is read."""
        key = self.placement.place_prefetch(self._waiting(live, leg_id))
        if key is not None:
            live.session.prefetch_sent(leg_id, key)
            self._fleet.send(
                key, prefetch_kv(live.session, leg_id, self._source(live, leg_id), self._clock())
            )

    def _send_decode(self, leg_id: LegId, key: WorkerKey, now_s: float) -> None:
        live = self._by_leg[leg_id]
        live.session.decode_sent(leg_id, key)
        source = self._source(live, leg_id)
        self._fleet.send(key, start_decode(live.session, live.sampling, leg_id, source, now_s))

    def _source(self, live: LiveRequest, leg_id: LegId) -> WorkerRecord | None:
        """The worker that reads the leg."""
        prefill = live.session.legs[leg_id].prefill
        link = None if prefill is None else self._fleet.links.get(prefill)
        return None if link is None else link.record
