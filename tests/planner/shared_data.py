"""Edge: the traces and profiles that lie beside the checkout (../shared/data); tests skip where they are
absent."""

import csv
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

BESIDE = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("TANDEM_SHARED_DATA", BESIDE))
"""Where it lies; the variable is for checkouts that are elsewhere."""


def shared_file(name: str) -> Path:
    """A file of ../shared/data; skips the test where the checkout stands alone."""
    if not (DATA / name).exists():
        pytest.skip(f"needs ../shared/data/{name} beside the checkout")
    return DATA / name


@cache
def csv_rows(name: str) -> tuple[dict[str, str], ...]:
    """Rows of a table."""
    with shared_file(name).open(newline="") as file:
        return tuple(csv.DictReader(file))


def json_document(name: str) -> Any:
    """A JSON file."""
    return json.loads(shared_file(name).read_text())
