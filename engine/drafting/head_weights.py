"""Edge: the tensors of draft heads out of a folder's safetensors file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.model_config import read_json
from tandem.errors import ModelError


def read_count(folder: Path, key: str, default: int | None = None) -> int:
    """A positive whole number of the folder's config.json; raises ModelError that names it."""
    value = read_json(folder / "config.json").get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{folder / 'config.json'}: {key} must be a positive whole number, found {value!r}.")
    return value


def read_tensors(
    folder: Path, file_names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of `shapes` from the first of the files that exists; others in it are ignored.

    Raises ModelError naming the file or tensor that is missing or of another shape.
    """
    path = next((folder / name for name in file_names if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} has none of: {', '.join(file_names)}.")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = set(file.keys())
            for name, shape in shapes.items():
                if name not in names:
                    raise ModelError(f"{path} lacks the tensor {name}.")
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != shape:
                    found = list(tensor.shape)
                    raise ModelError(f"{path}: {name} has shape {found}, expected {list(shape)}.")
                tensors[name] = tensor.to(dtype)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}.") from error
    return tensors
