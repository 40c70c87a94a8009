"""Pure: the compatibility digest; only workers with equal digests exchange KV (field-notes, pain 10)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError

PROTOCOL_VERSION = 1
"""Grows with every incompatible change of worker.proto or of the KV layout."""

KV_LAYOUT = "block-major/layers,2,block,kv_heads,head_dim"

CODED_LAYOUT = "layer by layer"
"""How codecs write blocks; changes with every incompatible change of theirs."""

KV_ROWS = {"int8": ("head_dim int8", "float32 scale")}
"""What a row of K or V of one head is, where it is not head_dim numbers of the KV dtype."""


def compatibility_digest(
    model_folder: Path,
    kv_dtype: str,
    block_size: int,
    codec: str = "identity",
    codec_thresholds: Path | None = None,
    *,
    stored_as: str | None = None,
    weights_dtype: str | None = None,
) -> str:
    """Digest of model, revision, KV dtype, layout, wire codec with its thresholds, protocol: 32 hex digits.

    `stored_as` names how KV is kept when that is not as its dtype says (WorkerConfig.kv_dtype).
    `weights_dtype` is how weights are kept when not as stored: KV computed from others is another KV.
    The model's revision is its config.json and the name and size of each weight file.
    Raises ConfigError when the thresholds cannot be read.
    """
    weights = sorted((p.name, p.stat().st_size) for p in model_folder.glob("*.safetensors"))
    facts: dict[str, Any] = {
        "config": json.loads((model_folder / "config.json").read_text()),
        "weights": weights,
        "kv_dtype": kv_dtype,
        "block_size": block_size,
        "layout": KV_LAYOUT,
        "protocol": PROTOCOL_VERSION,
    }
    if codec != "identity":
        facts["codec"] = [codec, CODED_LAYOUT, _content(codec_thresholds)]
    if stored_as is not None:
        facts["stored_as"] = [stored_as, *KV_ROWS.get(stored_as, ())]
    if weights_dtype is not None:
        facts["weights_dtype"] = weights_dtype
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _content(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"codec_thresholds: {path}: {error.strerror}.") from error
