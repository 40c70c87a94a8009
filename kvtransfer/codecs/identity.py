"""Edge: the codec that changes nothing."""

import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape


class IdentityCodec:
    """The block's bytes as they are."""

    name = "identity"
    parameters = ""

    def __init__(self, shape: BlockShape) -> None:
        self.encoded_bytes = shape.block_bytes
        self.layer_bytes = shape.block_bytes // shape.layers

    def encode(self, blocks: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """See Codec."""
        out.copy_(blocks.reshape(blocks.shape[0], -1).view(torch.uint8))

    def decode(self, encoded: Tensor, out: Tensor, first_layer: int = 0) -> None:
        """See Codec."""
        out.copy_(encoded.contiguous().view(out.dtype).view(out.shape))
