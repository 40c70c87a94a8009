"""Pure: from a sample's tokens to the text that may be shown: detokenise, find stop strings, hold back.

Which stop string ends a sample does not depend on how its text was split into tokens: it is the match that
ends first, and of those the longest. Text that may still grow into a stop string is held back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Detokenizer(Protocol):
    """Turns token ids into text piece by piece (engine.models.tokenizer.IncrementalDetokenizer)."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; may be empty."""
        ...

    def finish(self) -> str:
        """What is left: bytes of an incomplete character as U+FFFD."""
        ...


@dataclass(frozen=True, slots=True)
class StopMatch:
    """The stop string that ended a text."""

    stop_string: str


class StopFinder:
    """Cuts a stream of text at the first stop string."""

    __slots__ = ("_held", "_include", "_stops")

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""

    def feed(self, text: str, may_stop: bool) -> tuple[str, StopMatch | None]:
        """Text that may be shown, and the match that ended it.

        With `may_stop` False (min_tokens is not reached) matches that end inside `text` are ignored.
        """
        known = len(self._held)
        window = self._held + text
        if may_stop:
            found = self._first_match(window, known)
            if found is not None:
                start, stop = found
                self._held = ""
                return window[: start + len(stop) if self._include else start], StopMatch(stop)
        keep = self._possible_start(window)
        self._held = window[keep:]
        return window[:keep], None

    def flush(self) -> str:
        """The held-back text, when the sample ended otherwise."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, known: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first, ending after the first `known` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _possible_start(self, window: str) -> int:
        """Where the longest suffix begins that is the beginning of a stop string; len(window) if none is."""
        earliest = len(window)
        for stop in self._stops:
            for start in range(max(0, len(window) - len(stop) + 1), earliest):
                if stop.startswith(window[start:]):
                    earliest = start
                    break
        return earliest


class TextStream:
    """The text of one sample, token by token."""

    __slots__ = ("_count", "_detokenizer", "_finder", "_include_stop", "_min_tokens")

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops, include_stop) if stops else None
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._count = 0

    def push(self, token_id: int) -> tuple[str, StopMatch | None]:
        """Text that may be shown with this token, and the stop string that it completed.

        A stop string counts when it is completed by a token of index >= min_tokens.
        """
        self._count += 1
        text = self._detokenizer.push(token_id)
        if self._finder is None:
            return text, None
        if not text:
            return "", None
        return self._finder.feed(text, may_stop=self._count > self._min_tokens)

    def push_stop_token(self, token_id: int) -> tuple[str, StopMatch | None]:
        """The token that ended the sample: its text is shown only with include_stop."""
        if self._include_stop:
            return self.push(token_id)
        self._count += 1
        return "", None

    def finish(self) -> tuple[str, StopMatch | None]:
        """What was held back, when no stop string ended the sample; it may complete one itself."""
        text = self._detokenizer.finish()
        if self._finder is None:
            return text, None
        shown, match = (
            self._finder.feed(text, may_stop=self._count > self._min_tokens) if text else ("", None)
        )
        return (shown, match) if match else (shown + self._finder.flush(), None)
