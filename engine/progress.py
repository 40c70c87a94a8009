"""Pure: how slow work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told (done_bytes, total_bytes) while weights are read or converted."""
