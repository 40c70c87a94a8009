"""Pure: KV that a simulated prefill worker lets be pulled, whole or as far as its prompt is read."""

from dataclasses import dataclass

from kvtransfer.contract import KvReady
from kvtransfer.handoffs.pieces import complete, grown
from kvtransfer.handoffs.source_protocol import SourceHandoff


@dataclass(slots=True, eq=False)
class Offer:
    """An offer of `blocks` blocks of `layers` layers that hold `tokens` tokens.

    `last_step` is when the step began that ends the prompt, and how long it takes.
    """

    source: SourceHandoff
    tokens: int
    blocks: int
    layers: int
    ready: KvReady
    last_step: tuple[float, float] | None = None

    @property
    def complete(self) -> bool:
        """Whether all of it may be pulled."""
        return complete(self.ready, self.blocks, self.layers)

    def grow(self, blocks: int, layers: int, now_s: float) -> None:
        """More is ready. Raises ProtocolError when the offer would shrink."""
        self.ready = grown(self.ready, KvReady(blocks, layers))
        self.source.grew(now_s)

    def whole(self, now_s: float) -> None:
        """All of it is ready."""
        self.grow(self.blocks, self.layers, now_s)

    def layers_at_s(self, layers: int) -> float | None:
        """When so many layers are ready; None before the step that ends the prompt."""
        if self.last_step is None:
            return None
        began_s, took_s = self.last_step
        return began_s + took_s * layers / self.layers
