"""`treeq::QLinear` as two Quick Deployable Plugins of TensorRT >= 10.8: engines need no library.

Written against the documented API of `tensorrt.plugin` (register, autotune, aot_impl). UNTESTED:
it never ran, since that module is in no package that can be installed here; only what it returns
was looked at, with a stand-in for it.

Such a plugin is one PTX kernel, embedded in the engine, without workspace. So a layer becomes
(split.py)

    treeq::QuantizeTokens   x -> codes, act_scale
    treeq::QProduct         codes, planes, act_scale, weight_scale, bias, addend -> y

with all inputs there: an absent bias is any float32 tensor with has_bias 0, an absent addend any
tensor of y's type with has_addend 0.

Codes travel as INT32 words of four: TensorRT would want a scale for an INT8 tensor. K is never cut
in slices, which would take a third kernel. The tactics of QProduct are the shape classes; TensorRT
times them at the profile's optimum. The Monarch branch stays with standard operators.

Whether TensorRT lets a kernel have more than 48 KB of shared memory (`wide` has 78) is unknown; a
tactic that cannot be launched fails when it is timed.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from treeq_gpu import choose, instantiations
from treeq_gpu.instantiations import DType, Instantiation

from experimental.quick_plugins.ptx import float_bits, reorder_params
from treeq_export.errors import RunnerError
from treeq_export.ops import DOMAIN, ActScale
from treeq_export.reading import read_text
from treeq_export.runners.cubin_launcher import pick_architecture, read_manifest
from treeq_export.runners.tensorrt_library import Runtime
from treeq_export.runners.tensorrt_plugin import KERNELS_VARIABLE

CODES_PER_WORD = 4
OLDEST_TENSORRT = "10.8"
_WARP = 32
_DTYPES: dict[str, DType] = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}
_OUTPUTS = {"quantize_tokens_kernel": ("codes", "scale"), "qlinear_kernel": ("y",)}
_TACTICS = tuple(enumerate(instantiations.SHAPE_CLASSES, start=1))
_IO_QUANTIZE = "FP16|BF16|FP32, INT32|INT32|INT32, FP32|FP32|FP32"
_IO_PRODUCT = (
    "INT32|INT32|INT32, INT32|INT32|INT32, FP32|FP32|FP32, FP32|FP32|FP32, FP32|FP32|FP32, "
    "FP16|BF16|FP32, FP16|BF16|FP32"
)


@dataclass(frozen=True)
class QuickKernel:
    """A kernel as TensorRT embeds it.

    Attributes:
        function: Symbol of the kernel.
        ptx: With parameters in TensorRT's order.
        integers: Names of its integers, in order.
        num_threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
    """

    function: str
    ptx: str
    integers: tuple[str, ...]
    num_threads: int
    shared_bytes: int


def load_kernel(folder: Path, architecture: str, instantiation: Instantiation) -> QuickKernel:
    """Return a kernel of a folder that `treeq_gpu.ahead` wrote.

    Args:
        folder: The folder.
        architecture: The GPU's, for example "sm_89"; PTX of an older one runs too.
        instantiation: The kernel to load.

    Raises:
        RunnerError: The kernel is missing, or TensorRT cannot launch it.
    """
    for entry in read_manifest(folder):
        if (entry.name, entry.arch) == (instantiation.name, architecture):
            break
    else:
        raise RunnerError(
            f"{folder}: no kernel {instantiation.name} for {architecture}. Run `python -m "
            f"treeq_gpu.ahead --out {folder} --arch {architecture}`."
        )
    params = instantiation.params
    is_output = _OUTPUTS[instantiation.kernel]
    pointers = [name for name, kind in params if kind.startswith("*")]
    integers = [name for name, kind in params if not kind.startswith("*")]
    inputs = [name for name in pointers if name not in is_output]
    outputs = [name for name in pointers if name in is_output]
    file = (folder / entry.file).with_suffix(".ptx")
    again = f"Run `python -m treeq_gpu.ahead --out {folder}` again."
    ptx = read_text(file, error=RunnerError, remedy=again)
    names = [name for name, _ in params]
    return QuickKernel(
        function=entry.function,
        ptx=reorder_params(ptx, names, [*inputs, *integers, *outputs]),
        integers=tuple(integers),
        num_threads=entry.num_warps * _WARP,
        shared_bytes=entry.shared_bytes,
    )


@dataclass(frozen=True)
class QuickOp:
    """Signature of one plugin, as `tensorrt.plugin` reads it off functions.

    Attributes:
        name: "namespace::name".
        tensors: Names of its inputs.
        attributes: Types of its attributes by name.
        num_outputs: Number of tensors it returns.
    """

    name: str
    tensors: tuple[str, ...]
    attributes: Mapping[str, type]
    num_outputs: int


QUANTIZE_OP = QuickOp(
    name=f"{DOMAIN}::QuantizeTokens",
    tensors=("x",),
    attributes={
        "act_bits": int,
        "act_scale": str,
        "act_step": float,
        "rotation_group": int,
        "in_features": int,
    },
    num_outputs=2,
)
PRODUCT_OP = QuickOp(
    name=f"{DOMAIN}::QProduct",
    tensors=("codes", "planes", "act_scale", "weight_scale", "bias", "addend"),
    attributes={
        "weight_bits": int,
        "group_size": int,
        "in_features": int,
        "out_features": int,
        "has_bias": int,
        "has_addend": int,
    },
    num_outputs=1,
)


@dataclass(frozen=True)
class QuickPlugins:
    """What both plugins say and launch. Untested: needs TensorRT >= 10.8 and a GPU.

    Attributes:
        trt: The module `tensorrt`.
        trtp: The module `tensorrt.plugin`.
        folder: The folder that `python -m treeq_gpu.ahead` wrote.
        architecture: The GPU's, for example "sm_89".
    """

    trt: Any
    trtp: Any
    folder: Path
    architecture: str

    def register(self) -> None:
        """Register both; once per process."""
        for op, functions in (
            (QUANTIZE_OP, (self.describe_codes, self.launch_quantize, self.tune_quantize)),
            (PRODUCT_OP, (self.describe_product, self.launch_product, self.tune_product)),
        ):
            describe, launch, tune = functions
            desc = self.trtp.TensorDesc
            # The size of this tuple is the number of outputs.
            returned = tuple[(desc,) * op.num_outputs]
            self.trtp.register(op.name)(self._declare(op, describe, {}, returned))
            ends = {"outputs": tuple[desc]}
            self.trtp.aot_impl(op.name)(self._declare(op, launch, ends | {"tactic": int}))
            self.trtp.autotune(op.name)(self._declare(op, tune, ends))

    def _declare(
        self,
        op: QuickOp,
        function: Callable[[SimpleNamespace], Any],
        ends: Mapping[str, Any],
        returned: Any = inspect.Signature.empty,
    ) -> Callable[..., Any]:
        """Return a function with the signature that TensorRT checks, which calls ours."""
        kinds = dict.fromkeys(op.tensors, self.trtp.TensorDesc) | dict(op.attributes) | dict(ends)
        signature = inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for name, kind in kinds.items()
            ],
            return_annotation=returned,
        )

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(SimpleNamespace(**signature.bind(*args, **kwargs).arguments))

        vars(call)["__signature__"] = signature
        return call

    def describe_codes(self, node: SimpleNamespace) -> tuple[Any, Any]:
        """Return types and shapes of codes and scale."""
        words = choose.padded(node.in_features) // CODES_PER_WORD
        codes, scale = node.x.like(), node.x.like()
        codes.dtype, codes.shape_expr = self.trt.int32, self._with_last(node.x.shape_expr, words)
        scale.dtype, scale.shape_expr = self.trt.float32, self._with_last(node.x.shape_expr, None)
        return codes, scale

    def launch_quantize(self, node: SimpleNamespace) -> Any:
        """Return kernel and launch: one program for 16 tokens."""
        k, tokens = node.in_features, _num_tokens(node.x.shape_expr)
        made = instantiations.quantize(
            ActScale(node.act_scale.rstrip("\0")), node.rotation_group, _DTYPES[node.x.dtype.name]
        )
        values = {
            "M": tokens,
            "K": k,
            "KP": choose.padded(k),
            "qmin": -(1 << (node.act_bits - 1)),
            "qmax": (1 << (node.act_bits - 1)) - 1,
            "step": float_bits(node.act_step),
            "columns_per_program": choose.padded(k),
        }
        return self._answer(made, self.trtp.cdiv(tokens, instantiations.QUANTIZE_ROWS), values)

    def tune_quantize(self, _node: SimpleNamespace) -> list[Any]:
        """Return the types."""
        return [self.trtp.AutoTuneCombination(_IO_QUANTIZE, "LINEAR")]

    def describe_product(self, node: SimpleNamespace) -> tuple[Any]:
        """Return type and shape of y."""
        y = node.addend.like()
        y.shape_expr = self._with_last(node.codes.shape_expr, node.out_features)
        return (y,)

    def launch_product(self, node: SimpleNamespace) -> Any:
        """Return kernel and launch of a tactic: one of the shape classes."""
        n, k, group = node.out_features, node.in_features, node.group_size
        shape_class = dict(_TACTICS)[node.tactic or len(_TACTICS)]
        made = instantiations.qlinear(
            node.weight_bits, shape_class, _DTYPES[node.addend.dtype.name], choose.group_step(group)
        )
        tokens = _num_tokens(node.codes.shape_expr)
        values = {
            "M": tokens,
            "N": n,
            "KP": choose.padded(k),
            "KW": choose.ceil_div(k, 32),
            "num_groups": k // group if group else 1,
            "has_bias": node.has_bias,
            "has_addend": node.has_addend,
        }
        tile = instantiations.TILES[shape_class]
        tiles = self.trtp.cdiv(tokens, tile.bm) * choose.ceil_div(n, tile.bn)
        return self._answer(made, tiles, values)

    def tune_product(self, _node: SimpleNamespace) -> list[Any]:
        """Return types and tactics."""
        tactics = [number for number, _ in _TACTICS]
        return [self.trtp.AutoTuneCombination(_IO_PRODUCT, "LINEAR", tactics)]

    def _answer(self, made: Instantiation, grid: Any, values: Mapping[str, Any]) -> Any:
        """Return what an aot_impl has to: name, PTX, launch parameters, integers."""
        kernel = load_kernel(self.folder, self.architecture, made)
        if set(values) != set(kernel.integers):
            raise RunnerError(
                f"{made.name}: takes {', '.join(kernel.integers)}; received {', '.join(values)}. "
                "The kernels are of another version: run `python -m treeq_gpu.ahead` again."
            )
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x = grid
        launch.block_x = kernel.num_threads
        launch.shared_mem = kernel.shared_bytes
        integers = self.trtp.SymIntExprs.from_tuple(
            tuple(self.trtp.SymInt32(values[name]) for name in kernel.integers)
        )
        return kernel.function, kernel.ptx, launch, integers

    def _with_last(self, shape: Any, last: int | None) -> Any:
        """Return a shape with another last axis; None drops it."""
        axes = [shape[axis] for axis in range(len(shape) - 1)]
        return self.trtp.ShapeExprs.from_tuple(tuple(axes if last is None else [*axes, last]))


def _num_tokens(shape: Any) -> Any:
    tokens = shape[0]
    for axis in range(1, len(shape) - 1):
        tokens = tokens * shape[axis]
    return tokens


def require_quick_plugins(runtime: Runtime) -> None:
    """Check that a runtime has Quick Deployable Plugins.

    Raises:
        RunnerError: It has none.
    """
    found, oldest = (
        tuple(int(part) for part in version.split(".")[:2])
        for version in (runtime.version, OLDEST_TENSORRT)
    )
    if runtime.name != "tensorrt" or found < oldest:
        raise RunnerError(
            f"quick plugins: received {runtime.name} {runtime.version}, expected TensorRT >= "
            f"{OLDEST_TENSORRT}. Install it, or build with the plugins of a library."
        )


def _quick_kernels() -> Path:
    folder = os.environ.get(KERNELS_VARIABLE)
    if not folder:
        raise RunnerError(
            "quick plugins: no GPU kernels. Run `python -m treeq_gpu.ahead --out DIR` and set "
            f"{KERNELS_VARIABLE}=DIR."
        )
    return Path(folder)


def register_quick_plugins(runtime: Runtime, gpu: str) -> None:
    """Register both plugins for a build. Untested: needs TensorRT >= 10.8 and a GPU.

    Args:
        runtime: The runtime that gets the plugins.
        gpu: The GPU that the engine is for, for example "sm_89".

    Raises:
        RunnerError: TensorRT is too old, or there are no kernels for the GPU.
    """
    require_quick_plugins(runtime)
    folder, number = _quick_kernels(), gpu.removeprefix("sm_")
    manifest = read_manifest(folder)
    architecture = pick_architecture(folder, manifest, int(number[:-1]), int(number[-1]))
    trtp = importlib.import_module("tensorrt.plugin")
    QuickPlugins(runtime.module, trtp, folder, architecture).register()
