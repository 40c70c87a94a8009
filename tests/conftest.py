"""What holds for every test: hypothesis draws the same examples each time and has no clock to fail by.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
"""

import os

import torch
from hypothesis import settings

settings.register_profile("tandem", deadline=None, derandomize=True)
settings.load_profile("tandem")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
