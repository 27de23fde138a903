"""Every instruction set against the portable kernels, without Python: here and on emulated ARM."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.required import skip_or_fail

KERNELS = Path(__file__).parents[2] / "kernels"
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"


def build(folder: Path, *options: str) -> Path:
    for command in (
        ["cmake", "-S", str(KERNELS), "-B", str(folder), "-DTREEQ_TESTS=ON", *options],
        ["cmake", "--build", str(folder), "--target", "compare_isas", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "compare_isas"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_native(tmp_path: Path):
    names = run([str(build(tmp_path, "-DTREEQ_WERROR=ON")), "60"]).removeprefix("equal:").split()
    assert names, "this processor has no vector instruction set that the kernels use"


@pytest.mark.slow
def test_neon_compiles_cleanly_and_agrees(tmp_path: Path):
    missing = [name for name in (CROSS, EMULATOR) if shutil.which(name) is None]
    if missing:
        skip_or_fail("neon", f"{', '.join(missing)} not installed; `make apt` does it")
    binary = build(
        tmp_path,
        "-DTREEQ_WERROR=ON",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert run([EMULATOR, "-cpu", "max", str(binary), "30"]) == "equal: neon"
