"""Pure: what came to a router and how it ended, in totals; a controller decides by them."""

from collections import deque
from itertools import islice

KEPT_LENGTHS = 4096
MOST_TOLD = 256


class LoadTotals:
    """Counts since the router's start; the router's own requests are not told to it.

    `ended` numbers the requests that ended with an output; the lengths of the last few thousand are kept.
    """

    def __init__(self) -> None:
        self.offered = 0
        self.settled = 0
        self.good = 0
        self.ended = 0
        self._lengths: deque[tuple[int, int]] = deque(maxlen=KEPT_LENGTHS)

    def came(self) -> None:
        """A well-formed request arrived."""
        self.offered += 1

    def left(self, prompt_tokens: int, output_tokens: int, good: bool) -> None:
        """A request ended or was refused; one without output says nothing of lengths."""
        self.settled += 1
        self.good += good
        if output_tokens > 0:
            self.ended += 1
            self._lengths.append((prompt_tokens, output_tokens))

    def lengths_after(self, number: int) -> tuple[tuple[int, int], ...]:
        """(prompt, output) tokens of requests that ended after `number`, at most MOST_TOLD, evenly taken."""
        new = min(len(self._lengths), max(0, self.ended - number))
        stride = -(-new // MOST_TOLD) or 1
        return tuple(islice(self._lengths, len(self._lengths) - new, None, stride))
