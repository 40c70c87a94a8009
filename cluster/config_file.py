"""Edge: reads cluster.yaml, and says everything that is wrong with it at once."""

import reprlib
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config import ClusterConfig
from tandem.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
"""Largest cluster.yaml that is read."""


def load_cluster_config(path: Path | None) -> ClusterConfig:
    """The configuration in a file, or the defaults (the demo) without one.

    Raises ConfigError that names the file and, for each fault, its path and the allowed values.
    """
    if path is None:
        return ClusterConfig()
    return parse_cluster_config(_read(path), str(path))


def parse_cluster_config(text: str, origin: str) -> ClusterConfig:
    """The configuration in a text; `origin` names it in errors. Raises ConfigError."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(f"{origin}: must be a mapping with the keys {_keys_of(ClusterConfig)}")
    try:
        return ClusterConfig.model_validate(document)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors(include_url=False))
        raise ConfigError(f"{origin}:\n{faults}") from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return content.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error


def _describe(fault: ErrorDetails) -> str:
    where = _path_of(fault)
    if fault["type"] == "extra_forbidden":
        section = _section_at(ClusterConfig, fault["loc"][:-1])
        allowed = _keys_of(section) if section is not None else "none"
        return f"{where}: unknown key; allowed keys: {allowed}"
    message = fault["msg"].removeprefix("Value error, ")
    if not where:
        return message
    if fault["type"] == "missing" or where == "redis.url":
        # A URL may hold a password, which must not reach a log.
        return f"{where}: {message}"
    return f"{where}: {message} (got {reprlib.repr(fault['input'])})"


def _path_of(fault: ErrorDetails) -> str:
    """Dotted path; the parts that pydantic adds for union members are left out."""
    document_parts = [str(part) for part in fault["loc"] if not _is_union_member(part)]
    return ".".join(document_parts)


def _is_union_member(part: int | str) -> bool:
    if isinstance(part, int):
        return False
    return part in ("[key]", "int", "constrained-str") or part.startswith(("literal[", "constrained-"))


def _section_at(section: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that validates the mapping at a path."""
    current: Any = section
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = None if field is None else field.annotation
        elif get_origin(current) is dict:
            current = get_args(current)[1]
        else:
            return None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _keys_of(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)
