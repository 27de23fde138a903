"""Every instruction set against the portable kernels, without Python: here and on emulated ARM.

And no instruction set's machine code takes vectors apart: the innermost loops move no single
element between lanes, and a whole function at most a few (the scale and the mean of a token). The
portable kernels are left out: their multiply_add is a call of `fmaf` for each lane.
"""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kernels.machine_code import count_moves, disassemble
from tests.required import skip_or_fail

KERNELS = Path(__file__).parents[2] / "kernels"
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
MOST_MOVES = 24

# What the kernels once were: vectors of 64 bytes that only AVX-512 has.
TAKEN_APART = """
typedef float Floats __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));
void butterflies(Floats* x, long count) {
  const Ints order = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  for (long i = 0; i < count; ++i) x[i] += __builtin_shuffle(x[i], order);
}
"""


def build(folder: Path, *options: str) -> Path:
    """Build the comparison in a folder."""
    options = ("-DTREEQ_TESTS=ON", "-DTREEQ_WERROR=ON", *options)
    for command in (
        ["cmake", "-S", str(KERNELS), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--target", "compare_isas", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(command: list[str]) -> str:
    """Return what a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def find_apart(path: Path, objdump: str = "objdump") -> list[str]:
    """Return what takes vectors apart in an object file, by function."""
    functions = disassemble(path, objdump)
    assert sum(len(function.inner_loops()) for function in functions) > 0, "no loop was recognised"
    found = []
    for function in functions:
        if function.count_moves() > MOST_MOVES:
            found.append(f"{function.name}: {function.count_moves()} moves")
        found += [
            f"{function.name}: {moves} moves in the loop at {loop[0][0]:#x}"
            for loop in function.inner_loops()
            if (moves := count_moves(loop))
        ]
    return found


def objects(folder: Path, isas: Sequence[str]) -> list[Path]:
    """Return the object files of instruction sets; each has to be there."""
    paths = [path for isa in isas for path in folder.rglob(f"qlinear_{isa}.cpp.o")]
    assert len(paths) == len(isas)
    return paths


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build for this processor."""
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build for 64-bit ARM, linked statically."""
    missing = [name for name in (CROSS, EMULATOR) if shutil.which(name) is None]
    if missing:
        skip_or_fail("neon", f"{', '.join(missing)} not installed; `make apt` does it")
    return build(
        tmp_path_factory.mktemp("neon"),
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )


@pytest.mark.slow
def test_native(native: Path):
    names = run([str(native / "compare_isas"), "60"]).removeprefix("equal:").split()
    assert names, "this processor has no vector instruction set that the kernels use"


@pytest.mark.slow
def test_neon_agrees(neon: Path):
    assert run([EMULATOR, "-cpu", "max", str(neon / "compare_isas"), "30"]) == "equal: neon"


@pytest.mark.slow
def test_native_code_leaves_vectors_whole(native: Path):
    if platform.machine() != "x86_64":
        pytest.skip("no x86-64 kernels in this build")
    for path in objects(native, ("avx2", "avx512vnni")):
        assert find_apart(path) == [], path.name


@pytest.mark.slow
def test_neon_code_leaves_vectors_whole(neon: Path):
    (path,) = objects(neon, ("neon",))
    assert find_apart(path, "aarch64-linux-gnu-objdump") == []


@pytest.mark.parametrize(
    ("compiler", "option", "objdump"),
    [("x86_64-linux-gnu-g++", "-mavx2", "objdump"), (CROSS, "-O3", "aarch64-linux-gnu-objdump")],
)
def test_vectors_that_are_taken_apart_are_found(
    tmp_path: Path, compiler: str, option: str, objdump: str
):
    if shutil.which(compiler) is None:
        skip_or_fail("neon", f"{compiler} not installed; `make apt` does it")
    source, target = tmp_path / "apart.cpp", tmp_path / "apart.o"
    source.write_text(TAKEN_APART)
    run([compiler, "-O3", option, "-Wno-psabi", "-c", str(source), "-o", str(target)])
    found = find_apart(target, objdump)
    assert len(found) == 1
    assert "butterflies(" in found[0]
    assert "moves in the loop" in found[0]
