"""The int4 kernel of Ampere and Ada: its sums on a processor, its machine code from nvcc.

The same source is compiled as plain C++ with `emulate_int4/emulation.h`, where a warp's
instructions follow the PTX ISA's fragment layouts, and compared with numpy bit for bit. Whether
those layouts are the hardware's, and the speed, are untested: they need a GPU.
"""

import ctypes
import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.plugin_build import ROOT, run
from tests.required import skip_or_fail
from treeq_export.quant.packing import pack

KERNEL = ROOT / "experimental" / "int4" / "qlinear_int4.cu"
EMULATION = Path(__file__).parent / "emulate_int4"
pytestmark = pytest.mark.slow

ARCHITECTURES = ("sm_80", "sm_86", "sm_89")
NUM_MMA = 16  # in the loop over 64 channels: 4 row tiles x 4 column tiles
NUM_MATRIX_LOADS = 4


@dataclass(frozen=True)
class Problem:
    """Random codes of one product, in all their layouts."""

    q_x: NDArray[np.int8]
    q_w: NDArray[np.int8]
    bits: int

    @classmethod
    def draw(cls, m: int, n: int, k: int, bits: int, act_bits: int, seed: int = 0) -> "Problem":
        rng = np.random.default_rng(seed)

        def codes(rows: int, width: int) -> NDArray[np.int8]:
            half = 1 << (width - 1)
            drawn = rng.integers(-half, half, (rows, k), dtype=np.int8)
            drawn[0] = -half  # the largest sums
            return drawn

        return cls(codes(m, act_bits), codes(n, bits), bits)

    @property
    def sums(self) -> NDArray[np.int32]:
        return self.q_x.astype(np.int32) @ self.q_w.astype(np.int32).T

    @property
    def codes(self) -> NDArray[np.int8]:
        """(M, KP) int8 as quantize_tokens stores them: place 4*i + j of 32 is channel 8*j + i."""
        m, k = self.q_x.shape
        padded = np.zeros((m, -(-k // 128) * 128), np.int8)
        padded[:, :k] = self.q_x
        return np.ascontiguousarray(
            padded.reshape(m, -1, 4, 8).transpose(0, 1, 3, 2).reshape(padded.shape)
        )

    @property
    def planes(self) -> NDArray[np.int32]:
        return np.ascontiguousarray(pack(self.q_w, self.bits))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as functions on a processor, with bounds and overflow checked."""
    library = tmp_path_factory.mktemp("int4") / "host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    includes = [f"-I{EMULATION}", f"-I{KERNEL.parent}"]
    source = EMULATION / "run_on_host.cpp"
    run("g++", *flags, *checks, *includes, "-shared", "-o", library, source)
    return ctypes.CDLL(str(library))


def pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run_pack(host: ctypes.CDLL, codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    m, kp = codes.shape
    packed = np.full((m, kp // 2), 0xA5, np.uint8)
    host.run_pack(pointer(codes), pointer(packed), ctypes.c_int64(m * kp // 32))
    return packed


def run_qlinear(
    host: ctypes.CDLL,
    problem: Problem,
    *,
    lands_at_once: bool,
    epilogue: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]
    | None = None,
) -> NDArray[np.generic]:
    """Return the sums, or y where `epilogue` gives token scale, channel scale and bias."""
    packed, planes = run_pack(host, problem.codes), problem.planes
    m, n = len(problem.q_x), len(problem.q_w)
    if epilogue is None:
        y = np.full((m, n), 0x5A5A5A5A, np.int32)
        floats = (ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p())
        has_bias = False
    else:
        y = np.full((m, n), np.nan, np.float16)
        has_bias = epilogue[2] is not None
        floats = tuple(ctypes.c_void_p() if a is None else pointer(a) for a in epilogue)
    host.run_qlinear(
        problem.bits, int(epilogue is None), int(lands_at_once), pointer(packed), pointer(planes),
        *floats, pointer(y), m, n, 2 * packed.shape[1], planes.shape[2], int(has_bias),
    )  # fmt: skip
    return y


def test_packing_puts_each_channel_where_the_kernel_reads_it(host: ctypes.CDLL):
    problem = Problem.draw(3, 1, 256, 4, 4)
    words = run_pack(host, problem.codes).view("<u4").reshape(3, 8, 4)
    for i in range(4):
        for j in range(8):
            nibbles = (words[:, :, i] >> np.uint32(4 * j) & 15).astype(np.int8)
            signed = np.where(nibbles < 8, nibbles, nibbles - 16)
            expected = problem.q_x.reshape(3, 8, 32)[:, :, 4 * j + i]
            assert np.array_equal(signed, expected), (i, j)


@pytest.mark.parametrize("lands_at_once", [False, True], ids=["late", "early"])
@pytest.mark.parametrize(
    ("m", "n", "k", "bits", "act_bits"),
    [
        (1, 1, 32, 4, 4),
        (129, 131, 1152, 3, 3),  # odd, two tiles each way; rows of words are whole chunks
        (77, 130, 1152, 2, 4),
        (33, 40, 1152, 4, 4),
        (5, 129, 1000, 4, 3),  # KW 32, K ends inside a word
        (130, 7, 161, 3, 4),  # KW 6: words one at a time, clamped at the end
        (2, 3, 96, 2, 2),  # KW 3, one step
    ],
)
def test_sums_equal_numpy_bit_for_bit(
    host: ctypes.CDLL, m: int, n: int, k: int, bits: int, act_bits: int, lands_at_once: bool
):
    problem = Problem.draw(m, n, k, bits, act_bits, seed=m + k)
    sums = run_qlinear(host, problem, lands_at_once=lands_at_once)
    assert np.array_equal(sums, problem.sums)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_epilogue_equals_numpy_bit_for_bit(host: ctypes.CDLL, has_bias: bool):
    problem = Problem.draw(19, 37, 256, 3, 4)
    rng = np.random.default_rng(1)
    act_scale = rng.uniform(1e-3, 1, 19).astype(np.float32)
    weight_scale = rng.uniform(1e-4, 1, 37).astype(np.float32)
    act_scale[0] = 1e-20  # fp16's smallest numbers, and zero
    act_scale[1] = 1e-6
    act_scale[2] = 1e4  # and infinity
    bias = rng.normal(size=37).astype(np.float32) if has_bias else None
    y = run_qlinear(host, problem, lands_at_once=False, epilogue=(act_scale, weight_scale, bias))
    expected = (problem.sums.astype(np.float32) * weight_scale) * act_scale[:, None]
    if bias is not None:
        expected = expected + bias
    with np.errstate(over="ignore"):
        half = expected.astype(np.float16)
    assert np.isinf(half).any()
    assert np.array_equal(y, half)


def compile_cubin(architecture: str, folder: Path) -> Path:
    """Compile with nvcc; skip, or fail where TREEQ_REQUIRE names nvcc, where there is none."""
    if shutil.which("nvcc") is None:
        skip_or_fail("nvcc", "nvcc is not in PATH")
    out = folder / f"{architecture}.cubin"
    flags = ["-O3", "-std=c++17", "-Werror", "all-warnings", f"-arch={architecture}"]
    run("nvcc", "-cubin", *flags, "-o", out, KERNEL)
    return out


def tool(name: str) -> str:
    """cuobjdump, from PATH or from the triton package."""
    spec = importlib.util.find_spec("triton")
    inside = Path(str(spec.origin)).parent / "backends/nvidia/bin" / name if spec else Path()
    found = shutil.which(name) or (str(inside) if inside.is_file() else None)
    if found is None:
        skip_or_fail("nvcc", f"{name} is neither in PATH nor in the package triton")
    return str(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_machine_code_is_what_was_meant(architecture: str, tmp_path: Path):
    """int4 MMA, no local memory, and registers for two blocks of 256 threads a multiprocessor."""
    cubin = compile_cubin(architecture, tmp_path)
    sass = run(tool("cuobjdump"), "-sass", cubin).stdout
    usage = run(tool("cuobjdump"), "-res-usage", cubin).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\tFunction : |\Z)", sass, re.DOTALL))
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(functions) == len(used) == 7
    for name, registers, stack, shared, local in used:
        assert (stack, local) == ("0", "0"), name
        assert not re.search(r"\b(STL|LDL)\b", functions[name]), name
        if name == "pack_int4_kernel":
            continue
        bits = int(name[len("qlinear_int4_w")])
        assert int(registers) <= 128, name
        assert int(shared) == 2 * (128 * 64 + bits * 128 * 16), name
        mma = re.findall(r"\b(IMMA[.\w]*)", functions[name])
        assert mma == ["IMMA.16864.S4.S4"] * NUM_MMA, name
        assert len(re.findall(r"\bLDSM\.16\.M88\.4\b", functions[name])) == NUM_MATRIX_LOADS
        # A rotation and one logic operation a plane: nothing cheaper expands bits to nibbles.
        assert len(re.findall(r"\bSHF\.R\.W\.U32\b", functions[name])) == 8 * bits, name
        assert re.search(r"\bLDGSTS\.E\.BYPASS\.128\b", functions[name]), name


def test_the_audit_sees_a_kernel_that_spills(tmp_path: Path):
    """The same with half of the registers: else the test above is blind."""
    if shutil.which("nvcc") is None:
        skip_or_fail("nvcc", "nvcc is not in PATH")
    out = tmp_path / "spilled.cubin"
    command = ["nvcc", "-cubin", "-O3", "-std=c++17", "-arch=sm_80", "-maxrregcount=64"]
    text = KERNEL.read_text().replace("kThreads, 2)", "kThreads)")
    source = tmp_path / "spilled.cu"
    source.write_text(text.replace("__launch_bounds__(treeq::int4::kThreads)", ""))
    run(*command, f"-I{KERNEL.parent}", "-o", out, source)
    usage = run(tool("cuobjdump"), "-res-usage", out).stdout
    stacks = re.findall(r"Function qlinear_\w+:\s+REG:\d+ STACK:(\d+)", usage)
    assert len(stacks) == 6
    assert all(int(stack) > 0 for stack in stacks)
