"""Pure: the rule by which a decode worker has room for one more leg.

It knows of the worker only counts, so that whoever counts legs in bulk (planner/simulation/plain_decode.py)
is held by the very rule of the live scheduler.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoomRules:
    """Limits: `max_batch` samples in the batch or on their way to it.

    A reservation leaves `watermark_blocks` and a block for each sample free, so that those that run can grow.
    """

    max_batch: int
    watermark_blocks: int = 0

    def blocks_needed(self, blocks: int, samples: int, ahead: int) -> int | None:
        """Blocks that must be free before a leg of `samples` samples may take `blocks` of them.

        `ahead` samples run or are on their way. None: there is no room in the batch.
        """
        batch = ahead + samples
        if batch > self.max_batch:
            return None
        # Alone it may take all: it need not leave room for others, and none will be freed by waiting.
        return blocks + batch + self.watermark_blocks if ahead else blocks
