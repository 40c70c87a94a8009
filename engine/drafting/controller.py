"""Pure: how many guesses are worth verifying now.

After MagicDec (Sadhukhan et al. 2024): speed-up = E[accepted + 1] * T_decode / (T_draft + T_verify). Long
contexts make verification nearly free, large batches make it cost as much as decoding; so nothing is assumed:
acceptance and step times are measured while serving.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.drafting.draft import Draft
from engine.drafting.step_times import StepTimes

_PRIOR_ACCEPTANCE = 0.5
_WEIGHT = 0.2
_WEIGHT_OVERALL = 0.02
_PROBE_SHARE = 0.02
_MIN_PROBE_STEPS = 8
_KNOWN_STEPS = 3
_MAX_PROBE_STEPS = 2048


@dataclass(frozen=True, slots=True)
class Offer:
    """A draft that a sequence could have verified in the next step."""

    key: int
    draft: Draft


class SpeculationController:
    """Learns acceptance by sequence and step times by batch size; chooses how much of each draft to verify.

    Probing, of drafting while it is off and of plain steps while it is on, takes about 2 % of the time.
    """

    def __init__(self) -> None:
        self._acceptance: dict[int, float] = {}
        self._overall = _PRIOR_ACCEPTANCE
        self._times: dict[int, StepTimes] = {}

    def lengths(self, sequences: int, offers: Sequence[Offer]) -> list[int]:
        """How many guesses of each offer to verify in a step of `sequences` sequences."""
        times = self._times_of(sequences)
        gains = self._gains(offers)
        plain_s = times.plain_s
        if not gains or plain_s is None:
            return [0] * len(offers)
        # Grows step by step: one far too large verification would stall every sequence of the batch.
        gains = gains[: max(2 * times.most, sequences)]
        count, speedup = _best_count(sequences, gains, times)
        if count == 0:
            count = self._probe_count(times, plain_s)
        elif times.since_plain >= _probe_interval(speedup - 1.0):
            count = 0
        lengths = [0] * len(offers)
        for _, place in gains[:count]:
            lengths[place] += 1
        return lengths

    def acceptance(self, key: int) -> float:
        """Probability that a sequence's next guess holds, as far as is known."""
        return self._acceptance.get(key, self._overall)

    def expected_speedup(self, sequences: int, offers: Sequence[Offer]) -> float:
        """Tokens a second with these drafts verified whole, over tokens a second without; 1 when unknown."""
        times = self._times_of(sequences)
        gains = self._gains(offers)
        if times.plain_s is None or times.most == 0:
            return 1.0
        return _speedup(sequences, sum(gain for gain, _ in gains), len(gains), times)

    def observe_step(self, sequences: int, guesses: int, seconds: float) -> None:
        """Takes the duration of a step in which each sequence fed one token and `guesses` were verified."""
        self._times_of(sequences).observe(guesses, seconds)

    def observe_draft(self, key: int, depth: int, accepted: int) -> None:
        """Takes the fate of a draft that was `depth` guesses deep and of which `accepted` held."""
        for trial in range(min(depth, accepted + 1)):
            held = float(trial < accepted)
            known = self.acceptance(key)
            self._acceptance[key] = known + _WEIGHT * (held - known)
            self._overall += _WEIGHT_OVERALL * (held - self._overall)

    def forget(self, key: int) -> None:
        """The sequence ended; an unknown key is ignored."""
        self._acceptance.pop(key, None)

    def _times_of(self, sequences: int) -> StepTimes:
        return self._times.setdefault(sequences.bit_length(), StepTimes())

    def _gains(self, offers: Sequence[Offer]) -> list[tuple[float, int]]:
        """Expected tokens of each guess and its offer's place, best first.

        A guess at depth d of a chain holds with probability acceptance^d; guesses of a tree share what the
        tree's depth promises.
        """
        gains: list[tuple[float, int]] = []
        for place, offer in enumerate(offers):
            acceptance = self.acceptance(offer.key)
            if offer.draft.parents:
                depth = max(offer.draft.depths())
                whole = sum(acceptance**d for d in range(1, depth + 1))
                gains += [(whole / len(offer.draft), place)] * len(offer.draft)
            else:
                gains += [(acceptance**d, place) for d in range(1, len(offer.draft) + 1)]
        gains.sort(key=lambda gain: -gain[0])
        return gains

    def _probe_count(self, times: StepTimes, plain_s: float) -> int:
        count = max(1, times.fewest // 2)
        known = times.steps(count) >= _KNOWN_STEPS
        # The first steps of a new shape are slow for other reasons; they are not to decide for long.
        wait_steps = _probe_interval(times.seconds(count) / plain_s - 1.0) if known else _MIN_PROBE_STEPS
        return count if times.since_drafted >= wait_steps else 0


def _best_count(sequences: int, gains: Sequence[tuple[float, int]], times: StepTimes) -> tuple[int, float]:
    """How many guesses, best first, give the most tokens a second; and the speed-up that they promise."""
    best, best_speedup, gained = 0, 1.0, 0.0
    for count, (gain, _) in enumerate(gains, start=1):
        gained += gain
        speedup = _speedup(sequences, gained, count, times)
        if speedup > best_speedup:
            best, best_speedup = count, speedup
    return best, best_speedup


def _speedup(sequences: int, gained: float, guesses: int, times: StepTimes) -> float:
    return (1.0 + gained / sequences) * times.seconds(0) / times.seconds(guesses)


def _probe_interval(cost: float) -> int:
    """Steps between probes that each cost `cost` plain steps."""
    return int(min(max(cost / _PROBE_SHARE, _MIN_PROBE_STEPS), _MAX_PROBE_STEPS))
