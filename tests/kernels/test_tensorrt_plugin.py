"""libtreeq_plugins.so without a GPU: what it exports, which kernels it chooses, what it launches.

A host in C++ plays TensorRT, a libcuda.so.1 of ours writes down launches: both in `tensorrt/`.
"""

import ctypes
import itertools
import re
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from treeq_gpu import choose
from treeq_gpu.instantiations import DTYPES, INSTANTIATIONS, DType, Instantiation

from tests.hand_layers import make_format
from tests.kernels.plugin_build import CUDA_INCLUDE, ROOT, Built, run, shared_bytes
from treeq_export.ops import ACT_SCALES, MONARCH, QLINEAR, ActScale, LayerFormat

TYPES = {"fp16": "half", "bf16": "bf16", "fp32": "float"}
SIZES = {"i32": "i", "fp32": "f"}


def test_only_the_documented_functions_are_exported(built: Built):
    lines = run("nm", "-D", "--defined-only", built.library).stdout.split("\n")
    names = {line.split()[-1] for line in lines if line}
    own = {name for name in names if name.startswith("treeq_plugin_")}
    assert names - own == {"getCreators", "setLoggerFinder"}
    assert len(own) == 5


def test_neither_tensorrt_nor_cuda_is_linked(built: Built):
    dynamic = run("readelf", "-d", built.library).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed
    assert [name for name in needed if not name.startswith(("libc.", "libm.", "ld-linux"))] == []
    assert "NODELETE" in dynamic


def test_driver_declarations_agree_with_cuda(built: Built, tmp_path: Path):
    """Same number and kinds of arguments, same constants; pointers to opaque types may differ."""
    assert built.library.is_file()
    header = (ROOT / "kernels" / "tensorrt" / "driver.h").read_text()
    entries = re.findall(r"Result \(\*(cu\w+)\)", header)
    assert len(entries) == 7
    constants = {
        "kNumMultiprocessors": "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
        "kCapabilityMajor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
        "kCapabilityMinor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
        "kMaxDynamicSharedBytes": "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
    }
    source = [
        "#include <cuda.h>",
        "#include <type_traits>",
        '#include "driver.h"',
        "template <class A, class B> constexpr bool alike = sizeof(A) == sizeof(B) &&",
        "    std::is_pointer<A>::value == std::is_pointer<B>::value;",
        "template <class F, class G> struct Same;",
        "template <class R, class... A, class S, class... B>",
        "struct Same<R (*)(A...), S (*)(B...)> {",
        '  static_assert(sizeof...(A) == sizeof...(B), "arguments");',
        "  static constexpr bool value = alike<R, S> && (alike<A, B> && ...);",
        "};",
        "using D = treeq::cuda::Driver;",
    ]
    source += [
        f'static_assert(Same<decltype(D::{name}), decltype(&::{name})>::value, "{name}");'
        for name in entries
    ]
    source += [
        f'static_assert(treeq::cuda::{ours} == {theirs}, "{theirs}");'
        for ours, theirs in constants.items()
    ]
    path = tmp_path / "check.cpp"
    path.write_text("\n".join([*source, ""]))
    compiler = ["g++", "-std=c++17", "-fsyntax-only", f"-I{ROOT}/kernels/tensorrt"]
    run(*compiler, f"-isystem{CUDA_INCLUDE}", path)
    path.write_text("\n".join([*source, ""]).replace("== CU_FUNC_A", "== 1 + CU_FUNC_A"))
    blind = subprocess.run(
        [*compiler, f"-isystem{CUDA_INCLUDE}", str(path)], capture_output=True, check=False
    )
    assert blind.returncode != 0


class _Launch(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 64), ("grid", ctypes.c_int32 * 3))

    def read(self) -> tuple[str, tuple[int, ...]]:
        return self.name.decode(), tuple(self.grid)


class _QLinear(ctypes.Structure):
    _fields_ = (
        ("product", _Launch), ("finish", _Launch), ("split_k", ctypes.c_int32),
        ("k_per_split", ctypes.c_int32),
    )  # fmt: skip


class _Quantize(ctypes.Structure):
    _fields_ = (("launch", _Launch), ("columns_per_program", ctypes.c_int32))


class _Monarch(ctypes.Structure):
    _fields_ = (("half_in", _Launch), ("half_out", _Launch))


def call(library: ctypes.CDLL, name: str, kinds: str, result: Any, *values: Any) -> Any:
    """Call treeq_plugin_<name> with arguments of kinds l(ong), i(nt), s(tring)."""
    types = {"l": ctypes.c_int64, "i": ctypes.c_int32, "s": ctypes.c_char_p}
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    arguments = [types[kind](value) for kind, value in zip(kinds, raw, strict=True)]
    getattr(library, f"treeq_plugin_{name}")(*arguments, ctypes.byref(result))
    return result


ROWS = (1, 2, 15, 16, 17, 64, 65, 127, 128, 129, 255, 256, 300, 512, 1000, 1024, 2048, 4096, 65536)
FEATURES = ((1152, 1152), (3456, 1152), (4608, 1152), (1152, 4608), (6912, 1152), (33, 96),
            (1, 32), (12288, 3072), (1000, 1000), (256, 130_944))  # fmt: skip
NUM_SMS = (1, 20, 84, 108, 128, 132, 144, 170)


def test_the_choice_of_a_product_is_that_of_python(built: Built):
    library = ctypes.CDLL(str(built.library))
    cases = itertools.product(ROWS, FEATURES, NUM_SMS, (2, 3, 8), (0, 32, 64, 128, 96), DTYPES)
    count = 0
    for m, (n, k), num_sms, bits, group, dtype in cases:
        if group and k % group:
            continue
        layer = make_format(weight_bits=bits, group_size=group, in_features=k, out_features=n)
        product, *finish = choose.choose_qlinear(layer, m, num_sms, dtype)
        got = call(library, "choose_qlinear", "llliiis", _QLinear(), m, n, k, bits, group, num_sms,
                   dtype)  # fmt: skip
        where = (m, n, k, num_sms, bits, group, dtype)
        k_per_split = product.numbers.get("k_per_split", choose.padded(k))
        assert got.product.read() == (product.kernel.name, product.grid), where
        assert (got.split_k, got.k_per_split) == (product.grid[1], k_per_split), where
        last = (finish[0].kernel.name, finish[0].grid) if finish else ("", (0, 0, 0))
        assert got.finish.read() == last, where
        count += 1
    assert count > 20_000


def test_the_choice_of_quantizer_and_branch_is_that_of_python(built: Built):
    library = ctypes.CDLL(str(built.library))
    for m, k, num_sms in itertools.product(ROWS, (32, 1152, 1000, 4608), NUM_SMS):
        for scale, rotation, dtype in itertools.product(ACT_SCALES, (1, 8, 128), DTYPES):
            layer = make_format(act_scale=scale, rotation_group=rotation, in_features=k)
            expected = choose.choose_quantize(layer, m, num_sms, dtype)
            got = call(library, "choose_quantize", "lliiis", _Quantize(), m, k, scale.number,
                       rotation, num_sms, dtype)  # fmt: skip
            assert got.launch.read() == (expected.kernel.name, expected.grid)
            assert got.columns_per_program == expected.numbers["columns_per_program"]
    for m, b_in, b_out, rank, block in itertools.product(ROWS, (1, 4), (1, 16), (1, 9), (36, 288)):
        for dtype in DTYPES:
            branch = choose.choose_monarch(m, 72, b_in, b_out, rank, block, dtype)
            got = call(library, "choose_monarch", "liiiis", _Monarch(), m, b_in, b_out, rank, block,
                       dtype)  # fmt: skip
            halves = [(half.kernel.name, half.grid) for half in branch]
            assert [got.half_in.read(), got.half_out.read()] == halves


def test_the_workspace_of_an_engine_is_enough_for_every_batch_and_gpu(built: Built):
    library = ctypes.CDLL(str(built.library))
    library.treeq_plugin_max_workspace_bytes.restype = ctypes.c_int64
    for (n, k), group in itertools.product(FEATURES, (0, 32)):
        if group and k % group:
            continue
        layer = make_format(group_size=group, in_features=k, out_features=n)
        for max_m in ROWS:
            given = library.treeq_plugin_max_workspace_bytes(
                *map(ctypes.c_int64, (max_m, n, k)), ctypes.c_int32(group)
            )
            needed = [
                choose.workspace_bytes(layer, m, num_sms)
                for m in ROWS if m <= max_m for num_sms in (*NUM_SMS, 256)
            ]  # fmt: skip
            assert given >= max(needed), (n, k, group, max_m)
            assert given <= max(needed) + 4 * 256 * 64 * 64


def address(index: int) -> int:
    """Where host.cpp says that tensor `index` is: inputs from 0, output 8, workspace 9."""
    return 0x100000 * (index + 1)


@dataclass(frozen=True)
class Case:
    """One QLinear layer."""

    m: int
    k: int = 1152
    n: int = 4608
    bits: int = 3
    act_bits: int = 4
    act_scale: ActScale = ActScale.TOKEN_RMS
    rotation: int = 128
    group: int = 0
    dtype: DType = "fp16"
    has_bias: bool = True
    has_addend: bool = False
    extra: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        fields = {
            "weight_bits": self.bits, "act_bits": self.act_bits, "rotation_group": self.rotation,
            "group_size": self.group, "in_features": self.k, "out_features": self.n,
        }  # fmt: skip
        kind = TYPES[self.dtype]
        words = -(-self.k // 32)
        groups = self.k // self.group if self.group else 1
        lines = [f"op {QLINEAR.name}", f"text act_scale {self.act_scale}"]
        lines += ["float act_step 0.375", *(f"int {key} {v}" for key, v in fields.items())]
        lines += [f"input {kind} 1 {self.m} {self.k}", f"input int32 {self.bits} {self.n} {words}"]
        lines += [f"input float {self.n} {groups}"]
        lines += [f"input float {self.n}"] * self.has_bias
        lines += [f"input {kind} 1 {self.m} {self.n}"] * self.has_addend
        return "\n".join([*lines, f"output {kind} 1 {self.m} {self.n}", *self.extra])

    @property
    def layer(self) -> LayerFormat:
        return make_format(
            weight_bits=self.bits, act_bits=self.act_bits, act_scale=self.act_scale,
            rotation_group=self.rotation, group_size=self.group, in_features=self.k,
            out_features=self.n,
        )  # fmt: skip

    def expected(self, num_sms: int) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
        """(instantiation, grid, arguments by name) of each launch."""
        layer = self.layer
        quantize = choose.choose_quantize(layer, self.m, num_sms, self.dtype)
        product = choose.choose_qlinear(layer, self.m, num_sms, self.dtype)
        codes, scales, _ = choose.workspace_parts(layer, self.m, choose.num_splits(product))
        half = 1 << (self.act_bits - 1)
        values = {
            "x": address(0), "planes": address(1), "weight_scale": address(2),
            "bias": address(3) if self.has_bias else address(2),
            "addend": address(3 + self.has_bias) if self.has_addend else address(0),
            "y": address(8), "codes": address(9), "scale": address(9) + codes,
            "act_scale": address(9) + codes, "partials": address(9) + codes + scales,
            "M": self.m, "N": self.n, "K": self.k, "KP": choose.padded(self.k),
            "KW": -(-self.k // 32), "num_groups": self.k // self.group if self.group else 1,
            "has_bias": int(self.has_bias), "has_addend": int(self.has_addend),
            "qmin": -half, "qmax": half - 1, "step": 0.375,
            "columns_per_program": quantize.numbers["columns_per_program"],
            "k_per_split": product[0].numbers.get("k_per_split"),
            "num_splits": choose.num_splits(product),
        }  # fmt: skip
        return [(step.kernel.name, step.grid, values) for step in (quantize, *product)]


def pack_arguments(one: Instantiation, values: dict[str, Any]) -> str:
    """The bytes of a launch's arguments, and of the two hidden pointers, in hexadecimal."""
    kinds = [SIZES.get(kind, "Q") for _, kind in one.params]
    data = [struct.pack(f"<{kind}", values[name])
            for kind, (name, _) in zip(kinds, one.params, strict=True)]  # fmt: skip
    return b"".join([*data, bytes(16)]).hex()


def check_calls(calls: list[Any], expected: list[Any], arch: str) -> None:
    """Compare the driver's record with launches that happen twice; kernels load once."""
    launches = [call for call in calls if call["call"] == "launch"]
    assert len(launches) == 2 * len(expected)
    for call_, (name, grid, values) in zip(launches, expected * 2, strict=True):
        one = INSTANTIATIONS[name]
        assert (call_["name"], call_["arch"], call_["function"]) == (name, arch, one.kernel)
        assert tuple(call_["grid"]) == grid
        assert call_["block"] == [32 * one.num_warps, 1, 1]
        assert call_["shared_bytes"] == shared_bytes(name, arch)
        assert call_["stream"] == 0x5712
        assert call_["arguments"] == pack_arguments(one, values)
    names = [name for name, _, _ in expected]
    assert [call["name"] for call in calls if call["call"] == "load"] == names
    large = [name for name in names if shared_bytes(name, arch) > 48 * 1024]
    attributes = [call for call in calls if call["call"] == "attribute"]
    assert [call["name"] for call in attributes] == large
    assert all(call["attribute"] == 8 for call in attributes)
    assert [call["value"] for call in attributes] == [shared_bytes(name, arch) for name in large]


CASES = [
    *(Case(m, has_bias=bias, has_addend=addend)
      for m in (1, 300, 2048) for bias in (False, True) for addend in (False, True)),
    *(Case(m, group=128, bits=4, has_addend=True) for m in (1, 300, 2048)),
    Case(300, group=96, bits=2, k=1152, n=1000),
    Case(17, k=1000, n=77, rotation=8, act_scale=ActScale.TOKEN_ABSMAX, act_bits=8, bits=8),
    Case(64, dtype="bf16", act_scale=ActScale.TENSOR_STATIC, rotation=1),
    Case(2048, dtype="fp32", bits=4, rotation=64, act_bits=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"m{case.m}-w{case.bits}-g{case.group}")
def test_qlinear_launches_what_python_would(built: Built, case: Case, tmp_path: Path):
    answer, calls = built.enqueue(case.text, tmp_path / "log")
    assert (answer["stopped"], answer["log"]) == ("", "")
    assert answer["fields"] == list(QLINEAR.attributes)
    check_calls(calls, case.expected(132), "sm_90")
    assert answer["workspace"] >= choose.workspace_bytes(case.layer, case.m, 132)


@pytest.mark.parametrize("m", [1, 300, 2048])
def test_monarch_launches_what_python_would(built: Built, m: int, tmp_path: Path):
    b_in, b_out, rank, block_in, block_out = 4, 8, 6, 288, 144
    text = "\n".join([
        f"op {MONARCH.name}", f"input half 2 {m} {b_in * block_in}",
        f"input half {b_in} {block_in} {b_out * rank}",
        f"input half {b_out} {b_in * rank} {block_out}", f"output half 2 {m} {b_out * block_out}",
    ])  # fmt: skip
    answer, calls = built.enqueue(text, tmp_path / "log")
    assert (answer["stopped"], answer["log"], answer["fields"]) == ("", "", [])
    assert answer["workspace"] == 2 * m * b_out * b_in * rank * 2
    values = {
        "x": address(0), "R": address(1), "L": address(2), "y": address(8), "z": address(9),
        "M": 2 * m, "block_in": block_in, "b_in": b_in, "b_out": b_out, "rank": rank,
        "inner": b_in * rank, "block_out": block_out,
    }  # fmt: skip
    chosen = choose.choose_monarch(2 * m, block_in, b_in, b_out, rank, block_out, "fp16")
    check_calls(calls, [(half.kernel.name, half.grid, values) for half in chosen], "sm_90")


@pytest.mark.parametrize(
    ("capability", "arch"), [(80, 80), (86, 80), (87, 80), (89, 89), (90, 90), (120, 120)]
)
def test_the_cubin_of_the_device_is_taken(built: Built, capability: int, arch: int, tmp_path: Path):
    answer, calls = built.enqueue(Case(2048).text, tmp_path / "log", CAPABILITY=capability)
    assert answer["stopped"] == ""
    assert {call["arch"] for call in calls if call["call"] == "load"} == {f"sm_{arch}"}


ANY = "x" * 20
REFUSED = [
    (Case(8, rotation=96), "createPlugin", "layer: rotation_group is 96, expected a power of two"),
    (Case(8, bits=9), "createPlugin", "layer: weight_bits is 9, expected 2..8"),
    (Case(8, act_bits=0), "createPlugin", "act_bits is 0; a weight-only layer has no plugin"),
    (Case(8, k=130_976), "createPlugin", "in_features is 130976, expected 1..130944"),
    (Case(8, group=48), "createPlugin", "group_size is 48, expected 0 or a multiple of 32"),
    (Case(8, group=160), "createPlugin", "group_size 160 does not divide in_features 1152"),
    (Case(8, act_scale="token"), "createPlugin", 'act_scale is "token", expected token_rms'),
    (Case(8, act_scale=ANY), "createPlugin", "act_scale is 20 characters long, expected token_rms"),
    (Case(8, extra=("float act_step 0",)), "createPlugin", "act_step is 0, expected a positive"),
    (Case(8, extra=("input float 4608",)), "configurePlugin", "inputs 3 and 4 have 1 and 1 axes"),
    (Case(8, extra=("int out_features 4607",)), "configurePlugin",
     "planes has the shape (3, 4608, 36), expected (3, 4607, 36)"),
    (Case(8, extra=("int in_features 1280",)), "configurePlugin",
     "x has the shape (1, 8, 1152), expected (-1, -1, 1280)"),
    (Case(8, dtype="bf16", bits=7), "configurePlugin",
     "layer: libtreeq_plugins.so has no kernel qlinear_w7_token_bf16"),
    (Case(8, extra=("int unshaped 1",)), "enqueue", "layer: enqueue came before onShapeChange"),
    (Case(8, extra=("int unaligned 1",)), "enqueue", "tensor 0 is at 0x100002, expected an"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "stopped", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_run_is_refused_with_the_layer_and_a_reason(
    built: Built, case: Case, stopped: str, message: str, tmp_path: Path
):
    answer, calls = built.enqueue(case.text, tmp_path / "log")
    assert answer["stopped"] == stopped, answer
    assert message.replace("(-1, -1, ", "(1, 8, ") in answer["log"]
    assert calls == []


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ({"CAPABILITY": 75}, "layer: no kernel quantize_rms_h128_fp16 for sm_75 in libtreeq"),
        ({"CAPABILITY": 100}, "which has it for sm_80, sm_89, sm_90, sm_120; rebuild it with"),
        ({"CAPABILITY": 121}, "for sm_121 in libtreeq_plugins.so"),
        ({"FAIL": "cuCtxGetDevice"}, "layer: no CUDA device: a fake failure"),
        ({"FAIL": "cuLibraryLoadData"}, "does not load on device 0 (sm_90): a fake failure"),
        ({"FAIL": "cuLaunchKernel"}, "layer: launch of quantize_rms_h128_fp16 with grid ("),
    ],
)  # fmt: skip
def test_a_failing_device_is_one_line_with_the_layer(
    built: Built, fake: dict[str, Any], message: str, tmp_path: Path
):
    answer, calls = built.enqueue(Case(300).text, tmp_path / "log", **fake)
    assert answer["stopped"] == "enqueue"
    assert message in answer["log"]
    assert [call for call in calls if call["call"] == "launch"] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # Found first, so that the driver of a host that has one is out of the way.
        (None, "engines with treeq plugins run where NVIDIA's driver is installed"),
        ("int nothing;", "cuGetErrorString is missing; expected the driver of CUDA 12.0 or later"),
    ],
)
def test_a_host_without_a_driver_is_told_so(
    built: Built, source: str | None, message: str, tmp_path: Path
):
    driver = tmp_path / "libcuda.so.1"
    driver.touch()
    if source:
        run("g++", "-shared", "-fPIC", "-o", driver, "-x", "c++", "-", input=source)
    answer, _ = Built(built.library, built.host, driver).enqueue(Case(300).text, tmp_path / "log")
    assert answer["stopped"] == "enqueue"
    assert answer["log"].startswith("libcuda.so.1: ")
    assert message in answer["log"]
