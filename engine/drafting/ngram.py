"""Pure: guesses by looking the sequence's last tokens up in the sequence itself (prompt lookup).

After Saxena 2023 (prompt lookup decoding): where the last n tokens stood before, what followed then is
guessed to follow now. Good at summaries, edits, code and anything that repeats; costs no computation.
"""

from collections.abc import Iterable, Sequence

from engine.drafting.draft import NO_DRAFT, Draft, Proposal


class NgramIndex:
    """Where each n-gram of one growing sequence last ended; O(new tokens) a call, bounded memory."""

    def __init__(self, min_ngram: int, max_ngram: int, max_ngrams: int) -> None:
        """Keeps at most `max_ngrams` n-grams, the most recent ones."""
        self._lengths = range(max_ngram, min_ngram - 1, -1)
        self._max_ngrams = max_ngrams
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0
        self._match: int | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def match(self, tokens: Sequence[int]) -> int | None:
        """Where `tokens` went on when its longest indexed suffix last occurred before; None if it never did.

        `tokens` must begin with those of the call before.
        """
        for end in range(self._seen + 1, len(tokens) + 1):
            self._match = self._add(tokens, end)
        self._seen = len(tokens)
        return self._match

    def _add(self, tokens: Sequence[int], end: int) -> int | None:
        found: int | None = None
        for length in self._lengths:
            if length > end:
                continue
            ngram = tuple(tokens[end - length : end])
            before = self._ends.pop(ngram, None)
            found = before if found is None else found
            # Inserted anew, so that the dictionary's order is that of the last occurrence.
            self._ends[ngram] = end
        while len(self._ends) > self._max_ngrams:
            del self._ends[next(iter(self._ends))]
        return found


class NgramDrafter:
    """Drafter over an index for each sequence."""

    asks_runner = False

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4, max_ngrams: int = 32_768) -> None:
        """Matches of `max_ngram` down to `min_ngram` tokens; `max_ngrams` bounds each sequence's index."""
        if not 0 < min_ngram <= max_ngram:
            raise ValueError(f"n-grams of {min_ngram} to {max_ngram} tokens are not possible")
        self._bounds = (min_ngram, max_ngram, max_ngrams)
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, key: int, tokens: Sequence[int], limit: int) -> Draft:
        """A chain: what followed the last occurrence of the sequence's end, repeated as often as it fits."""
        index = self._indexes.get(key)
        if index is None:
            index = self._indexes[key] = NgramIndex(*self._bounds)
        start = index.match(tokens)
        if start is None or limit < 1:
            return NO_DRAFT
        period = len(tokens) - start
        return Draft(tuple(tokens[start + place % period] for place in range(limit)))

    def learn(self, proposals: Iterable[Proposal]) -> None:
        """Nothing to learn: the guesses are made here."""

    def forget(self, key: int) -> None:
        """See Drafter."""
        self._indexes.pop(key, None)
