"""Pure: when the steps of a run of decode steps end, how many are over by now, and the gaps between them."""

from planner.latency import LatencyModel
from planner.simulation.gap_log import GapLog
from router.timeline import Pace


class RunClock:
    """The steps of one decode worker. At most one run is in flight, and it can be cut short.

    The time of a step is taken not to fall as contexts grow. `steps` counts all that are over, `taken` those
    of the run in flight, which ends after `ends_after`; `batch` is 0 between runs.
    """

    __slots__ = (
        "_ahead",
        "_ahead_s",
        "_context",
        "_gaps",
        "_latency",
        "batch",
        "ends_after",
        "last_end_s",
        "start_s",
        "steps",
        "taken",
    )

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency
        self._gaps = GapLog()
        self._context = 0
        # The step of the run whose end was asked for last, and that end.
        self._ahead = 0
        self._ahead_s = 0.0
        self.batch = 0
        self.taken = 0
        self.ends_after = 0
        self.steps = 0
        self.start_s = 0.0
        self.last_end_s = 0.0

    def begin(self, start_s: float, batch: int, context_tokens: int) -> None:
        """A run begins whose first step reads so many tokens."""
        self.start_s, self.batch, self._context = start_s, batch, context_tokens
        self.taken = self._ahead = 0

    def end_after(self, steps: int) -> float:
        """The run in flight is to end after so many steps; when that is."""
        self.ends_after = steps
        return self._ahead_s if steps == self._ahead else self._end_of(steps)

    def taken_by_now(self, now_s: float) -> tuple[int, float]:
        """Steps of the run in flight that are over, its last excepted, and when the last of them ended.

        The model's inverse, mended where rounding misled it.
        """
        guess = self._latency.decode_steps_within(self.batch, self._context, now_s - self.start_s)
        taken = max(self.taken, min(guess, self.ends_after - 1))
        end_s = self._end_of(taken)
        while taken > self.taken and end_s > now_s:
            taken -= 1
            end_s = self._end_of(taken)
        while taken + 1 < self.ends_after:
            self._ahead, self._ahead_s = taken + 1, self._end_of(taken + 1)
            if self._ahead_s > now_s:
                break
            taken, end_s = self._ahead, self._ahead_s
        return taken, end_s

    def note(self, taken: int, end_s: float, joined: bool) -> float | None:
        """Steps of the run in flight up to the `taken`th, which ended then, are over.

        Gives when its first one ended where that matters: somebody `joined` with it, or the worker rested.
        """
        first_s = None
        if self.taken == 0 and (joined or self.start_s > self.last_end_s):
            first_s = end_s if taken == 1 else self._end_of(1)
            self._gaps.note(self.steps + 1, first_s - self.last_end_s)
        longest_s = end_s - max(self.last_end_s, self.start_s)
        if taken - self.taken > 1:
            context = self._context + (taken - 1) * self.batch
            longest_s = self._latency.decode_run_s(self.batch, context, 1)
        self.steps += taken - self.taken
        self._gaps.note(self.steps, longest_s)
        self.taken, self.last_end_s = taken, end_s
        return first_s

    def step(self, end_s: float) -> None:
        """A step outside of runs ended."""
        self.steps += 1
        self._gaps.note(self.steps, end_s - self.last_end_s)
        self.last_end_s = end_s

    def pace(self, first_step: int, first_s: float) -> Pace:
        """Of a sample since the step that brought its first token not told yet."""
        return Pace(first_s, self._gaps.longest_s(first_step + 1))

    def forget_gaps(self) -> None:
        """Nobody decodes: no gap counts any more."""
        self._gaps.clear()

    def _end_of(self, step: int) -> float:
        return self.start_s + self._latency.decode_run_s(self.batch, self._context, step)
