"""`treeq::QLinear` and `treeq::Monarch` as TensorRT plugins in Python, for hosts with pip packages.

The C++ plugin (kernels/tensorrt) does the same without Python. Both, and the ONNX nodes, take name,
version, namespace and fields from `treeq_export.ops`. What a plugin says of shapes, types and
workspace needs no GPU, so engines are built anywhere; `enqueue` hands the launch to
`cubin_launcher`, which never ran on a GPU: untested.

TensorRT's classes are only there once its module is imported, so `plugin_classes` makes ours then,
out of bodies that know nothing of it but the module they are given.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from treeq_gpu import choose
from treeq_gpu.instantiations import INSTANTIATIONS, SHAPE_CLASSES, DType, finish, quantize

from treeq_export.errors import RunnerError
from treeq_export.ops import (
    DOMAIN,
    MONARCH,
    PLUGIN_VERSION,
    PLUGINS,
    QLINEAR,
    LayerFormat,
    OpDefinition,
)
from treeq_export.runners.cubin_launcher import (
    KernelFolder,
    LinearCall,
    LinearPointers,
    MonarchShape,
    launch_monarch,
    launch_qlinear,
    linear_workspace_bytes,
)
from treeq_export.runners.cuda_bindings import load_driver
from treeq_export.runners.plugin_fields import field_type, pack_field, unpack_fields
from treeq_export.runners.tensorrt_library import Runtime

KERNELS_VARIABLE = "TREEQ_GPU_KERNELS"
_DTYPES: dict[str, DType] = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}
_X = 0  # of every op

Attributes = Mapping[str, int | float | str]


@cache
def kernels_of(folder: Path, device: int) -> KernelFolder:
    """Return the kernels of a folder for a GPU, once per process.

    Args:
        folder: What `python -m treeq_gpu.ahead` wrote.
        device: Ordinal of the current GPU.
    """
    del device  # what it is cached by
    return KernelFolder(folder)


def _current_kernels(folder: Path | None) -> KernelFolder:
    chosen = folder or os.environ.get(KERNELS_VARIABLE)
    if chosen is None:
        raise RunnerError(
            "TensorRT plugin: no GPU kernels. Run `python -m treeq_gpu.ahead --out DIR` and set "
            f"{KERNELS_VARIABLE}=DIR."
        )
    return kernels_of(Path(chosen), int(load_driver().cuCtxGetDevice()[1]))


def num_tokens(dims: Sequence[int]) -> int:
    """Return the rows of a tensor (..., K)."""
    return int(np.prod(dims[:-1], dtype=np.int64))


class PluginBody:
    """What both plugins say to TensorRT in the same way.

    Attributes:
        op: The op.
        trt: TensorRT's module.
        attributes: The node's fields.
        folder: Folder of the kernels; None asks the environment.
    """

    op: OpDefinition
    trt: Any
    attributes: Attributes
    folder: Path | None

    def setup(self, attributes: Attributes, folder: Path | None) -> None:
        """Take the node's fields; TensorRT reads the names from attributes."""
        self.attributes = attributes
        self.folder = folder
        self.plugin_name = self.op.name
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = DOMAIN
        self.num_outputs = 1
        self._arrays: list[Any] = []

    def get_capability_interface(self, _kind: Any) -> Any:
        """Return this object: it has all three capabilities."""
        return self

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the type of x."""
        return [input_types[_X]]

    def get_output_shapes(
        self, inputs: Sequence[Any], _shape_inputs: Sequence[Any], builder: Any
    ) -> list[Any]:
        """Return x's shape with N in the last place."""
        rank = len(inputs[_X])
        shape = self.trt.DimsExprs(rank)
        for axis in range(rank - 1):
            shape[axis] = inputs[_X][axis]
        shape[rank - 1] = self.out_features(inputs, builder)
        return [shape]

    def out_features(self, inputs: Sequence[Any], builder: Any) -> Any:
        """Return N as a dimension expression."""
        raise NotImplementedError

    def get_fields_to_serialize(self) -> Any:
        """Return the node's fields; the arrays live as long as this object."""
        fields = []
        for name, kind in self.op.attributes.items():
            array = pack_field(kind, self.attributes[name])
            self._arrays.append(array)
            fields.append(self.trt.PluginField(name, array, field_type(self.trt, kind)))
        return self.trt.PluginFieldCollection(fields)

    def expected_types(self, x_type: Any) -> list[Any]:
        """Return the type of every input, all there could be, and at last of the output."""
        raise NotImplementedError

    def has_kernels(self, dtype: DType) -> bool:
        """Whether kernels of that type are compiled ahead."""
        raise NotImplementedError

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        """Whether a tensor is plain and of the one type that the kernels take there."""
        x_type = in_out[_X].desc.type
        dtype = _DTYPES.get(x_type.name)
        if in_out[pos].desc.format != self.trt.TensorFormat.LINEAR or dtype is None:
            return False
        types = self.expected_types(x_type)
        expected = types[pos] if pos < num_inputs else types[-1]
        return in_out[pos].desc.type == expected and self.has_kernels(dtype)

    def configure_plugin(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
        """Do nothing: everything follows from fields and shapes."""

    def on_shape_change(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
        """Do nothing: `enqueue` reads the shapes."""

    def attach_to_context(self, _context: Any) -> Any:
        """Return an object for one execution context."""
        return self.clone()

    def get_valid_tactics(self) -> list[int]:
        """Return none: `treeq_gpu.choose` picks the kernel."""
        return []

    def set_tactic(self, _tactic: int) -> None:
        """Do nothing: there are no tactics."""

    def clone(self) -> Any:
        """Return a plugin with the same fields."""
        return type(self)(self.attributes, self.folder)  # type: ignore[call-arg]


class QLinearBody(PluginBody):
    """`treeq::QLinear`: x, planes, weight_scale, then bias, then addend; the last two may miss."""

    op = QLINEAR

    @property
    def layer(self) -> LayerFormat:
        """The layer that the fields describe."""
        return LayerFormat.from_attributes(self.attributes)

    def out_features(self, inputs: Sequence[Any], builder: Any) -> Any:
        """Return the field's constant."""
        return builder.constant(self.layer.out_features)

    def expected_types(self, x_type: Any) -> list[Any]:
        """Return T, int32, float32, float32, T, T."""
        full = self.trt.DataType.FLOAT
        return [x_type, self.trt.DataType.INT32, full, full, x_type, x_type]

    def has_kernels(self, dtype: DType) -> bool:
        """Whether every kernel that any number of tokens may need is compiled ahead."""
        layer = self.layer
        bits, step = layer.weight_bits, choose.group_step(layer.group_size)
        names = [
            quantize(layer.act_scale, layer.rotation_group, dtype).name,
            finish(dtype).name,
            *(choose.inst.qlinear(bits, kind, dtype, step).name for kind in SHAPE_CLASSES),
        ]
        return all(name in INSTANTIATIONS for name in names)

    def get_workspace_size(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
        """Return the bytes that suffice for every shape of the profile."""
        return linear_workspace_bytes(self.layer, num_tokens(list(inputs[_X].max)))

    def enqueue(
        self,
        input_desc: Sequence[Any],
        _output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the kernels. Untested: needs a GPU."""
        x = input_desc[_X]
        call = LinearCall(self.layer, num_tokens(list(x.dims)), _DTYPES[x.type.name])
        tensors = {name: self.op.pick(inputs, name) or 0 for name in self.op.inputs}
        pointers = LinearPointers(**tensors, y=outputs[0], workspace=workspace)
        launch_qlinear(_current_kernels(self.folder), call, pointers, stream)


class MonarchBody(PluginBody):
    """`treeq::Monarch`: x, R (b_in, block_in, b_out * rank), L (b_out, b_in * rank, block_out)."""

    op = MONARCH

    def out_features(self, inputs: Sequence[Any], builder: Any) -> Any:
        """Return b_out * block_out."""
        left = inputs[2]
        return builder.operation(self.trt.DimensionOperation.PROD, left[0], left[2])

    def expected_types(self, x_type: Any) -> list[Any]:
        """Return T for everything."""
        return [x_type] * 4

    def has_kernels(self, dtype: DType) -> bool:
        """Return True: all types are compiled ahead."""
        return True

    @staticmethod
    def shape_of(
        x: Sequence[int], r: Sequence[int], left: Sequence[int], type_: Any
    ) -> MonarchShape:
        """Return the launch's sizes for inputs of these shapes."""
        b_in, block_in, _ = r
        b_out, inner, block_out = left
        return MonarchShape(
            num_tokens(x), block_in, b_in, b_out, inner // b_in, block_out, _DTYPES[type_.name]
        )

    def get_workspace_size(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
        """Return the bytes of z for the profile's largest shape."""
        x, r, left = (list(item.max) for item in inputs[:3])
        return self.shape_of(x, r, left, inputs[_X].desc.type).workspace_bytes

    def enqueue(
        self,
        input_desc: Sequence[Any],
        _output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Launch the kernels. Untested: needs a GPU."""
        x, r, left = (list(item.dims) for item in input_desc[:3])
        shape = self.shape_of(x, r, left, input_desc[_X].type)
        pointers = (inputs[0], inputs[1], inputs[2], outputs[0], workspace)
        launch_monarch(_current_kernels(self.folder), shape, pointers, stream)


_BODIES: dict[str, type[PluginBody]] = {QLINEAR.name: QLinearBody, MONARCH.name: MonarchBody}


def plugin_class(trt: Any, body: type[PluginBody]) -> type[Any]:
    """Return a body as a subclass of TensorRT's V3 interfaces.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        body: What it does.
    """
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    def initialize(self: Any, attributes: Attributes, folder: Path | None) -> None:
        for base in bases:
            base.__init__(self)
        self.setup(attributes, folder)

    names = {"__init__": initialize, "trt": trt, "__doc__": body.__doc__}
    return type(body.op.name, (body, *bases), names)


def creator_class(trt: Any, op: OpDefinition, plugin: type[Any], folder: Path | None) -> type[Any]:
    """Return the creator of a plugin: it reads the node's or the engine's fields."""

    def initialize(self: Any) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = op.name, DOMAIN, PLUGIN_VERSION
        self.field_names = trt.PluginFieldCollection(
            [
                trt.PluginField(name, np.array([]), field_type(trt, kind))
                for name, kind in op.attributes.items()
            ]
        )

    def create_plugin(_self: Any, _name: str, fields: Any, _phase: Any) -> Any:
        values = unpack_fields(op, {field.name: field.data for field in fields})
        return plugin(values, folder)

    names = {"__init__": initialize, "create_plugin": create_plugin}
    return type(f"{op.name}Creator", (trt.IPluginCreatorV3One,), names)


@dataclass(frozen=True)
class _Registered:
    """Creators that TensorRT's registry refers to; it does not keep them alive."""

    by_runtime: dict[str, list[Any]]


_registered = _Registered({})


def register_plugins(runtime: Runtime, kernels: Path | None = None) -> None:
    """Register both plugins, unless creators of these names are there already.

    Args:
        runtime: Runtime that gets the plugins.
        kernels: Folder of `python -m treeq_gpu.ahead`; None asks TREEQ_GPU_KERNELS at the launch.

    Raises:
        RunnerError: The registry refuses.
    """
    trt = runtime.module
    registry = trt.get_plugin_registry()
    kept = _registered.by_runtime.setdefault(runtime.name, [])
    for op in PLUGINS:
        if registry.get_creator(op.name, PLUGIN_VERSION, DOMAIN) is not None:
            continue
        creator = creator_class(trt, op, plugin_class(trt, _BODIES[op.name]), kernels)()
        if not registry.register_creator(creator, DOMAIN):
            raise RunnerError(
                f"{runtime.name} {runtime.version}: the registry refuses {DOMAIN}::{op.name} "
                f"version {PLUGIN_VERSION}. Leave other plugin libraries of that name out."
            )
        kept.append(creator)
