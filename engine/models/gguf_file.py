"""Edge: reads a GGUF file: typed metadata, and tensors dequantised a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from tandem.errors import ModelError

SUPPORTED_TYPES = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
"""Storage types that are dequantised; others are refused."""

_ROWS_BYTES = 32 * 1024 * 1024
"""Float32 bytes dequantised at once."""

_MISSING = object()
_T = TypeVar("_T")


class GgufFile:
    """An open GGUF file, memory mapped."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError when the file is absent, cut short or not GGUF."""
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except FileNotFoundError as error:
            raise ModelError(f"{path} does not exist.") from error
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read as GGUF: {error}.") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.text("general.architecture")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, slowest dimension first as in torch."""
        return {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """A metadata value; raises ModelError when it is absent and there is no default."""
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default is _MISSING:
            raise ModelError(f"{self.path} lacks the metadata {key}.")
        return default

    def whole(self, key: str, default: Any = _MISSING) -> int:
        """A whole number."""
        return self._typed(key, default, int)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.path}: {key} must be a number, found {value!r}.")
        return float(value)

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A string."""
        return self._typed(key, default, str)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """True or false."""
        return self._typed(key, default, bool)

    def check_types(self) -> None:
        """Raises ModelError naming the first tensor whose storage type is not supported."""
        for name, tensor in self._tensors.items():
            kind = tensor.tensor_type.name
            if kind not in SUPPORTED_TYPES:
                supported = ", ".join(SUPPORTED_TYPES)
                raise ModelError(f"{self.path}: {name} is stored as {kind}; supported: {supported}.")

    def rows(
        self, name: str, order: npt.NDArray[np.int64] | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The tensor in float32, some rows at a time, in the given order of rows (elements, for a vector).

        Yields contiguous arrays of at most about 32 MiB; a vector comes in one piece.
        """
        tensor = self._tensors[name]
        kind = GGMLQuantizationType(tensor.tensor_type)
        stored = tensor.data
        if stored.ndim == 1:
            vector = dequantize(stored, kind)
            yield np.ascontiguousarray(vector if order is None else vector[order], dtype=np.float32)
            return
        if order is None:
            order = np.arange(stored.shape[0], dtype=np.int64)
        row_bytes = 4 * tensor.n_elements // stored.shape[0]
        step = max(1, _ROWS_BYTES // row_bytes)
        for first in range(0, len(order), step):
            part = np.ascontiguousarray(stored[order[first : first + step]])
            yield np.ascontiguousarray(dequantize(part, kind), dtype=np.float32)

    def _typed(self, key: str, default: Any, kind: type[_T]) -> _T:
        value = self.get(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.path}: {key} must be {kind.__name__}, found {value!r}.")
        return value
