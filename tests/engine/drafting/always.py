"""Pure: a controller for tests of verification, which must not depend on what is worth its time."""

from collections.abc import Sequence

from engine.drafting.controller import Offer, SpeculationController


class Always(SpeculationController):
    """Verifies all guesses, without learning first whether that pays."""

    def lengths(self, sequences: int, offers: Sequence[Offer]) -> list[int]:
        """See SpeculationController."""
        return [len(offer.draft) for offer in offers]
