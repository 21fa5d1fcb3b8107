"""One thread per process: on busy cores the threads of small tensors spend their time waiting for each other."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
