"""Edge: converts a GGUF file into a Hugging Face folder, once for all processes of the machine."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from engine.cache_folder import cache_folder, locked
from engine.models.gguf_file import GgufFile
from engine.models.gguf_model import TensorSource, folder_config, generation_config, tensor_sources
from engine.models.gguf_tokenizer import build_tokenizer, tokenizer_config
from engine.models.model_config import read_model_config
from engine.progress import Progress
from tandem.errors import ModelError

_VERSION = 1
"""Grows when the conversion's result changes, so that older results are not taken."""

_LOCK_TIMEOUT_S = 3600.0
_SAMPLE_BYTES = 1024 * 1024
_SAMPLES = 32


def convert_gguf(path: Path, progress: Progress | None = None, cache: Path | None = None) -> Path:
    """The folder with the converted model: config, tokenizer, chat template, float32 weights.

    Converts under a file lock unless it is in `cache` already (default: $TANDEM_CACHE or ~/.cache/tandem).
    Raises ModelError when the file is unsupported or the cache cannot be written.
    """
    models = (cache or cache_folder()) / "models"
    target = models / file_digest(path)
    if target.is_dir():
        return target
    try:
        models.mkdir(parents=True, exist_ok=True)
        with locked(models / f"{target.name}.lock", _LOCK_TIMEOUT_S):
            if not target.is_dir():
                _convert(path, target, progress)
    except TimeoutError as error:
        raise ModelError(str(error)) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be converted into {target}: {error.strerror}.") from error
    return target


def file_digest(path: Path) -> str:
    """Names a file's content by its size and samples of it (first and last MiB among them): 32 hex digits."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{_VERSION}:{size}:".encode())
        with path.open("rb") as file:
            last = max(0, size - _SAMPLE_BYTES)
            for offset in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()[:32]


def _convert(path: Path, target: Path, progress: Progress | None) -> None:
    """Writes a folder beside the target and renames it: the target is complete whenever it exists."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        file = GgufFile(path)
        config = folder_config(file)
        _write_json(unfinished / "config.json", config)
        _write_json(unfinished / "generation_config.json", generation_config(file))
        read_model_config(unfinished)
        file.check_types()
        sources = tensor_sources(file, config)
        _write_tokenizer(unfinished, file)
        _write_weights(unfinished / "model.safetensors", file, sources, progress)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_tokenizer(folder: Path, file: GgufFile) -> None:
    try:
        build_tokenizer(file).save(str(folder / "tokenizer.json"))
    except (ModelError, OSError):
        raise
    except Exception as error:
        # The library raises bare Exceptions for a vocabulary and merges that contradict each other.
        raise ModelError(f"{file.path} describes no valid tokenizer: {error}.") from error
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    path: Path, file: GgufFile, sources: Sequence[TensorSource], progress: Progress | None
) -> None:
    """Writes safetensors row by row: the library's own writer would need all tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for source in sources:
        end = total + 4 * prod(source.shape)
        header[source.name] = {"dtype": "F32", "shape": source.shape, "data_offsets": [total, end]}
        total = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    done = 0
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for source in sources:
            for rows in file.rows(source.source, source.row_order):
                output.write(rows.data)
                done += rows.nbytes
                if progress is not None:
                    progress(done, total)
    if done != total:
        raise ModelError(f"{file.path}: its tensors hold {done} bytes in float32, expected {total}.")
