"""Pure: what the rooms of a worker promise each other."""

from typing import Protocol

from engine.step import StepPlan, StepResult
from tandem.ids import BlockId


class StepRunner(Protocol):
    """Carries out steps; called from one thread only, blocks for the step's duration."""

    def run(self, plan: StepPlan) -> StepResult:
        """Copies blocks, feeds the slices, draws the tokens. Raises no error for a valid plan."""
        ...


class BlockMemory(Protocol):
    """The bytes of a KV pool, block by block (structurally equal to kvtransfer.contract.BlockMemory)."""

    block_bytes: int
    num_blocks: int

    def view(self, block: BlockId) -> memoryview:
        """Writable bytes of one block, length block_bytes, no copy."""
        ...

    def fileno(self) -> int | None:
        """Descriptor of the shared memory that holds the blocks from offset 0, or None."""
        ...
