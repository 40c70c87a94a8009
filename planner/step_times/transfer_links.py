"""Pure: how long KV takes to move: a table of measured sends, or a link's rate, and the hand-over beside
it."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.errors import ConfigError


class LinkTable:
    """Seconds by bytes: linear between measured points, below the first as the first, beyond at the last
    rate."""

    __slots__ = ("_bytes", "_seconds")

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        """`points` are (bytes, seconds); equal sizes are averaged. Raises ConfigError without a positive
        one."""
        by_size: dict[float, list[float]] = {}
        for size, seconds in points:
            if size <= 0 or seconds <= 0:
                raise ConfigError(f"a transfer needs positive bytes and seconds, not {size} and {seconds}")
            by_size.setdefault(size, []).append(seconds)
        if not by_size:
            raise ConfigError("a link needs one measured transfer at least; it has none")
        self._bytes = sorted(by_size)
        self._seconds = [sum(by_size[size]) / len(by_size[size]) for size in self._bytes]

    def seconds(self, size: float) -> float:
        """Time of one transfer of `size` bytes; 0 for nothing."""
        if size <= 0:
            return 0.0
        right = bisect_left(self._bytes, size)
        if right == 0:
            return self._seconds[0]
        if right == len(self._bytes):
            return self._seconds[-1] * size / self._bytes[-1]
        left = right - 1
        share = (size - self._bytes[left]) / (self._bytes[right] - self._bytes[left])
        return self._seconds[left] + share * (self._seconds[right] - self._seconds[left])


def link_of_rate(bytes_s: float, latency_s: float) -> LinkTable:
    """A link known by its rate and latency alone. Raises ConfigError unless the rate is positive."""
    if bytes_s <= 0 or latency_s < 0:
        raise ConfigError(
            f"a link needs a positive rate and no negative latency, not {bytes_s} and {latency_s}"
        )
    sizes = (1.0, 1e6, 1e9, 1e12)
    return LinkTable((size, latency_s + size / bytes_s) for size in sizes)


@dataclass(frozen=True, slots=True)
class LinkTransfer:
    """TransferModel and PieceModel over two links: one inside a node, one between nodes.

    KV moves in whole blocks; `hand_over_s` is what a hand-off takes beside its bytes (asking, commit), and
    `ask_s` what asking for each piece before the last takes.
    """

    kv_bytes_per_token: float
    block_size: int
    inside: LinkTable
    between: LinkTable
    hand_over_s: float = 0.0
    ask_s: float = 0.0

    def transfer_s(self, tokens: int, same_node: bool) -> float:
        """See TransferModel."""
        blocks = -(-tokens // self.block_size)
        return self.hand_over_s + self._moving_s(
            blocks * self.block_size * self.kv_bytes_per_token, same_node
        )

    def piece_s(self, num_bytes: int, last: bool, same_node: bool) -> float:
        """See PieceModel."""
        return (self.hand_over_s if last else self.ask_s) + self._moving_s(num_bytes, same_node)

    def _moving_s(self, num_bytes: float, same_node: bool) -> float:
        return (self.inside if same_node else self.between).seconds(num_bytes)
