"""Launches of the packed ops, recorded by a driver that runs nothing."""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from treeq_gpu import choose
from treeq_gpu.instantiations import INSTANTIATIONS

from treeq_export.errors import RunnerError
from treeq_export.ops import ActScale, LayerFormat
from treeq_export.runners.cubin_launcher import (
    CubinEntry,
    KernelFolder,
    LinearCall,
    LinearPointers,
    MonarchShape,
    launch_monarch,
    launch_qlinear,
    linear_workspace_bytes,
    pick_architecture,
)

SMS = 132
LAYER = LayerFormat(3, 4, ActScale.TOKEN_RMS, 0.34, 128, 0, in_features=1152, out_features=4608)
CALL = LinearCall(LAYER, 4096, "fp16")
POINTERS = LinearPointers(
    x=0x1000, planes=0x2000, weight_scale=0x3000, bias=0x4000, addend=0, y=0x5000, workspace=0x10000
)


class Attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = SMS
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 8
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 9


class FunctionAttribute(IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


@dataclass
class Launch:
    """One recorded launch; arguments by name."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    arguments: Mapping[str, Any]
    types: Mapping[str, Any]


@dataclass
class FakeDriver:
    """What of `cuda.bindings.driver` the launcher uses; a handle is 1 + the kernel's index."""

    params: dict[str, list[tuple[str, str]]]
    status: int = 0
    launches: list[Launch] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    raised: list[int] = field(default_factory=list)
    CUdevice_attribute = Attribute
    CUfunction_attribute = FunctionAttribute
    CUfunction = int

    def cuCtxGetDevice(self) -> tuple[int, int]:  # noqa: N802
        return 0, 0

    def cuDeviceGetAttribute(self, attribute: Attribute, _device: int) -> tuple[int, int]:  # noqa: N802
        return 0, attribute.value

    def cuLibraryLoadData(self, code: bytes, *_: Any) -> tuple[int, int]:  # noqa: N802
        self.loaded.append(code)
        return 0, len(self.loaded)

    def cuLibraryGetKernel(self, _library: int, name: bytes) -> tuple[int, int]:  # noqa: N802
        return 0, 1 + list(self.params).index(name.decode().removeprefix("f_"))

    def cuKernelSetAttribute(  # noqa: N802
        self, _attribute: Any, value: int, _kernel: int, _device: int
    ) -> tuple[int]:
        self.raised.append(value)
        return (0,)

    def cuGetErrorName(self, _status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"CUDA_ERROR_FAKE"

    def cuLaunchKernel(self, handle: int, *rest: Any) -> tuple[int]:  # noqa: N802
        gx, gy, gz, bx, by, bz, shared, stream, (values, types), _ = rest
        name = list(self.params)[handle - 1]
        names = [param for param, _ in self.params[name]]
        self.launches.append(
            Launch(
                name,
                (gx, gy, gz),
                (bx, by, bz),
                shared,
                stream,
                dict(zip(names, values, strict=True)),
                dict(zip(names, types, strict=True)),
            )
        )
        return (self.status,)


def make_folder(folder: Path) -> FakeDriver:
    """Write a folder as `treeq_gpu.ahead` does, with text for cubins; two hidden pointers each."""
    folder.mkdir(exist_ok=True)
    entries, params = [], {}
    for name, instantiation in INSTANTIATIONS.items():
        code = name.encode()
        (folder / f"{name}.sm_80.cubin").write_bytes(code)
        params[name] = [*instantiation.params, ("scratch0", "*i8"), ("scratch1", "*i8")]
        entries.append(
            {
                "name": name,
                "function": f"f_{name}",
                "arch": "sm_80",
                "file": f"{name}.sm_80.cubin",
                "sha256": hashlib.sha256(code).hexdigest(),
                "shared_bytes": 78_000 if "wide" in name else 1000,
                "num_warps": instantiation.num_warps,
                "params": params[name],
            }
        )
    (folder / "kernels.json").write_text(json.dumps({"kernels": entries}))
    return FakeDriver(params)


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    return make_folder(tmp_path / "kernels")


@pytest.fixture
def kernels(tmp_path: Path, driver: FakeDriver) -> KernelFolder:
    return KernelFolder(tmp_path / "kernels", driver)


def test_a_wide_product_is_quantize_and_one_launch(kernels: KernelFolder, driver: FakeDriver):
    launch_qlinear(kernels, CALL, POINTERS, stream=77)
    quantize, product = driver.launches
    rule = choose.choose_quantize(LAYER, 4096, SMS)
    assert (quantize.name, quantize.grid) == (rule.kernel.name, rule.grid)
    assert quantize.arguments == {
        "x": 0x1000,
        "codes": 0x10000,
        "scale": 0x10000 + 4096 * 1152,
        "M": 4096,
        "K": 1152,
        "KP": 1152,
        "qmin": -8,
        "qmax": 7,
        "step": 0.34,
        "columns_per_program": rule.numbers["columns_per_program"],
        "scratch0": 0,
        "scratch1": 0,
    }
    assert quantize.types["x"] is ctypes.c_void_p
    assert quantize.types["M"] is ctypes.c_int32
    assert quantize.types["step"] is ctypes.c_float
    assert quantize.types["scratch1"] is ctypes.c_void_p
    (linear,) = choose.choose_qlinear(LAYER, 4096, SMS)
    assert (product.name, product.grid) == (linear.kernel.name, linear.grid)
    assert product.arguments == {
        "codes": 0x10000,
        "planes": 0x2000,
        "act_scale": 0x10000 + 4096 * 1152,
        "weight_scale": 0x3000,
        "bias": 0x4000,
        "addend": 0x3000,  # any valid address
        "y": 0x5000,
        "M": 4096,
        "N": 4608,
        "KP": 1152,
        "KW": 36,
        "num_groups": 1,
        "has_bias": 1,
        "has_addend": 0,
        "scratch0": 0,
        "scratch1": 0,
    }
    assert (product.block, product.shared, product.stream) == ((256, 1, 1), 78_000, 77)
    assert driver.raised == [78_000]  # only above what every kernel may have


def test_a_small_product_is_quantize_slices_and_finish(kernels: KernelFolder, driver: FakeDriver):
    layer = replace(LAYER, out_features=96, in_features=4608)
    launch_qlinear(
        kernels, LinearCall(layer, 5, "fp16"), replace(POINTERS, bias=0, addend=0x6000), stream=1
    )
    _, slices, finish = driver.launches
    linear = choose.choose_qlinear(layer, 5, SMS)
    splits = choose.num_splits(linear)
    assert splits > 1
    launched = [(slices.name, slices.grid), (finish.name, finish.grid)]
    assert launched == [(step.kernel.name, step.grid) for step in linear]
    codes, scales, partials = choose.workspace_parts(layer, 5, splits)
    at = 0x10000 + codes + scales
    assert slices.arguments["partials"] == finish.arguments["partials"] == at
    assert slices.arguments["k_per_split"] == linear[0].numbers["k_per_split"]
    assert finish.arguments["act_scale"] == 0x10000 + codes
    assert finish.arguments["num_splits"] == splits
    assert (finish.arguments["has_bias"], finish.arguments["has_addend"]) == (0, 1)
    assert finish.arguments["addend"] == 0x6000
    assert codes + scales + partials <= linear_workspace_bytes(layer, 5, SMS)


def test_group_scales_and_odd_sizes(kernels: KernelFolder, driver: FakeDriver):
    layer = replace(LAYER, out_features=50, in_features=160, group_size=32)
    launch_qlinear(kernels, LinearCall(layer, 33, "fp16"), POINTERS, stream=1)
    _, product = driver.launches
    assert "_g32_" in product.name
    assert product.arguments["num_groups"] == 5
    assert (product.arguments["KP"], product.arguments["KW"]) == (256, 5)


def test_no_tokens_no_launch(kernels: KernelFolder, driver: FakeDriver):
    launch_qlinear(kernels, replace(CALL, m=0), POINTERS, stream=1)
    launch_monarch(kernels, MonarchShape(0, 32, 2, 4, 3, 16, "fp16"), (1, 2, 3, 4, 5), stream=1)
    assert driver.launches == []


def test_monarch_is_two_launches(kernels: KernelFolder, driver: FakeDriver):
    shape = MonarchShape(300, 576, 2, 4, 8, 288, "bf16")
    launch_monarch(kernels, shape, (0x10, 0x20, 0x30, 0x40, 0x50), stream=9)
    rule = choose.choose_monarch(300, 576, 2, 4, 8, 288, "bf16")
    first, second = driver.launches
    launched = [(first.name, first.grid), (second.name, second.grid)]
    assert launched == [(step.kernel.name, step.grid) for step in rule]
    expected_in = {"x": 0x10, "R": 0x20, "z": 0x50, "M": 300, "block_in": 576}
    assert first.arguments.items() >= (expected_in | {"b_in": 2, "b_out": 4, "rank": 8}).items()
    expected_out = {"z": 0x50, "L": 0x30, "y": 0x40, "M": 300, "inner": 16}
    assert second.arguments.items() >= (expected_out | {"block_out": 288, "b_out": 4}).items()
    assert shape.workspace_bytes == 300 * 4 * 2 * 8 * 2


def test_a_kernel_is_loaded_once(kernels: KernelFolder, driver: FakeDriver):
    for _ in range(3):
        launch_qlinear(kernels, CALL, POINTERS, stream=1)
    assert len(driver.loaded) == 2
    assert len(driver.launches) == 6


@pytest.mark.parametrize("n", [50, 1152, 4608])
@pytest.mark.parametrize("most", [1, 16, 17, 100, 700, 4096])
def test_the_workspace_suffices_for_fewer_tokens_and_fewer_multiprocessors(n: int, most: int):
    layer = replace(LAYER, out_features=n)
    enough = linear_workspace_bytes(layer, most)
    for num_sms in (1, 46, 132, 188):
        for m in {*range(1, min(most, 200) + 1), most}:
            assert choose.workspace_bytes(layer, m, num_sms) <= enough, (m, num_sms)


@pytest.mark.parametrize(
    ("archs", "gpu", "expected"),
    [
        (["sm_80", "sm_89"], (8, 9), "sm_89"),
        (["sm_80", "sm_89"], (8, 6), "sm_80"),
        (["sm_120", "sm_90"], (12, 1), "sm_120"),
    ],
)
def test_the_architecture_is_of_the_same_major(archs: list[str], gpu: Any, expected: str):
    manifest = _entries(archs)
    assert pick_architecture(Path("k"), manifest, *gpu) == expected


def _entries(archs: list[str]) -> list[CubinEntry]:
    rest: Any = {"name": "a", "file": "a.cubin", "sha256": "0", "function": "f"}
    rest |= {"shared_bytes": 0, "num_warps": 4, "params": []}
    return [CubinEntry(arch=arch, **rest) for arch in archs]


@pytest.mark.parametrize("archs", [["sm_90"], ["sm_120"], []])
def test_no_architecture_for_the_gpu(archs: list[str]):
    with pytest.raises(RunnerError, match=r"the GPU is sm_89.*--arch sm_80"):
        pick_architecture(Path("k"), _entries(archs), 8, 9)


def test_a_kernel_that_is_not_compiled_is_named(kernels: KernelFolder):
    call = LinearCall(replace(LAYER, weight_bits=5), 4096, "bf16")
    with pytest.raises(RunnerError, match=r"no kernel qlinear_w5_wide_bf16 for sm_80.*ahead"):
        launch_qlinear(kernels, call, POINTERS, stream=1)


def test_a_changed_cubin_is_refused(tmp_path: Path, kernels: KernelFolder):
    for path in (tmp_path / "kernels").glob("quantize*"):
        path.write_bytes(b"other")
    with pytest.raises(RunnerError, match=r"quantize_rms_h128_fp16.*not what kernels\.json says"):
        launch_qlinear(kernels, CALL, POINTERS, stream=1)


def test_kernels_of_another_version_are_refused(tmp_path: Path, driver: FakeDriver):
    path = tmp_path / "kernels" / "kernels.json"
    path.write_text(path.read_text().replace('"columns_per_program"', '"columns"'))
    with pytest.raises(RunnerError, match="of another version"):
        launch_qlinear(KernelFolder(path.parent, driver), CALL, POINTERS, stream=1)


def test_a_folder_without_kernels_says_how_to_make_them(tmp_path: Path, driver: FakeDriver):
    with pytest.raises(RunnerError, match=r"kernels\.json: cannot be read.*treeq_gpu\.ahead --out"):
        KernelFolder(tmp_path, driver)


def test_an_error_of_the_driver_is_named(kernels: KernelFolder, driver: FakeDriver):
    driver.status = 1
    with pytest.raises(RunnerError, match="cuLaunchKernel failed: CUDA_ERROR_FAKE"):
        launch_qlinear(kernels, CALL, POINTERS, stream=1)
