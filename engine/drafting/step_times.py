"""Pure: how long steps take by how many guesses they verify, learned from the steps themselves."""

from dataclasses import dataclass, field

_WEIGHT = 0.3
_LEAST_S = 1e-9


@dataclass(slots=True)
class _Point:
    """Mean of similar steps; of the first few all count alike, later the recent ones count more."""

    guesses: float
    seconds: float
    steps: int = 1

    def add(self, guesses: int, seconds: float) -> None:
        self.steps += 1
        weight = max(_WEIGHT, 1 / self.steps)
        self.guesses += weight * (guesses - self.guesses)
        self.seconds += weight * (seconds - self.seconds)


@dataclass(slots=True)
class StepTimes:
    """Step seconds at one batch size as a function of the guesses in the step.

    `since_plain` and `since_drafted` count the steps since one without and one with guesses.
    """

    since_plain: int = 0
    since_drafted: int = 0
    _points: dict[int, _Point] = field(default_factory=dict)
    _curve: list[tuple[float, float]] = field(default_factory=list)

    def observe(self, guesses: int, seconds: float) -> None:
        """Takes a step that verified `guesses` guesses, all sequences together."""
        seconds = max(seconds, _LEAST_S)
        self.since_plain = 0 if guesses == 0 else self.since_plain + 1
        self.since_drafted = 0 if guesses else self.since_drafted + 1
        place = guesses.bit_length()
        if place in self._points:
            self._points[place].add(guesses, seconds)
        else:
            self._points[place] = _Point(guesses, seconds)
        self._curve = sorted((point.guesses, point.seconds) for point in self._points.values())

    @property
    def plain_s(self) -> float | None:
        """Seconds of a step without guesses; None until there was one."""
        point = self._points.get(0)
        return None if point is None else point.seconds

    @property
    def fewest(self) -> int:
        """Guesses of the smallest verification seen; 0 if none was."""
        return round(min((point.guesses for place, point in self._points.items() if place), default=0))

    @property
    def most(self) -> int:
        """Guesses of the largest verification seen; 0 if none was."""
        return round(max((point.guesses for point in self._points.values()), default=0))

    def steps(self, guesses: int) -> int:
        """Steps seen with about as many guesses."""
        point = self._points.get(guesses.bit_length())
        return 0 if point is None else point.steps

    def seconds(self, guesses: int) -> float:
        """Expected seconds, linear between what was seen and constant beyond; 0 when nothing was."""
        below: tuple[float, float] | None = None
        for at, seconds in self._curve:
            if at >= guesses:
                if below is None or at == guesses:
                    return seconds
                share = (guesses - below[0]) / (at - below[0])
                return below[1] + share * (seconds - below[1])
            below = (at, seconds)
        return below[1] if below is not None else 0.0
