"""The Python plugins: what they say to TensorRT-RTX, and the launch they hand over."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from treeq_export.errors import RunnerError
from treeq_export.ops import (
    DOMAIN,
    MONARCH,
    PLUGIN_ATTRIBUTES,
    PLUGIN_VERSION,
    PLUGINS,
    QLINEAR,
    ActScale,
    LayerFormat,
)
from treeq_export.runners import tensorrt_plugin
from treeq_export.runners.cubin_launcher import LinearCall, LinearPointers, MonarchShape
from treeq_export.runners.plugin_fields import pack_field, unpack_fields
from treeq_export.runners.tensorrt_library import Runtime, load_runtime, require_parser
from treeq_export.runners.tensorrt_plugin import (
    MonarchBody,
    QLinearBody,
    plugin_class,
    register_plugins,
)

K, N = 256, 128
FIELDS: dict[str, int | float | str] = {
    "weight_bits": 3,
    "act_bits": 4,
    "act_scale": "token_rms",
    "act_step": 0.375,
    "rotation_group": 64,
    "group_size": 0,
    "in_features": K,
    "out_features": N,
}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    runtime = load_runtime("tensorrt-rtx")
    require_parser(runtime)
    register_plugins(runtime)
    return runtime


def field_types(trt: Any) -> dict[Any, type]:
    kinds = trt.PluginFieldType
    return {kinds.INT32: int, kinds.FLOAT32: float, kinds.CHAR: str}


@pytest.mark.parametrize("op", PLUGINS, ids=lambda op: op.name)
def test_name_version_namespace_and_fields_are_the_definitions(runtime: Runtime, op: Any):
    creator = runtime.module.get_plugin_registry().get_creator(op.name, PLUGIN_VERSION, DOMAIN)
    assert (creator.name, creator.plugin_version) == (op.name, PLUGIN_VERSION)
    assert creator.plugin_namespace == DOMAIN
    types = field_types(runtime.module)
    fields = [(field.name, types[field.type]) for field in creator.field_names]
    assert fields == list(op.attributes.items())


@pytest.mark.parametrize("body", [QLinearBody, MonarchBody])
def test_a_plugin_says_the_same(runtime: Runtime, body: type[Any]):
    plugin = plugin_class(runtime.module, body)(FIELDS, None)
    assert (plugin.plugin_name, plugin.plugin_version) == (body.op.name, PLUGIN_VERSION)
    assert plugin.plugin_namespace == DOMAIN
    assert plugin.num_outputs == 1
    assert plugin.get_valid_tactics() == []


def test_registering_again_changes_nothing(runtime: Runtime):
    registry = runtime.module.get_plugin_registry()
    before = len(registry.all_creators)
    register_plugins(runtime)
    assert len(registry.all_creators) == before
    assert len(tensorrt_plugin._registered.by_runtime["tensorrt-rtx"]) == len(PLUGINS)


def test_a_registry_that_refuses_is_an_error():
    registry = SimpleNamespace(get_creator=lambda *_: None, register_creator=lambda *_: False)
    module = load_runtime("tensorrt-rtx").module
    fake = SimpleNamespace(
        **{name: getattr(module, name) for name in dir(module) if not name.startswith("__")}
        | {"get_plugin_registry": lambda: registry}
    )
    with pytest.raises(RunnerError, match="the registry refuses treeq::QLinear version 1"):
        register_plugins(Runtime("tensorrt", fake, "10.0"))


def test_fields_survive_serialization(runtime: Runtime):
    plugin = plugin_class(runtime.module, QLinearBody)(FIELDS, None)
    stored = {field.name: field.data for field in plugin.get_fields_to_serialize()}
    assert unpack_fields(QLINEAR, stored) == FIELDS
    clone = plugin.clone()
    assert clone is not plugin
    assert clone.attributes == FIELDS


def test_a_missing_field_is_named():
    packed = {name: pack_field(float, 1.0) for name in FIELDS if name != "act_step"}
    with pytest.raises(RunnerError, match=r"QLinear: the node lacks act_step\. Compile"):
        unpack_fields(QLINEAR, packed)


def describe(trt: Any, *types: str, fmt: str = "LINEAR") -> list[Any]:
    return [
        SimpleNamespace(
            desc=SimpleNamespace(
                type=getattr(trt.DataType, name), format=getattr(trt.TensorFormat, fmt)
            )
        )
        for name in types
    ]


@pytest.mark.parametrize(
    ("types", "accepted"),
    [
        (("HALF", "INT32", "FLOAT", "HALF"), True),
        (("HALF", "INT32", "FLOAT", "FLOAT", "HALF"), True),
        (("BF16", "INT32", "FLOAT", "FLOAT", "BF16", "BF16"), True),
        (("FLOAT", "INT32", "FLOAT", "FLOAT", "FLOAT", "FLOAT"), True),
        (("HALF", "INT8", "FLOAT", "HALF"), False),
        (("HALF", "INT32", "HALF", "HALF"), False),
        (("HALF", "INT32", "FLOAT", "HALF", "HALF"), False),  # bias is float32
        (("HALF", "INT32", "FLOAT", "FLOAT", "FLOAT", "HALF"), False),  # addend is as x
        (("HALF", "INT32", "FLOAT", "FLOAT"), False),  # y is as x
        (("INT32", "INT32", "FLOAT", "INT32"), False),
    ],
)
def test_the_types_of_qlinear(runtime: Runtime, types: tuple[str, ...], accepted: bool):
    plugin = plugin_class(runtime.module, QLinearBody)(FIELDS, None)
    tensors = describe(runtime.module, *types)
    found = [
        plugin.supports_format_combination(pos, tensors, len(types) - 1)
        for pos in range(len(types))
    ]
    assert all(found) == accepted


def test_other_formats_and_types_without_kernels_are_refused(runtime: Runtime):
    trt = runtime.module
    plugin = plugin_class(trt, QLinearBody)(FIELDS, None)
    tensors = describe(trt, "HALF", "INT32", "FLOAT", "HALF", fmt="CHW32")
    assert not plugin.supports_format_combination(0, tensors, 3)
    wide = plugin_class(trt, QLinearBody)(FIELDS | {"weight_bits": 7}, None)
    assert wide.supports_format_combination(0, describe(trt, "HALF"), 3)
    assert not wide.supports_format_combination(0, describe(trt, "BF16"), 3)


def make_model(num_inputs: int, dtype: int) -> bytes:
    """Monarch -> QLinear with 3, 4 or 5 inputs, dynamic tokens."""
    rng = np.random.default_rng(0)
    float_type = helper.tensor_dtype_to_np_dtype(dtype)
    arrays = {
        "planes": rng.integers(-(2**31), 2**31, (3, N, K // 32)).astype(np.int32),
        "weight_scale": np.ones((N, 1), np.float32),
        "bias": np.ones(N, np.float32),
        "R": np.ones((2, K // 2, 4 * 3), float_type),
        "L": np.ones((4, 2 * 3, N // 4), float_type),
    }
    inputs = ["x", "planes", "weight_scale", "bias", "branch"][:num_inputs]
    nodes = [
        helper.make_node(
            "Monarch",
            ["x", "R", "L"],
            ["branch"],
            domain=DOMAIN,
            name="fc/branch",
            **PLUGIN_ATTRIBUTES,
        ),
        helper.make_node(
            "QLinear", inputs, ["y"], domain=DOMAIN, name="fc", **FIELDS, **PLUGIN_ATTRIBUTES
        ),
    ]
    graph = helper.make_graph(
        nodes if num_inputs == 5 else nodes[1:],
        "plugins",
        [helper.make_tensor_value_info("x", dtype, ["batch", 4, K])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 4, N])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def build(runtime: Runtime, model: bytes) -> int:
    """Return the bytes of an engine."""
    trt = runtime.module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), str(parser.get_error(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 4, K), (2, 4, K), (64, 4, K))
    config.add_optimization_profile(profile)
    assert tuple(network.get_output(0).shape) == (-1, 4, N)
    return builder.build_serialized_network(network, config).nbytes


@pytest.mark.parametrize("num_inputs", [3, 4, 5])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_an_engine_is_built_with_and_without_optional_inputs(
    runtime: Runtime, num_inputs: int, dtype: int
):
    assert build(runtime, make_model(num_inputs, dtype)) > 3 * N * K // 8


def enqueue(
    monkeypatch: pytest.MonkeyPatch, plugin: Any, shapes: Sequence[Sequence[int]], dtype: Any
) -> list[tuple[Any, ...]]:
    """Call `enqueue` with inputs at 1, 2, 3, ..., output at 100; return the launches asked for."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tensorrt_plugin, "_current_kernels", lambda folder: folder)
    monkeypatch.setattr(tensorrt_plugin, "launch_qlinear", lambda *args: calls.append(args))
    monkeypatch.setattr(tensorrt_plugin, "launch_monarch", lambda *args: calls.append(args))
    described = [SimpleNamespace(dims=tuple(shape), type=dtype) for shape in shapes]
    plugin.enqueue(described, [], list(range(1, len(shapes) + 1)), [100], 200, 300)
    return calls


@pytest.mark.parametrize(("num_inputs", "bias", "addend"), [(3, 0, 0), (4, 4, 0), (5, 4, 5)])
def test_enqueue_hands_shapes_and_addresses_over(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    num_inputs: int,
    bias: int,
    addend: int,
):
    trt = runtime.module
    plugin = plugin_class(trt, QLinearBody)(FIELDS, Path("kernels"))
    shapes = [(2, 7, K), (3, N, K // 32), (N, 1), (N,), (2, 7, N)][:num_inputs]
    ((folder, call, pointers, stream),) = enqueue(
        monkeypatch, plugin.clone(), shapes, trt.DataType.HALF
    )
    assert (folder, stream) == (Path("kernels"), 300)
    layer = LayerFormat(3, 4, ActScale.TOKEN_RMS, 0.375, 64, 0, K, N)
    assert call == LinearCall(layer, 14, "fp16")
    assert pointers == LinearPointers(1, 2, 3, bias, addend, 100, 200)


def test_enqueue_of_monarch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch):
    trt = runtime.module
    plugin = plugin_class(trt, MonarchBody)({}, Path("kernels"))
    shapes = [(2, 7, K), (2, K // 2, 4 * 3), (4, 2 * 3, N // 4)]
    ((_, shape, pointers, stream),) = enqueue(monkeypatch, plugin, shapes, trt.DataType.BF16)
    assert shape == MonarchShape(14, K // 2, 2, 4, 3, N // 4, "bf16")
    assert (pointers, stream) == ((1, 2, 3, 100, 200), 300)
    assert MONARCH.attributes == {}


def test_a_launch_without_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TREEQ_GPU_KERNELS", raising=False)
    with pytest.raises(RunnerError, match=r"no GPU kernels.*TREEQ_GPU_KERNELS=DIR"):
        tensorrt_plugin._current_kernels(None)
