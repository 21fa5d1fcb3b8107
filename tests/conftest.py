"""One thread per process: on busy cores the threads of small tensors spend their time waiting for each other.

Without a GPU, Triton's kernels run under its interpreter, which has to be chosen before they are defined.
"""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
