"""Pure: how busy each simulated worker was, and what it did when (Chrome trace events)."""

from dataclasses import dataclass, field

MOST_SPANS = 200_000
"""Steps kept for the timeline of a worker; later ones are counted only."""


@dataclass(frozen=True, slots=True)
class Span:
    """A step, or a run of steps, of a worker."""

    start_s: float
    took_s: float
    prompt_tokens: int
    batch: int
    steps: int


@dataclass(slots=True)
class Utilisation:
    """One worker's account over all its lives."""

    keep_spans: bool = False
    busy_s: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    spans: list[Span] = field(default_factory=list)

    def step(
        self, start_s: float, took_s: float, prompt_tokens: int, decode_batch: int, steps: int = 1
    ) -> None:
        """A step ran, or so many steps with the same batch; tokens read and sequences written to in each."""
        self.busy_s += took_s
        self.steps += steps
        self.prompt_tokens += prompt_tokens
        self.output_tokens += decode_batch * steps
        if self.keep_spans and len(self.spans) < MOST_SPANS:
            self.spans.append(Span(start_s, took_s, prompt_tokens, decode_batch, steps))

    def longer(self, by_s: float) -> None:
        """The step under way takes longer than was planned; the timeline keeps the plan."""
        self.busy_s += by_s
