"""Edge: all layers of a step of few rows as one native call, over buffers and arguments that stay."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.contract import LayerListener
from engine.model_config import ModelConfig
from engine.native.attention import NativeAttention, ShortSpans
from engine.native.kernels.programme import WIDTH, Operation, programme
from engine.native.product import MOST_ROWS, PackedProduct
from engine.native.team import Team


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's, float32; the norm after it is the next layer's first or the model's last."""

    qkv: PackedProduct
    output: PackedProduct
    mlp_norm: Tensor
    gate_up: PackedProduct
    down: PackedProduct
    norm_after: Tensor


_PER_LAYER = 9
_QKV, _TURN, _ATTEND, _OUTPUT, _MLP_NORM, _GATE_UP, _GATE, _DOWN, _NORM_AFTER = range(_PER_LAYER)


class NativeLayers:
    """Feeds up to MOST_ROWS rows whose attention is native through all layers; used from one thread."""

    def __init__(
        self, team: Team, config: ModelConfig, first_norm: Tensor, layers: Sequence[LayerWeights]
    ) -> None:
        self._run = team.kernel(programme, 2)
        self._config = config
        self._epsilon = torch.tensor([config.norm_eps], dtype=torch.float32)
        self._normed = torch.empty(MOST_ROWS, config.hidden_size)
        heads = config.heads + 2 * config.kv_heads
        self._qkv = torch.empty(MOST_ROWS, heads * config.head_dim)
        self._attended = torch.empty(MOST_ROWS, config.heads * config.head_dim)
        self._update = torch.empty(MOST_ROWS, config.hidden_size)
        self._gate_up = torch.empty(MOST_ROWS, 2 * config.intermediate_size)
        self._inner = torch.empty(MOST_ROWS, config.intermediate_size)
        # The instructions hold addresses only.
        self._kept = (first_norm, tuple(layers))
        self._first = np.zeros((1, WIDTH), dtype=np.int64)
        self._norm_into(self._first[0], first_norm, 0)
        self._code = np.zeros((len(layers), _PER_LAYER, WIDTH), dtype=np.int64)
        for instructions, layer in zip(self._code, layers, strict=True):
            self._write(instructions, layer)
        self._bound_to: NativeAttention | None = None

    def _write(self, code: npt.NDArray[np.int64], layer: LayerWeights) -> None:
        """What does not change from step to step in a layer's instructions [_PER_LAYER, WIDTH]."""
        config = self._config
        update = self._update.data_ptr()
        _put(code[_QKV], Operation.PRODUCT, *layer.qkv.arguments(self._normed, self._qkv))
        turning, stride = config.heads + config.kv_heads, self._qkv.stride(0)
        _put(code[_TURN], Operation.ROTATE, self._qkv.data_ptr(), 0, 0, 0, turning, config.head_dim, stride)
        _put(code[_OUTPUT], Operation.PRODUCT, *layer.output.arguments(self._attended, self._update))
        self._norm_into(code[_MLP_NORM], layer.mlp_norm, update)
        _put(code[_GATE_UP], Operation.PRODUCT, *layer.gate_up.arguments(self._normed, self._gate_up))
        inner = self._inner.data_ptr()
        _put(code[_GATE], Operation.GATE, self._gate_up.data_ptr(), inner, 0, config.intermediate_size)
        _put(code[_DOWN], Operation.PRODUCT, *layer.down.arguments(self._inner, self._update))
        self._norm_into(code[_NORM_AFTER], layer.norm_after, update)

    def _norm_into(self, instruction: npt.NDArray[np.int64], weight: Tensor, update: int) -> None:
        out, columns = self._normed.data_ptr(), self._config.hidden_size
        _put(
            instruction,
            Operation.NORM,
            0,
            update,
            weight.data_ptr(),
            out,
            0,
            columns,
            self._epsilon.data_ptr(),
        )

    def takes(self, rows: int) -> bool:
        """Whether a batch is small enough."""
        return rows <= MOST_ROWS

    def features(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: NativeAttention,
        spans: ShortSpans,
        on_layers: LayerListener | None,
    ) -> Tensor:
        """Normed last hidden states [rows, hidden] of embeddings `hidden` [rows, hidden], which are changed.

        Valid until the next call. `rotation` is rope.rotation's; `on_layers` as Decoder.features says.
        """
        rows = hidden.shape[0]
        self._aim(hidden, rotation)
        self._attend_by(attention, spans)
        self._run(self._first.ctypes.data, 1)
        if on_layers is None:
            self._run(self._code.ctypes.data, self._code.shape[0] * _PER_LAYER)
        else:
            for index, instructions in enumerate(self._code):
                self._run(instructions.ctypes.data, _PER_LAYER)
                on_layers(index + 1)
        return self._normed[:rows]

    def _aim(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        """Puts this step's rows into all instructions."""
        rows, address = hidden.shape[0], hidden.data_ptr()
        norms = [_MLP_NORM, _NORM_AFTER]
        self._first[0, [1, 5]] = address, rows
        self._code[:, norms, 1] = address
        self._code[:, norms, 5] = rows
        self._code[:, [_QKV, _OUTPUT, _GATE_UP, _DOWN], 7] = rows
        self._code[:, _TURN, 2:5] = rotation[0].data_ptr(), rotation[1].data_ptr(), rows
        self._code[:, _GATE, 3] = rows

    def _attend_by(self, attention: NativeAttention, spans: ShortSpans) -> None:
        """Puts this step's spans into all instructions; the rest changes only with the attention."""
        if attention is not self._bound_to:
            config = self._config
            heads = self._qkv.view(MOST_ROWS, -1, config.head_dim)
            keys = heads[:, config.heads :]
            values = keys[:, config.kv_heads :]
            for layer, instructions in enumerate(self._code):
                given = attention.arguments(spans, layer, heads, keys, values, self._attended)
                _put(instructions[_ATTEND], Operation.ATTEND, *given)
            self._bound_to = attention
        for place, number in attention.span_arguments(spans).items():
            self._code[:, _ATTEND, 1 + place] = number


def _put(instruction: npt.NDArray[np.int64], operation: Operation, *arguments: int) -> None:
    instruction[0] = operation
    instruction[1 : 1 + len(arguments)] = arguments
