"""What holds for every test: hypothesis draws the same examples each time and has no clock to fail by, and
a command that a test runs in this process leaves no logging behind.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
"""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
import torch
from hypothesis import settings

settings.register_profile("tandem", deadline=None, derandomize=True)
settings.load_profile("tandem")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a test's command configures ends with the test."""
    root = logging.getLogger()
    handlers, level, configured = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configured)
