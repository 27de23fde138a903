"""Launches the kernels that `treeq_gpu.ahead` compiled, by the CUDA driver, without Triton.

Order of one `treeq::QLinear`: quantize_tokens, then the product, or slices of K and a finish. Order
of one `treeq::Monarch`: monarch_in, monarch_out. The workspace holds codes, scales and partial sums
(QLinear), or z (Monarch). `treeq_gpu.choose` says which kernel with which grid.

Proven without a GPU: argument lists, grids, order and workspace, with a driver that only records.
Untested: needs a GPU.
"""

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from treeq_gpu import choose
from treeq_gpu.instantiations import DType

from treeq_export.errors import RunnerError
from treeq_export.ops import LayerFormat
from treeq_export.reading import read_bytes, read_record
from treeq_export.runners.cuda_bindings import load_driver

MANIFEST = "kernels.json"
# More multiprocessors never need less workspace, and no GPU of today has as many.
MAX_SMS = 256
_WARP = 32
_SMALL_ROWS = 64  # rows of the tile of `small`, the class that splits K
_PLAIN_SHARED_BYTES = 48 * 1024  # what a kernel may use without asking
_DTYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_CTYPES = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}

Number = int | float


@dataclass(frozen=True)
class LinearCall:
    """One call of `treeq::QLinear`: its layer, the number of tokens, the type of x and y."""

    layer: LayerFormat
    m: int
    dtype: DType


@dataclass(frozen=True)
class MonarchShape:
    """One `treeq::Monarch`: M tokens, b_out x b_in blocks of a rank, block_in -> block_out."""

    m: int
    block_in: int
    b_in: int
    b_out: int
    rank: int
    block_out: int
    dtype: DType

    @property
    def workspace_bytes(self) -> int:
        """Bytes of z, (M, b_out, b_in * rank), in the type of x."""
        return self.m * self.b_out * self.b_in * self.rank * _DTYPE_BYTES[self.dtype]


def linear_workspace_bytes(layer: LayerFormat, most: int, num_sms: int = MAX_SMS) -> int:
    """Return the bytes that suffice for every number of tokens up to `most`.

    Fewer tokens may need more, since only small products are cut in slices of K. Within one row of
    tiles the largest m needs most.
    """
    rows = {min(choose.TOKEN_ROWS, most), *range(_SMALL_ROWS, most, _SMALL_ROWS), most}
    return max(choose.workspace_bytes(layer, m, num_sms) for m in rows)


class KernelFolder:
    """The kernels of a folder for the current GPU, each loaded at its first launch.

    Args:
        folder: What `python -m treeq_gpu.ahead --out` wrote.
        driver: The module `cuda.bindings.driver`, or what has its functions; None imports it.

    Raises:
        RunnerError: The folder holds no kernels, or none for this GPU.
    """

    def __init__(self, folder: Path, driver: Any = None) -> None:
        self.folder = folder
        self._driver = driver or load_driver()
        self._device = self._call("cuCtxGetDevice")
        attribute = self._driver.CUdevice_attribute
        self.num_sms = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        major = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        manifest = read_manifest(folder)
        self.architecture = pick_architecture(folder, manifest, major, minor)
        self._entries = {entry.name: entry for entry in manifest if entry.arch == self.architecture}
        self._handles: dict[str, Any] = {}

    def launch(self, step: choose.Launch, values: Mapping[str, int], stream: int) -> None:
        """Put one kernel into a stream.

        Args:
            step: Kernel, grid and sizes.
            values: Addresses and flags by name; those of other kernels may be among them.
            stream: The stream's handle.

        Raises:
            RunnerError: The kernel is not in the folder, or the driver refuses.
        """
        name = step.kernel.name
        entry = self._entries.get(name)
        if entry is None:
            raise RunnerError(
                f"{self.folder}: no kernel {name} for {self.architecture}. Run `python -m "
                f"treeq_gpu.ahead --out {self.folder} --arch {self.architecture}`."
            )
        if name not in self._handles:
            self._handles[name] = self._load(entry)
        self._call(
            "cuLaunchKernel",
            *(self._driver.CUfunction(int(self._handles[name])), *step.grid),
            *(entry.num_warps * _WARP, 1, 1, entry.shared_bytes, stream),
            *(pack_arguments(entry, step.arguments(values)), 0),
        )

    def _load(self, entry: "CubinEntry") -> Any:
        """Return the driver's handle of a kernel."""
        remedy = f"Run `python -m treeq_gpu.ahead --out {self.folder}` again."
        data = read_bytes(self.folder / entry.file, error=RunnerError, remedy=remedy)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise RunnerError(
                f"{self.folder / entry.file}: its content is not what {MANIFEST} says. {remedy}"
            )
        library = self._call("cuLibraryLoadData", data, [], [], 0, [], [], 0)
        handle = self._call("cuLibraryGetKernel", library, entry.function.encode())
        shared = entry.shared_bytes
        if shared > _PLAIN_SHARED_BYTES:
            attribute = self._driver.CUfunction_attribute
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuKernelSetAttribute", most, shared, handle, self._device)
        return handle

    def _attribute(self, attribute: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", attribute, self._device))

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *results = getattr(self._driver, function)(*arguments)
        if int(status):
            name = self._driver.cuGetErrorName(status)[1].decode()
            raise RunnerError(
                f"{self.folder}: {function} failed: {name}. "
                "`treeq-export doctor` shows GPU and driver."
            )
        return results[0] if results else None


class CubinEntry(BaseModel):
    """An entry of kernels.json, as `treeq_gpu.ahead` writes it.

    Attributes:
        name: The instantiation.
        arch: Architecture, such as "sm_89".
        file: Name of the machine code's file, in the same folder.
        sha256: Digest of that file.
        function: Symbol in it.
        shared_bytes: Shared memory of a block.
        num_warps: Warps of a block.
        params: Name and type of each parameter.
    """

    name: str
    arch: str
    file: str
    sha256: str
    function: str
    shared_bytes: int
    num_warps: int
    params: list[tuple[str, str]]


class _Manifest(BaseModel):
    kernels: list[CubinEntry]


def read_manifest(folder: Path) -> list[CubinEntry]:
    """Return the kernels of a folder.

    Raises:
        RunnerError: There are none.
    """
    return read_record(
        folder / MANIFEST,
        _Manifest,
        error=RunnerError,
        remedy=f"Run `python -m treeq_gpu.ahead --out {folder}`.",
    ).kernels


def pick_architecture(folder: Path, manifest: list[CubinEntry], major: int, minor: int) -> str:
    """Return the best architecture for a GPU: the same major, the largest minor up to its own.

    Raises:
        RunnerError: None of the folder's runs on it.
    """
    found = {entry.arch for entry in manifest}
    for candidate in range(minor, -1, -1):
        if f"sm_{major}{candidate}" in found:
            return f"sm_{major}{candidate}"
    raise RunnerError(
        f"{folder}: kernels for {', '.join(sorted(found)) or 'nothing'}, but the GPU is "
        f"sm_{major}{minor}. Run `python -m treeq_gpu.ahead --out {folder} --arch sm_{major}0`."
    )


def pack_arguments(
    kernel: CubinEntry, values: Mapping[str, Number]
) -> tuple[tuple[Number, ...], tuple[Any, ...]]:
    """Return values and C types in the kernel's order; hidden scratch pointers are null.

    Raises:
        RunnerError: A value has no parameter, or a parameter no value.
    """
    names = [name for name, _ in kernel.params if not name.startswith("scratch")]
    if set(names) != set(values):
        raise RunnerError(
            f"{kernel.name}: takes {', '.join(names)}; received {', '.join(values)}. The kernels "
            "are of another version: run `python -m treeq_gpu.ahead` again."
        )
    return (
        tuple(values.get(name, 0) for name, _ in kernel.params),
        tuple(_CTYPES.get(kind, ctypes.c_void_p) for _, kind in kernel.params),
    )


@dataclass(frozen=True)
class LinearPointers:
    """Device addresses of one `treeq::QLinear`; bias and addend are 0 where they are absent."""

    x: int
    planes: int
    weight_scale: int
    bias: int
    addend: int
    y: int
    workspace: int


def launch_qlinear(
    kernels: KernelFolder, call: LinearCall, at: LinearPointers, stream: int
) -> None:
    """Put one quantized linear into a stream.

    Args:
        kernels: Kernels for the current GPU.
        call: Layer, tokens and type.
        at: Addresses, 16-byte aligned.
        stream: The stream's handle.

    Raises:
        RunnerError: A kernel is missing, or the driver refuses.
    """
    layer, m = call.layer, call.m
    if m == 0:
        return
    steps = choose.choose_qlinear(layer, m, kernels.num_sms, call.dtype)
    parts = choose.workspace_parts(layer, m, choose.num_splits(steps))
    scales = at.workspace + parts[0]
    absent = at.weight_scale  # any valid address
    values = {
        "x": at.x,
        "codes": at.workspace,
        "scale": scales,
        "planes": at.planes,
        "partials": scales + parts[1],
        "act_scale": scales,
        "weight_scale": at.weight_scale,
        "bias": at.bias or absent,
        "addend": at.addend or absent,
        "y": at.y,
        "has_bias": int(bool(at.bias)),
        "has_addend": int(bool(at.addend)),
    }
    for step in (choose.choose_quantize(layer, m, kernels.num_sms, call.dtype), *steps):
        kernels.launch(step, values, stream)


def launch_monarch(
    kernels: KernelFolder,
    shape: MonarchShape,
    pointers: tuple[int, int, int, int, int],
    stream: int,
) -> None:
    """Put one Monarch branch into a stream.

    Args:
        kernels: Kernels for the current GPU.
        shape: Sizes and type.
        pointers: Addresses of x, R, L, y and the workspace.
        stream: The stream's handle.

    Raises:
        RunnerError: A kernel is missing, or the driver refuses.
    """
    if shape.m == 0:
        return
    x, r_factor, l_factor, y, z = pointers
    values = {"x": x, "R": r_factor, "L": l_factor, "y": y, "z": z}
    sizes = (shape.m, shape.block_in, shape.b_in, shape.b_out, shape.rank, shape.block_out)
    for step in choose.choose_monarch(*sizes, dtype=shape.dtype):
        kernels.launch(step, values, stream)
