"""Pure: the longest gap between two tokens of a sample, from the steps of its worker."""

from bisect import bisect_left


class GapLog:
    """The gaps before the steps of one worker; keeps only those that some sample may still ask for."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._gaps_s: list[float] = []

    def note(self, step: int, gap_s: float) -> None:
        """Up to `step`, since the step noted before, the longest gap was `gap_s`; steps ascend."""
        while self._gaps_s and self._gaps_s[-1] <= gap_s:
            self._gaps_s.pop()
            self._steps.pop()
        self._steps.append(step)
        self._gaps_s.append(gap_s)

    def longest_s(self, first_step: int) -> float:
        """The longest gap before `first_step` or a later step; 0 when there was none."""
        at = bisect_left(self._steps, first_step)
        return self._gaps_s[at] if at < len(self._gaps_s) else 0.0

    def clear(self) -> None:
        """Nobody decodes: no gap counts any more."""
        self._steps.clear()
        self._gaps_s.clear()
