"""Edge: where a model's keys and values split into inner, middle and outer numbers; found once, offline.

After Oaken (ISCA'25): thresholds a layer and head from a calibration pass, none computed while serving.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvtransfer.codecs.contract import BlockShape, grouped
from tandem.errors import ConfigError

OUTER_FRACTION = 0.03
"""Part of the numbers, half on each side, that counts as outer."""

INNER_FRACTION = 0.03
"""Part of the numbers nearest to zero that counts as inner."""

_MAX_FILE_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Four numbers a group [groups, 4], float32: outer low < inner low <= 0 <= inner high < outer high."""

    values: Tensor

    @property
    def digest(self) -> str:
        """Short name of these numbers, equal on both sides of a hand-off."""
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes JSON."""
        path.write_text(
            json.dumps({"kind": "tandem kv thresholds", "version": 1, "groups": self.values.tolist()})
        )

    @classmethod
    def load(cls, path: Path, shape: BlockShape) -> "Thresholds":
        """Reads what `save` wrote. Raises ConfigError when it is no such file or of another model."""
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes.")
            values = torch.tensor(json.loads(path.read_text())["groups"], dtype=torch.float32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not a file of KV thresholds: {error}.") from error
        if values.shape != (shape.groups, 4):
            raise ConfigError(
                f"{path}: shape {tuple(values.shape)}, but the model needs {(shape.groups, 4)}."
            )
        if not bool(((values[:, :3] <= values[:, 1:]).all() & values.isfinite().all()).item()):
            raise ConfigError(f"{path}: thresholds must be finite and ascend in each group.")
        return cls(values)


def calibrate(blocks: Tensor, shape: BlockShape) -> Thresholds:
    """Thresholds from sample blocks [n, *shape.dimensions], as quantiles of each group's numbers."""
    numbers = grouped(blocks, shape).transpose(0, 1).reshape(shape.groups, -1)
    ordered = numbers.sort(dim=1).values
    last = ordered.shape[1] - 1
    low = ordered[:, round(last * OUTER_FRACTION / 2)]
    high = ordered[:, last - round(last * OUTER_FRACTION / 2)]
    near = numbers.abs().sort(dim=1).values[:, round(last * INNER_FRACTION)]
    return Thresholds(torch.stack([torch.minimum(low, -near), -near, near, torch.maximum(high, near)], dim=1))
