"""Edge: the codecs by name. A new one is a new module and a line in the table."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from kvtransfer.codecs.contract import BlockShape, Codec
from kvtransfer.codecs.identity import IdentityCodec
from kvtransfer.codecs.outlier import OutlierCodec
from kvtransfer.codecs.scaled import fp8_codec, int8_codec
from kvtransfer.codecs.thresholds import Thresholds
from tandem.errors import ConfigError


def _oaken(shape: BlockShape, thresholds_file: Path | None) -> Codec:
    if thresholds_file is None:
        raise ConfigError(
            "codec oaken needs a thresholds file (codec_thresholds), made by a calibration pass."
        )
    return OutlierCodec(shape, Thresholds.load(thresholds_file, shape))


CODECS: Final[Mapping[str, Callable[[BlockShape, Path | None], Codec]]] = MappingProxyType(
    {
        "identity": lambda shape, _file: IdentityCodec(shape),
        "fp8": lambda shape, _file: fp8_codec(shape),
        "int8": lambda shape, _file: int8_codec(shape),
        "oaken": _oaken,
    }
)
"""name -> (block shape, thresholds file) -> codec."""


def codec_named(name: str, shape: BlockShape, thresholds_file: Path | None = None) -> Codec:
    """Raises ConfigError for an unknown name, or thresholds that are missing or do not fit."""
    if name not in CODECS:
        raise ConfigError(f"codec {name!r} is not known; allowed are {', '.join(CODECS)}.")
    return CODECS[name](shape, thresholds_file)
