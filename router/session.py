"""Pure: the life of one request, from its arrival to its last token; reads like "the way of a request".

A session owns its samples and legs. Each method is one input: something that the router did, or that a worker
said. It returns the commands that the edge must carry out. News of a leg that is over, or from a worker that
is not the one at work on it, is ignored; news that the table of router/leg.py has no row for raises
ProtocolError, upon which the edge calls `violated`.

Every failure ends a leg and starts new ones in its place: one for each unfinished sample (samples without a
token yet share one), which reads prompt and tokens so far and goes on at the next index. Failures of a
sample are bounded by max_replacements. A pre-emption, an expired offer, a full or draining worker is no
failure: these are bounded by the request's deadline, and a full worker by a growing pause as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.leg import DropReason
from router.commands import (
    DROP_RULES,
    Cancel,
    Command,
    DropRule,
    PlaceDecode,
    PlacePrefetch,
    PlacePrefill,
    SendDecode,
)
from router.leg import ENDED, TRANSITIONS, WAY, Input, Leg, State, after
from router.request import GenerationRequest, GenerationUpdate, TokenUsage
from router.sample import Sample
from router.text_stream import TextStream
from router.timeline import Pace, SampleTimes, Timeline
from router.worker_key import WorkerKey
from tandem.errors import DeadlineExceeded, NotReady, ProtocolError, TandemError
from tandem.ids import LegId
from tandem.sampling import FinishReason, TokenLogprob
from tandem.slo import SloClass

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class SessionRules:
    """What a session needs to know besides its request."""

    slo: SloClass
    deadline_s: float
    max_replacements: int
    end_ids: frozenset[int]
    """End-of-sequence and stop token ids that end a sample of this request."""
    new_leg_id: Callable[[], LegId]
    new_text: Callable[[], TextStream | None]
    """Makes a sample's text; None when nobody reads it."""
    note_gap: Callable[[float], None]
    """Told each gap between two emissions of a sample, in seconds."""


class Session:
    """One request. Owns its state, its legs, its next indices and its text."""

    def __init__(self, request: GenerationRequest, rules: SessionRules) -> None:
        self.request = request
        self.rules = rules
        self.error: TandemError | None = None
        self.usage_cached_tokens = 0
        count = request.sampling.n
        resume = {point.sample_index: point for point in request.resume}
        starts = [resume[i].next_index if i in resume else 0 for i in range(count)]
        self.samples = tuple(Sample(i, rules.new_text(), starts[i]) for i in range(count))
        self.timeline = Timeline(request.arrived_s, [SampleTimes() for _ in range(count)])
        self._state = State.RECEIVED
        self._legs: dict[LegId, Leg] = {}
        self._too_large = 0
        self._final_taken = False

    @property
    def state(self) -> State:
        """Where the request is: where its least advanced leg is, until it ends."""
        if self._state is not State.ADMITTED or not self._legs:
            return self._state
        return min((leg.state for leg in self._legs.values()), key=WAY.index)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self._state in ENDED

    @property
    def legs(self) -> Mapping[LegId, Leg]:
        """The legs that are not over; for reading."""
        return self._legs

    def admit(self, now_s: float) -> list[Command]:
        """The request may be served: makes its first legs; resumed samples go on where their reader is."""
        self._state = after(self._state, Input.ADMIT)
        params = self.request.sampling
        most = params.max_tokens if params.max_tokens is not None else 2**31
        for point in self.request.resume:
            sample = self.samples[point.sample_index]
            sample.prime(point.token_ids, self.rules.end_ids, most, params.min_tokens)
        commands = self._new_legs([s for s in self.samples if s.finish is None], frozenset(), now_s, now_s)
        self._finish_if_all_ended()
        return commands

    def prefill_sent(self, leg_id: LegId, worker: WorkerKey, now_s: float) -> None:
        """The leg was sent to a prefill worker."""
        leg = self._legs[leg_id]
        leg.moved(Input.PREFILL_SENT)
        leg.prefill = worker
        self.timeline.prefill_sent(worker.worker_id, now_s)

    def tokens(
        self,
        worker: WorkerKey,
        leg_id: LegId,
        sample_index: int,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        finish: FinishReason | None,
        stop_token_id: int | None,
        now_s: float,
        pace: Pace | None = None,
    ) -> Sequence[Command]:
        """A worker wrote tokens of one sample. Known indices are dropped; a gap places the sample anew.

        With a `pace` they had come one by one, none of them known.
        """
        leg = self._legs.get(leg_id)
        if leg is None or sample_index not in leg.samples or not leg.speaks(worker):
            return ()
        if (leg.state, Input.TOKENS) not in TRANSITIONS:
            raise ProtocolError("Tokens came before the KV landed.")
        sample = self.samples[sample_index]
        known = len(sample.tokens) - first_index
        if known < 0:
            return self._place_anew(leg, [sample_index], None, DropRule(counts=True), now_s)
        before = len(sample.tokens)
        stopped = sample.extend(token_ids[known:], logprobs[known:], stop_token_id is not None)
        fresh = len(sample.tokens) - max(before, sample.resume_from)
        if fresh > 0:
            gap_s = self.timeline.emitted(sample_index, fresh, now_s, pace)
            if gap_s is not None:
                self.rules.note_gap(gap_s)
        if stopped:
            return self._stopped_by_us(leg, sample)
        if finish is not None and first_index + len(token_ids) == len(sample.tokens):
            sample.end(finish, stop_token_id)
            return self._ended_by_worker(leg, sample)
        return ()

    def kv_growing(self, worker: WorkerKey, leg_id: LegId, epoch: int) -> Sequence[Command]:
        """A prefill worker reads the leg and lets its KV be pulled meanwhile: the earliest time to choose."""
        leg = self._legs.get(leg_id)
        if leg is None or not leg.speaks(worker):
            return ()
        leg.moved(Input.KV_GROWING)
        leg.epoch = epoch
        return (PlacePrefetch(leg_id),)

    def prefetch_sent(self, leg_id: LegId, worker: WorkerKey) -> None:
        """A decode worker was asked to fetch the leg's KV while it is read."""
        leg = self._legs[leg_id]
        leg.moved(Input.PREFETCH_SENT)
        leg.decode = worker

    def prefetch_lost(self, worker: WorkerKey, leg_id: LegId) -> bool:
        """A decode worker does not fetch the leg early any more; whether the leg must do without it.

        No matter once the leg was sent there: StartDecode stands by itself.
        """
        leg = self._legs.get(leg_id)
        if leg is None or leg.state is not State.PREFILLING or leg.decode != worker:
            return False
        leg.moved(Input.PREFETCH_LOST)
        leg.decode = None
        return True

    def kv_offered(
        self, worker: WorkerKey, leg_id: LegId, epoch: int, cached_tokens: int
    ) -> Sequence[Command]:
        """A prefill worker has read the leg's tokens and parks their KV: time to choose the decode worker."""
        leg = self._legs.get(leg_id)
        if leg is None or not leg.speaks(worker):
            return ()
        output_so_far = len(leg.token_ids) - len(self.request.token_ids)
        if any(len(self.samples[i].tokens) <= output_so_far for i in leg.samples):
            raise ProtocolError("KV was offered before its token came.")
        leg.moved(Input.KV_OFFERED)
        fetching, leg.decode = leg.decode, None
        same_offer, leg.epoch = epoch == leg.epoch, epoch
        leg.cached_tokens = cached_tokens
        if output_so_far == 0:
            self.usage_cached_tokens = max(self.usage_cached_tokens, cached_tokens)
        if fetching is None:
            return (PlaceDecode(leg_id),)
        if same_offer:
            return (SendDecode(leg_id, fetching),)
        return (Cancel(fetching, leg_id), PlaceDecode(leg_id))

    def decode_sent(self, leg_id: LegId, worker: WorkerKey) -> None:
        """The leg was sent to a decode worker, which will fetch the KV."""
        leg = self._legs[leg_id]
        leg.moved(Input.DECODE_SENT)
        leg.decode = worker

    def kv_landed(
        self, worker: WorkerKey, leg_id: LegId, transport: str, moved_bytes: int, now_s: float
    ) -> bool:
        """A decode worker holds the leg's KV and goes on with it; returns whether that was news."""
        leg = self._legs.get(leg_id)
        if leg is None or not leg.speaks(worker):
            return False
        if worker != leg.decode:
            raise ProtocolError("KV landed at a worker that was not asked to fetch it.")
        leg.moved(Input.KV_LANDED)
        self.timeline.landed(worker.worker_id, transport, moved_bytes, now_s)
        return True

    def dropped(
        self,
        worker: WorkerKey,
        leg_id: LegId,
        sample_indices: Sequence[int],
        reason: DropReason,
        message: str,
        now_s: float,
    ) -> Sequence[Command]:
        """A worker gave up the leg, or some samples of it (empty: all): places them anew, or fails all."""
        leg = self._legs.get(leg_id)
        if leg is None or not leg.speaks(worker):
            return ()
        if reason is DropReason.DEADLINE:
            return self.fail(DeadlineExceeded("The deadline passed at a worker."))
        if reason is DropReason.TOO_LARGE:
            self._too_large += 1
            if self._too_large > 1:
                return self.fail(NotReady(f"The request fits on no worker: {message}"))
        named = [i for i in leg.samples if not sample_indices or i in sample_indices]
        return self._place_anew(leg, named, worker, DROP_RULES[reason], now_s) if named else ()

    def worker_lost(self, worker: WorkerKey, now_s: float) -> list[Command]:
        """A worker died or went out of reach: its legs are placed anew, unless it only fetched them early."""
        commands: list[Command] = []
        for leg in [leg for leg in self._legs.values() if worker in leg.workers()]:
            lost_early = worker != leg.prefill and self.prefetch_lost(worker, leg.leg_id)
            if leg.leg_id in self._legs and not lost_early:
                commands += self._place_anew(leg, list(leg.samples), worker, DropRule(counts=True), now_s)
        return commands

    def violated(self, leg_id: LegId, now_s: float) -> Sequence[Command]:
        """A worker broke the protocol on this leg: it is placed anew."""
        leg = self._legs.get(leg_id)
        if leg is None or leg.state is State.ADMITTED:
            return ()
        return self._place_anew(leg, list(leg.samples), None, DropRule(counts=True), now_s)

    def cancel(self) -> list[Command]:
        """The client left, or an operator cancelled; nothing happens when the request has ended."""
        return [] if self.ended else self._end(Input.CANCEL)

    def fail(self, error: TandemError) -> list[Command]:
        """The request cannot be served; nothing happens when it has ended."""
        if self.ended:
            return []
        self.error = error
        return self._end(Input.FAIL)

    def usage(self) -> TokenUsage:
        """Tokens of prompt and output so far."""
        completion = sum(len(sample.tokens) for sample in self.samples)
        return TokenUsage(len(self.request.token_ids), completion, self.usage_cached_tokens)

    def take_update(self, now_s: float) -> GenerationUpdate | None:
        """What the reader has not had yet, None if nothing; the last one carries usage and timeline."""
        chunks = tuple([chunk for sample in self.samples if (chunk := sample.take_chunk()) is not None])
        if self._state is State.FINISHED and not self._final_taken:
            self._final_taken = True
            return GenerationUpdate(chunks, self.usage(), self.timeline.report(self.rules.slo, now_s))
        return GenerationUpdate(chunks) if chunks else None

    def _new_legs(
        self, samples: Sequence[Sample], avoid: frozenset[WorkerKey], not_before_s: float, now_s: float
    ) -> list[Command]:
        """Legs for unfinished samples: those without a token share one, the others get one each."""
        groups = [[sample] for sample in samples if sample.tokens]
        fresh = [sample for sample in samples if not sample.tokens]
        commands: list[Command] = []
        for group in [fresh, *groups] if fresh else groups:
            leg_id = self.rules.new_leg_id()
            prompt, so_far = self.request.token_ids, group[0].tokens
            token_ids = (*prompt, *so_far) if so_far else prompt
            members = [sample.index for sample in group]
            self._legs[leg_id] = Leg(leg_id, token_ids, members, now_s, avoid, not_before_s)
            for sample in group:
                sample.leg_id = leg_id
            commands.append(PlacePrefill(leg_id))
        return commands

    def _place_anew(
        self, leg: Leg, indices: Sequence[int], told_by: WorkerKey | None, rule: DropRule, now_s: float
    ) -> list[Command]:
        """Takes samples out of a leg (the leg ends with its last) and gives them new legs elsewhere."""
        after(leg.state, Input.PLACE_ANEW)
        whole = len(indices) == len(leg.samples)
        named = () if whole else tuple(indices)
        commands: list[Command] = [
            Cancel(worker, leg.leg_id, named) for worker in leg.workers() if worker != told_by
        ]
        avoid = leg.avoid | set(leg.workers())
        leg.samples = [i for i in leg.samples if i not in indices]
        if whole:
            del self._legs[leg.leg_id]
        self.timeline.replacements += 1
        moving = [self.samples[i] for i in indices]
        pause_s = 0.0
        for sample in moving:
            sample.failures += rule.counts
            if rule.pauses:
                pause_s = max(pause_s, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(sample.overloads, 10)))
                sample.overloads += 1
        if any(sample.failures > self.rules.max_replacements for sample in moving):
            error = NotReady(f"The request failed on {self.rules.max_replacements + 1} placements.")
            return [*commands, *self.fail(error)]
        return [*commands, *self._new_legs(moving, frozenset(avoid), now_s + pause_s, now_s)]

    def _stopped_by_us(self, leg: Leg, sample: Sample) -> list[Command]:
        """A stop string ended the sample: its workers don't know yet."""
        workers = leg.workers()
        self._sample_ended(leg, sample)
        named = (sample.index,) if leg.samples else ()
        return [Cancel(worker, leg.leg_id, named) for worker in workers]

    def _ended_by_worker(self, leg: Leg, sample: Sample) -> Sequence[Command]:
        """Who wrote the last token knows; who fetches the leg early does not."""
        fetching = leg.decode if leg.state is State.PREFILLING else None
        self._sample_ended(leg, sample)
        return () if fetching is None or leg.samples else (Cancel(fetching, leg.leg_id),)

    def _sample_ended(self, leg: Leg, sample: Sample) -> None:
        sample.leg_id = None
        leg.samples.remove(sample.index)
        if not leg.samples:
            del self._legs[leg.leg_id]
            self._finish_if_all_ended()

    def _finish_if_all_ended(self) -> None:
        if not self._legs and all(sample.finish is not None for sample in self.samples):
            self._state = after(self._state, Input.ALL_ENDED)

    def _end(self, happened: Input) -> list[Command]:
        self._state = after(self._state, happened)
        commands: list[Command] = [
            Cancel(worker, leg.leg_id) for leg in self._legs.values() for worker in leg.workers()
        ]
        self._legs.clear()
        for sample in self.samples:
            sample.leg_id = None
        return commands
