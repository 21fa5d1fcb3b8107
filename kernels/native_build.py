"""Builds native.c with the machine's own C compiler, once per machine, and loads it.

Like Triton's, the result is kept in a cache on disk; it is the only thing that a kernel or the engine reads from one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be built or loaded."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("SUBCIRCUIT_NATIVE") == "0" or compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    loaded.scratch_size.restype = ctypes.c_int64
    return loaded


def _built(compiler: str) -> Path:
    """The shared library, built if this source was not yet built by this compiler for this processor.

    It is linked without an OpenMP runtime of its own: torch has loaded one, and two would fight over the cores.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = b"\0".join([_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, _processor().encode()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subcircuit"
    target = folder / f"native-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(dir=folder))
    except OSError:  # a home that cannot be written: build for this process only
        build = Path(tempfile.mkdtemp())
        target = build / target.name
    try:
        made, linked = build / "native.o", build / "native.so"
        subprocess.run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(made)], capture_output=True, check=True)
        subprocess.run([compiler, "-shared", str(made), "-o", str(linked), "-lm"], capture_output=True, check=True)
        linked.replace(target)
    finally:
        if target.parent != build:
            shutil.rmtree(build, ignore_errors=True)
    return target


def _processor() -> str:
    """What -march=native depends on: a cache in a shared home may be read by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
