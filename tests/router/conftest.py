"""Edge: fixtures of this room's tests."""

from pathlib import Path

import pytest

from tests.router.harness import write_model_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with tokenizer and chat template only."""
    return write_model_folder(tmp_path_factory.mktemp("model"))
