"""The kernel tests again, in a library built with address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [
    str(ROOT / "tests" / "kernels" / name)
    for name in ("test_cpu_qlinear.py", "test_fused_kernels.py")
]
# Linked statically into the library, but the address sanitizer has to be first in the process.
RUNTIMES = ("libasan.so", "libubsan.so")


def build(folder: Path) -> None:
    configure = ["cmake", "-S", str(ROOT / "kernels"), "-B", str(folder)]
    options = [
        "-DTREEQ_SANITIZE=address,undefined",
        "-DTREEQ_WERROR=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
    ]
    for command in (
        [*configure, *options, "-DCMAKE_CXX_FLAGS_DEBUG=-O1", "-DTREEQ_VERSION=0.1.0"],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def environment(folder: Path) -> dict[str, str]:
    paths = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES
    ]
    return os.environ | {
        "TREEQ_LIBRARIES": str(folder),
        "LD_PRELOAD": ":".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.fail("cmake and g++ build the package; both have to be there")
    folder = tmp_path_factory.mktemp("sanitized")
    build(folder)
    return folder


@pytest.mark.slow
def test_kernels_are_clean(sanitized: Path):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-cov"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", *TESTS],
        env=environment(sanitized),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_sanitizer_is_awake(sanitized: Path):
    """A read behind an input has to end the process: else the test above proves nothing."""
    script = """
import numpy as np
from tests.kernels.test_cpu_qlinear import make_case
from treeq_export.runners.cpu_kernels import load_kernels
with make_case(1, 64, 8).open() as layer:
    x, y = np.zeros((1, 64), np.float32), np.zeros((4000, 8), np.float32)
    load_kernels().treeq_qlinear_run(layer._layer, x.ctypes.data, 4000, y.ctypes.data, None)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(sanitized) | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr or "AddressSanitizer" in done.stderr
