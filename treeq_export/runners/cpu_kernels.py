"""The CPU kernels of `kernels/` through their C ABI (kernels/include/treeq/qlinear.h).

The library is installed beside the package. Weights are repacked once, when a `CpuQLinear` is
entered; every call after that takes and returns numpy arrays.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import treeq_export
from treeq_export.errors import RunnerError
from treeq_export.ops import ACTIVATIONS, LAYER_ATTRIBUTES, PACK_WORD, LayerFormat

KERNELS_LIBRARY = "libtreeq_kernels.so"
ORT_LIBRARY = "libtreeq_ort.so"
ABI_VERSION = 2


def find_library(name: str) -> Path | None:
    """Return where a library of the package is installed, None where it is not.

    Args:
        name: File name, such as "libtreeq_ort.so". The folder in the environment variable
            TREEQ_LIBRARIES, where it is set, is the only one that is looked at.
    """
    own = os.environ.get("TREEQ_LIBRARIES")
    folders = [Path(own)] if own else [Path(folder) / "lib" for folder in treeq_export.__path__]
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path
    return None


class _Layer(ctypes.Structure):
    """What kernels/write_op_header.py makes of a LayerFormat."""

    _fields_ = tuple(
        (name, ctypes.c_float if kind is float else ctypes.c_int32)
        for name, kind in LAYER_ATTRIBUTES.items()
    )


class _Config(ctypes.Structure):
    _anonymous_ = ("layer",)
    _fields_ = (
        ("abi_version", ctypes.c_int32),
        ("layer", _Layer),
        ("branch_in", ctypes.c_int64),
        ("branch_out", ctypes.c_int64),
        ("branch_rank", ctypes.c_int64),
    )


class _Fusion(ctypes.Structure):
    _fields_ = (
        ("norm_scale", ctypes.c_void_p),
        ("norm_shift", ctypes.c_void_p),
        ("norm_epsilon", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("gate", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("num_outputs", ctypes.c_int32),
        ("addend", ctypes.c_void_p),
    )


_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, _TASK, ctypes.c_size_t, ctypes.c_void_p)


class _Parallel(ctypes.Structure):
    _fields_ = (("parallel_for", _PARALLEL_FOR), ("context", ctypes.c_void_p))


@cache
def load_kernels(path: Path | None = None) -> ctypes.CDLL:
    """Return the loaded library.

    Args:
        path: Another file than the installed one.

    Raises:
        RunnerError: It is missing, or of another version.
    """
    found = path or find_library(KERNELS_LIBRARY)
    if found is None:
        raise RunnerError(
            f"{KERNELS_LIBRARY}: not found beside the package. "
            "Reinstall treeq-export with a C++17 compiler and CMake on the path."
        )
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        raise RunnerError(f"{found}: cannot be loaded: {error}. Reinstall treeq-export.") from error
    version = library.treeq_abi_version()
    if version != ABI_VERSION:
        raise RunnerError(
            f"{found}: ABI version {version}, expected {ABI_VERSION}. "
            "Reinstall treeq-export, so that library and package are of one version."
        )
    void, pointer, size = ctypes.c_void_p, ctypes.POINTER, ctypes.c_int64
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "treeq_qlinear_create": (ctypes.c_int, (pointer(_Config), *[void] * 5, pointer(void))),
        "treeq_qlinear_destroy": (None, (void,)),
        "treeq_qlinear_run": (ctypes.c_int, (void, void, size, void, void)),
        "treeq_qlinear_run_fused": (ctypes.c_int, (void, void, size, *[void] * 3)),
        "treeq_qlinear_inspect": (ctypes.c_int, (void, void, size, void, void, void)),
        "treeq_qlinear_bytes": (ctypes.c_size_t, (void,)),
        "treeq_monarch_create": (ctypes.c_int, (*[size] * 5, void, void, pointer(void))),
        "treeq_monarch_destroy": (None, (void,)),
        "treeq_monarch_run": (ctypes.c_int, (void, void, size, void, void)),
        "treeq_isa": (ctypes.c_char_p, ()),
        "treeq_version": (ctypes.c_char_p, ()),
        "treeq_status_message": (ctypes.c_char_p, (ctypes.c_int,)),
        "treeq_release_workspaces": (None, ()),
        "treeq_peak": (ctypes.c_int32, (size, pointer(size))),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def read_isa() -> str:
    """Return the instruction set that the kernels use here, such as "avx512vnni".

    Raises:
        RunnerError: TREEQ_ISA names one that is unknown or missing.
    """
    name: bytes | None = load_kernels().treeq_isa()
    check_status(_BAD_ISA if name is None else 0, "treeq kernels")
    return (name or b"").decode()


_BAD_ISA = 10


def check_status(status: int, name: str) -> None:
    """Check what a function of the library returned.

    Args:
        status: The status.
        name: What to name in the message.

    Raises:
        RunnerError: The status is none of success.
    """
    if status:
        message = load_kernels().treeq_status_message(status).decode()
        raise RunnerError(f"{name}: the CPU kernels refuse it: {message}.")


def _pointer(array: NDArray[Any] | None) -> Any:
    return None if array is None else array.ctypes.data


def _parallel(pool: ThreadPoolExecutor | None) -> _Parallel | None:
    """Return a `treeq_parallel` over a pool. Only for tests of concurrency: calls cross Python."""
    if pool is None:
        return None

    def run(_context: Any, task: Callable[..., None], count: int, argument: Any) -> None:
        list(pool.map(lambda i: task(argument, i), range(count)))

    return _Parallel(_PARALLEL_FOR(run), None)


class CpuQLinear:
    """One quantized linear in the CPU kernels; holds its packed weights while it is entered.

    Args:
        layer: Formats and sizes.
        planes: (weight_bits, N, ceil(K / 32)) int32, see quant/packing.py.
        weight_scale: (N, G) float32.
        bias: (N,) float32 or None.
        branch: (R, L) of a Monarch branch, R (b_in, K/b_in, b_out r), L (b_out, b_in r, N/b_out).
        name: The layer's name in messages.

    Raises:
        RunnerError: Planes or scales have another shape.
    """

    def __init__(
        self,
        layer: LayerFormat,
        planes: NDArray[np.int32],
        weight_scale: NDArray[np.float32],
        *,
        bias: NDArray[np.float32] | None = None,
        branch: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        name: str = "treeq_qlinear",
    ) -> None:
        self.name, self.layer = name, layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        words = -(-layer.in_features // PACK_WORD)
        for what, array, shape in (
            ("planes", planes, (layer.weight_bits, layer.out_features, words)),
            ("weight_scale", weight_scale, (layer.out_features, layer.num_groups)),
        ):
            if array.shape != shape:
                raise RunnerError(
                    f"{name}: {what} are {array.shape}, expected {shape} for in_features "
                    f"{layer.in_features}."
                )
        arrays = (planes, weight_scale, bias, *(branch or (None, None)))
        self._arrays = [None if a is None else np.ascontiguousarray(a) for a in arrays]
        fields = layer.attributes() | {"act_scale": layer.act_scale.number}
        self._config = _Config(abi_version=ABI_VERSION, layer=_Layer(**fields))
        if branch is not None:
            b_in, b_out = branch[0].shape[0], branch[1].shape[0]
            self._config.branch_in, self._config.branch_out = b_in, b_out
            self._config.branch_rank = branch[0].shape[2] // b_out
        self._layer = ctypes.c_void_p()

    def __enter__(self) -> Self:
        pointers = [_pointer(array) for array in self._arrays]
        library = load_kernels()
        status = library.treeq_qlinear_create(self._config, *pointers, self._layer)
        check_status(status, self.name)
        return self

    def __exit__(self, *_: object) -> None:
        load_kernels().treeq_qlinear_destroy(self._layer)
        self._layer = ctypes.c_void_p()

    @property
    def num_bytes(self) -> int:
        """Bytes that the packed layer holds."""
        return load_kernels().treeq_qlinear_bytes(self._layer)

    def run(
        self,
        x: NDArray[np.float32],
        *,
        out: NDArray[np.float32] | None = None,
        pool: ThreadPoolExecutor | None = None,
    ) -> NDArray[np.float32]:
        """Return y (M, N) of x (M, K)."""
        x = self._check_input(x)
        y = np.empty((len(x), self.out_features), np.float32) if out is None else out
        parallel = _parallel(pool)
        status = load_kernels().treeq_qlinear_run(
            self._layer,
            _pointer(x),
            len(x),
            _pointer(y),
            None if parallel is None else ctypes.byref(parallel),
        )
        check_status(status, self.name)
        return y

    def run_fused(
        self,
        x: NDArray[np.float32],
        *,
        norm_scale: NDArray[np.float32] | None = None,
        norm_shift: NDArray[np.float32] | None = None,
        norm_epsilon: float = 1e-6,
        activation: str = "none",
        gate: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
        addend: NDArray[np.float32] | None = None,
        tokens: int | None = None,
        num_outputs: int = 1,
        pool: ThreadPoolExecutor | None = None,
    ) -> list[NDArray[np.float32]]:
        """Return activation(linear(x')) for x' = LayerNorm(x) (1 + norm_scale) + norm_shift.

        With a gate, residual + gate * that; with an addend, that + addend. A step whose arrays are
        None is left out.

        Args:
            x: Activations (M, K), float32.
            norm_scale: One row an image, (M / tokens, K), float32.
            norm_shift: Like norm_scale, and given exactly where that is.
            norm_epsilon: Added to the variance.
            activation: "none" or "gelu_tanh".
            gate: One row an image, (M / tokens, N), float32; needs a single output.
            residual: (M, N), float32; given exactly where gate is.
            addend: (M, N), float32; needs a single output and no gate.
            tokens: Rows of an image, a divisor of M; None for M.
            num_outputs: 1..3; several share N evenly, in multiples of 32.
            pool: Threads to compute on.

        Returns:
            num_outputs arrays (M, N / num_outputs), float32.

        Raises:
            RunnerError: An array has a wrong type or shape, or the kernels refuse the fusion.
        """
        x = self._check_input(x)
        m, k, n = len(x), self.in_features, self.out_features
        tokens = m if tokens is None else tokens
        images = m // max(tokens, 1)
        arrays = {
            "norm_scale": (norm_scale, (images, k)),
            "norm_shift": (norm_shift, (images, k)),
            "gate": (gate, (images, n)),
            "residual": (residual, (m, n)),
            "addend": (addend, (m, n)),
        }
        kept = {what: self._check_array(what, *given) for what, given in arrays.items()}
        fusion = _Fusion(
            **{what: _pointer(array) for what, array in kept.items()},
            norm_epsilon=norm_epsilon,
            activation=ACTIVATIONS.index(activation) if activation in ACTIVATIONS else -1,
            tokens=tokens,
            num_outputs=num_outputs,
        )
        outputs = [np.empty((m, n // num_outputs), np.float32) for _ in range(num_outputs)]
        y = (ctypes.c_void_p * num_outputs)(*map(_pointer, outputs))
        parallel = _parallel(pool)
        extras = (ctypes.byref(fusion), None if parallel is None else ctypes.byref(parallel))
        status = load_kernels().treeq_qlinear_run_fused(self._layer, _pointer(x), m, y, *extras)
        check_status(status, self.name)
        return outputs

    def inspect(
        self, x: NDArray[np.float32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
        """Return the codes (M, K), the scales (M, 1) and the int32 sums (M, G, N) of x (M, K)."""
        x = self._check_input(x)
        codes = np.empty(x.shape, np.int8)
        scales = np.empty((len(x), 1), np.float32)
        sums = np.empty((len(x), self.layer.num_groups, self.out_features), np.int32)
        outputs = (_pointer(codes), _pointer(scales), _pointer(sums))
        status = load_kernels().treeq_qlinear_inspect(self._layer, _pointer(x), len(x), *outputs)
        check_status(status, self.name)
        return codes, scales, sums

    def _check_input(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if x.ndim != 2 or x.shape[1] != self.in_features or x.dtype != np.float32:
            raise RunnerError(
                f"{self.name}: x is {x.dtype} {x.shape}, expected float32 (m, {self.in_features})."
            )
        return np.ascontiguousarray(x)

    def _check_array(
        self, what: str, array: NDArray[np.float32] | None, shape: tuple[int, int]
    ) -> NDArray[np.float32] | None:
        if array is None:
            return None
        if array.shape != shape or array.dtype != np.float32:
            raise RunnerError(
                f"{self.name}: {what} is {array.dtype} {array.shape}, expected float32 {shape}."
            )
        return np.ascontiguousarray(array)
