"""Edge: a step of few rows, from token ids to the last norm, as one native call over buffers that stay."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.contract import LayerListener
from engine.models.model_config import ModelConfig
from engine.native.attention import NativeAttention, ShortSpans
from engine.native.kernels.programme import WIDTH, Operation, programme, programme_halves
from engine.native.product import MOST_ROWS, PackedProduct
from engine.native.rotation_table import RotationTable
from engine.native.team import Team


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's; the norm after it is the next layer's first or the model's last. Norms are float32."""

    qkv: PackedProduct
    output: PackedProduct
    mlp_norm: Tensor
    gate_up: PackedProduct
    down: PackedProduct
    norm_after: Tensor


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """What a step needs besides the head; embeddings and products are all of one type."""

    embeddings: Tensor
    """[vocabulary, hidden], float32 or bfloat16."""
    frequencies: Tensor
    """rope.inverse_frequencies'."""
    first_norm: Tensor
    layers: tuple[LayerWeights, ...]


_BEFORE = 2
_EMBED, _FIRST_NORM = range(_BEFORE)
_PER_LAYER = 9
_QKV, _TURN, _ATTEND, _OUTPUT, _MLP_NORM, _GATE_UP, _GATE, _DOWN, _NORM_AFTER = range(_PER_LAYER)


class _Rows:
    """A buffer [MOST_ROWS, columns] that kernels write in float32, and where products read it."""

    def __init__(self, columns: int, dtype: torch.dtype) -> None:
        self.wide = torch.empty(MOST_ROWS, columns)
        self.factor = self.wide if dtype == torch.float32 else torch.empty(MOST_ROWS, columns, dtype=dtype)
        self.narrow = None if self.factor is self.wide else self.factor

    @property
    def narrow_address(self) -> int:
        """0 where products read float32."""
        return 0 if self.narrow is None else self.narrow.data_ptr()


class NativeLayers:
    """Feeds up to MOST_ROWS rows whose attention is native through all layers; used from one thread.

    Sums, the residual and all between products are float32; in bfloat16 are weights, K and V, and the rows
    that a product multiplies.
    """

    def __init__(self, team: Team, config: ModelConfig, weights: ModelWeights) -> None:
        dtype = weights.embeddings.dtype
        self._run = team.kernel(programme_halves if dtype == torch.bfloat16 else programme, 2)
        self._config = config
        self._epsilon = torch.tensor([config.norm_eps], dtype=torch.float32)
        self._token_ids = np.zeros(MOST_ROWS, dtype=np.int64)
        self._positions = np.zeros(MOST_ROWS, dtype=np.int64)
        self._turns = RotationTable(weights.frequencies)
        self._hidden = torch.empty(MOST_ROWS, config.hidden_size)
        self._normed = _Rows(config.hidden_size, dtype)
        heads = config.heads + 2 * config.kv_heads
        self._qkv = torch.empty(MOST_ROWS, heads * config.head_dim)
        self._attended = _Rows(config.heads * config.head_dim, dtype)
        self._update = torch.empty(MOST_ROWS, config.hidden_size)
        self._gate_up = torch.empty(MOST_ROWS, 2 * config.intermediate_size)
        self._inner = _Rows(config.intermediate_size, dtype)
        # The instructions hold addresses only.
        self._weights = weights
        self._code = np.zeros((_BEFORE + len(weights.layers) * _PER_LAYER, WIDTH), dtype=np.int64)
        self._before = self._code[:_BEFORE]
        self._layers = self._code[_BEFORE:].reshape(len(weights.layers), _PER_LAYER, WIDTH)
        self._write()
        self._aim_turns()
        self._rows = 0
        self._bound_to: NativeAttention | None = None
        self._span_arguments: tuple[int, ...] = ()

    def _write(self) -> None:
        """What does not change from step to step in all instructions."""
        config, weights = self._config, self._weights
        tables = weights.embeddings.data_ptr(), self._token_ids.ctypes.data
        hidden = self._hidden.data_ptr()
        _put(self._before[_EMBED], Operation.EMBED, *tables, hidden, 0, config.hidden_size)
        self._norm_into(self._before[_FIRST_NORM], weights.first_norm, 0)
        for code, layer in zip(self._layers, weights.layers, strict=True):
            self._write_layer(code, layer)

    def _write_layer(self, code: npt.NDArray[np.int64], layer: LayerWeights) -> None:
        """The same in a layer's instructions [_PER_LAYER, WIDTH]."""
        config = self._config
        update = self._update.data_ptr()
        _put(code[_QKV], Operation.PRODUCT, *layer.qkv.arguments(self._normed.factor, self._qkv))
        heads = config.heads + config.kv_heads, config.head_dim, self._qkv.stride(0)
        positions = self._positions.ctypes.data
        _put(code[_TURN], Operation.ROTATE, self._qkv.data_ptr(), 0, 0, 0, *heads, positions)
        _put(code[_OUTPUT], Operation.PRODUCT, *layer.output.arguments(self._attended.factor, self._update))
        self._norm_into(code[_MLP_NORM], layer.mlp_norm, update)
        _put(code[_GATE_UP], Operation.PRODUCT, *layer.gate_up.arguments(self._normed.factor, self._gate_up))
        inner, narrow = self._inner.wide.data_ptr(), self._inner.narrow_address
        given = self._gate_up.data_ptr(), inner, 0, config.intermediate_size, narrow
        _put(code[_GATE], Operation.GATE, *given)
        _put(code[_DOWN], Operation.PRODUCT, *layer.down.arguments(self._inner.factor, self._update))
        self._norm_into(code[_NORM_AFTER], layer.norm_after, update)

    def _norm_into(self, instruction: npt.NDArray[np.int64], weight: Tensor, update: int) -> None:
        rows, out, columns = self._hidden.data_ptr(), self._normed.wide.data_ptr(), self._config.hidden_size
        constants = columns, self._epsilon.data_ptr()
        given = rows, update, weight.data_ptr(), out, 0, *constants, self._normed.narrow_address
        _put(instruction, Operation.NORM, *given)

    def takes(self, rows: int) -> bool:
        """Whether a batch is small enough."""
        return rows <= MOST_ROWS

    def features(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: NativeAttention,
        spans: ShortSpans,
        on_layers: LayerListener | None,
    ) -> Tensor:
        """Normed last hidden states [rows, hidden] of tokens at positions, both int64 [rows].

        In the weights' type, valid until the next call. `on_layers` as Decoder.features says. Raises
        IndexError for a token outside the vocabulary.
        """
        rows = token_ids.shape[0]
        self._take(token_ids.numpy(), positions.numpy())
        self._aim(rows)
        self._attend_by(attention, spans)
        if on_layers is None:
            self._run(self._code.ctypes.data, len(self._code))
        else:
            self._run(self._before.ctypes.data, _BEFORE)
            for index, instructions in enumerate(self._layers):
                self._run(instructions.ctypes.data, _PER_LAYER)
                on_layers(index + 1)
        return self._normed.factor[:rows]

    def _take(self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> None:
        """Puts a step's tokens where the instructions read them."""
        if token_ids.min() < 0 or token_ids.max() >= self._config.vocabulary_tokens:
            raise IndexError(f"A token lies outside a vocabulary of {self._config.vocabulary_tokens}.")
        self._token_ids[: len(token_ids)] = token_ids
        self._positions[: len(positions)] = positions
        if self._turns.reach(int(positions.max())):
            self._aim_turns()

    def _aim_turns(self) -> None:
        self._layers[:, _TURN, 2:4] = self._turns.cosine.data_ptr(), self._turns.sine.data_ptr()

    def _aim(self, rows: int) -> None:
        """Puts a step's number of rows into all instructions."""
        if rows == self._rows:
            return
        self._before[_EMBED, 4] = self._before[_FIRST_NORM, 5] = rows
        self._layers[:, [_MLP_NORM, _NORM_AFTER], 5] = rows
        self._layers[:, [_QKV, _OUTPUT, _GATE_UP, _DOWN], 7] = rows
        self._layers[:, _TURN, 4] = rows
        self._layers[:, _GATE, 3] = rows
        self._rows = rows

    def _attend_by(self, attention: NativeAttention, spans: ShortSpans) -> None:
        """Puts what a step's attention reads into all instructions, if that lies elsewhere than before."""
        arguments = attention.span_arguments(spans)
        if attention is self._bound_to and arguments == self._span_arguments:
            return
        config = self._config
        heads = self._qkv.view(MOST_ROWS, -1, config.head_dim)
        keys = heads[:, config.heads :]
        values = keys[:, config.kv_heads :]
        for layer, instructions in enumerate(self._layers):
            rows = self._attended.wide, self._attended.narrow
            given = attention.arguments(spans, layer, heads, keys, values, *rows)
            _put(instructions[_ATTEND], Operation.ATTEND, *given)
        self._bound_to, self._span_arguments = attention, arguments


def _put(instruction: npt.NDArray[np.int64], operation: Operation, *arguments: int) -> None:
    instruction[0] = operation
    instruction[1 : 1 + len(arguments)] = arguments
