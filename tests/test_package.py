"""What a wheel holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlx_drift.demo import DRAFTERS

ROOT = Path(__file__).parent.parent
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Name and size of each file of a wheel, built from a copy: building leaves files behind."""
    tmp = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp)
    for name in ("mlx_drift", "convert", "tests", "examples"):
        shutil.copytree(ROOT / name, tmp / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp, tmp]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp.glob("*.whl"))) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_mlx_drift_is_the_only_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mlx_drift"}


def test_every_module_is_inside(wheel):
    sources = {
        f"mlx_drift/{p.relative_to(ROOT / 'mlx_drift')}" for p in ROOT.glob("mlx_drift/**/*.py")
    }
    sources |= {
        f"mlx_drift/convert/{p.relative_to(ROOT / 'convert')}" for p in ROOT.glob("convert/**/*.py")
    }
    assert sources <= wheel.keys()
    assert "mlx_drift/py.typed" in wheel


def test_the_embedded_pair_is_inside(wheel):
    demo = "mlx_drift/demo"
    for name in ("target", *DRAFTERS):
        assert f"{demo}/{name}/config.json" in wheel
        assert 0 < wheel[f"{demo}/{name}/model.safetensors"] < 6 * MEBIBYTE
    for name in ("README.md", "NOTICE", "target/tokenizer.json", "target/chat_template.jinja"):
        assert f"{demo}/{name}" in wheel


def test_committed_weights_stay_small():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    sizes = {
        name: (ROOT / name).stat().st_size
        for name in files
        if name.endswith((".safetensors", ".bin", ".npz"))
    }
    assert max(sizes.values()) < 7 * 10**6
    assert sum(sizes.values()) < 30 * 10**6
