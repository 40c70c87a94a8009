"""Edge: reads what planning needs from a model folder, without torch."""

import json
from pathlib import Path
from typing import Any

from cluster.plan import ModelFacts
from tandem.digest import compatibility_digest
from tandem.errors import ModelError


def read_model_facts(
    folder: Path,
    dtype: str,
    block_size: int,
    codec: str = "identity",
    codec_thresholds: Path | None = None,
    *,
    stored_as: str | None = None,
    weights_dtype: str | None = None,
) -> ModelFacts:
    """Facts from config.json, and the digest (tandem.digest). Raises ModelError that names file and key."""
    path = folder / "config.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    heads = _positive(document, "num_attention_heads", path)
    head_dim = document.get("head_dim") or _positive(document, "hidden_size", path) // heads
    kv_heads = document.get("num_key_value_heads") or heads
    return ModelFacts(
        folder=folder,
        digest=compatibility_digest(
            folder,
            dtype,
            block_size,
            codec,
            codec_thresholds,
            stored_as=stored_as,
            weights_dtype=weights_dtype,
        ),
        layers=_positive(document, "num_hidden_layers", path),
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        context_tokens=_positive(document, "max_position_embeddings", path),
    )


def _positive(document: dict[str, Any], key: str, path: Path) -> int:
    value = document.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{path}: {key} must be a positive integer, not {value!r}")
    return value
