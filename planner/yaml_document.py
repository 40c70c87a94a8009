"""Edge: reads a YAML file into a checked section, and says everything that is wrong with it at once."""

import reprlib
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tandem.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""Largest YAML file that is read."""

SectionType = TypeVar("SectionType", bound=BaseModel)


def load_section(path: Path, section: type[SectionType]) -> SectionType:
    """The file's content. Raises ConfigError that names the file and, for each fault, its path."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        document = yaml.safe_load(content.decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(section.model_fields)}")
    try:
        return section.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_faults(error))}") from error


def _faults(error: ValidationError) -> list[str]:
    described = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"]) or "the file"
        message = fault["msg"].removeprefix("Value error, ")
        given = "" if fault["type"] == "missing" else f" (got {reprlib.repr(fault['input'])})"
        described.append(f"{where}: {message}{given}")
    return described
