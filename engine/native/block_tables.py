"""Edge: the block tables of a batch as numbers that kernels read, kept from step to step."""

from collections.abc import Sequence

import numpy as np

from tandem.ids import BlockId


class BlockTables:
    """A row for each sequence of a batch; a row is written only when its table is another than before."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` are in the pool."""
        self._num_blocks = num_blocks
        self._numbers = np.zeros((0, 0), dtype=np.int64)
        self._written: list[Sequence[BlockId]] = []
        self.address = self._numbers.ctypes.data
        """Of all rows, one after the other; another after `reserve` made room."""

    def reserve(self, rows: int, blocks: int) -> None:
        """Makes room for so many tables of so many blocks."""
        room, width = self._numbers.shape
        if rows <= room and blocks <= width:
            return
        shape = max(room, 1 << (rows - 1).bit_length()), max(width, 1 << (blocks - 1).bit_length())
        self._numbers = np.zeros(shape, dtype=np.int64)
        self._written = [()] * shape[0]
        self.address = self._numbers.ctypes.data

    def put(self, row: int, table: Sequence[BlockId], blocks: int) -> int:
        """Makes the first `blocks` of a table a row of these; returns where the row begins, in numbers.

        Raises IndexError when the table is shorter or leaves the pool.
        """
        wanted = table[:blocks]
        if wanted != self._written[row]:
            if len(wanted) < blocks:
                raise IndexError("A block table is shorter than its sequence.")
            if min(wanted) < 0 or max(wanted) >= self._num_blocks:
                raise IndexError(f"A block table leaves the pool of {self._num_blocks} blocks.")
            self._numbers[row, :blocks] = wanted
            self._written[row] = wanted
        return row * self._numbers.shape[1]
