"""The ops of libtreeq_ort.so in ONNX Runtime: bits of the C ABI, and errors that name the node."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.kernels.cpu_monarch import CpuMonarch
from tests.kernels.test_cpu_qlinear import AVAILABLE, Case, make_case
from treeq_export.errors import RunnerError
from treeq_export.ops import FUSED, QLINEAR
from treeq_export.quant.packing import pack
from treeq_export.runners.cpu_kernels import KERNELS_LIBRARY, ORT_LIBRARY, find_library
from treeq_export.runners.ort_runner import OrtRunner

NODE = "blocks.3.mlp.fc1"
FUSED_ONLY: dict[str, Any] = {"activation": "none", "norm_epsilon": 1e-6}

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def installed() -> None:
    assert find_library(ORT_LIBRARY) is not None, f"{ORT_LIBRARY} is not installed"


def make_attributes(case: Case, *, is_fused: bool = False) -> dict[str, Any]:
    return case.format.attributes() | (FUSED_ONLY if is_fused else {})


def make_initializers(case: Case) -> Arrays:
    arrays: Arrays = {"planes": pack(case.codes, case.bits), "weight_scale": case.weight_scale}
    if case.bias is not None:
        arrays["bias"] = case.bias
    if case.branch is not None:
        arrays["branch_R"], arrays["branch_L"] = case.branch
    return arrays


def make_model(
    op: str,
    inputs: tuple[str, ...],
    initializers: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, Any],
    *,
    num_outputs: int = 1,
) -> bytes:
    """Return a model of one node. An input "" is left out; one that is no initializer is fed."""
    fed = [name for name in inputs if name and name not in initializers]
    outputs = [f"y{i}" for i in range(num_outputs)]
    kinds = {"planes": TensorProto.INT32}
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, name=NODE, domain="treeq", **attributes)],
        "hand",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), None) for n in fed],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("treeq", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def qlinear_model(case: Case, **changes: Any) -> bytes:
    """QLinear of a case, without its branch; changes of attributes, None takes one away."""
    arrays = make_initializers(replace(case, branch=None))
    attributes = make_attributes(case) | changes
    kept = {name: value for name, value in attributes.items() if value is not None}
    return make_model("QLinear", ("x", *arrays), arrays, kept)


AROUND_INPUTS = ("norm_scale", "norm_shift", "gate", "residual")
FUSED_INPUTS = FUSED.inputs


def fused_model(
    case: Case, fed: tuple[str, ...] = (), *, num_outputs: int = 1, **changes: Any
) -> bytes:
    """FusedQLinear of a case; `fed` of norm_scale, norm_shift, gate, residual are graph inputs."""
    arrays = make_initializers(case)
    inputs = tuple(name if name in (*arrays, *fed, "x") else "" for name in FUSED_INPUTS)
    attributes = make_attributes(case, is_fused=True) | changes
    kept = {name: value for name, value in attributes.items() if value is not None}
    return make_model("FusedQLinear", inputs, arrays, kept, num_outputs=num_outputs)


def same_bits(y: NDArray[Any], expected: NDArray[Any]) -> None:
    assert y.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(y.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("act_bits", [3, 8, None])
def test_qlinear_has_the_bits_of_the_c_abi(
    isa: str, act_bits: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TREEQ_ISA", isa)
    for options in ({"rotation_group": 32}, {"groups": 3, "has_bias": False}):
        case = make_case(14, 96, 41, act_bits=act_bits, **options)
        with OrtRunner(qlinear_model(case)) as runner, case.open() as layer:
            same_bits(runner.run({"x": case.x}), layer.run(case.x))


@pytest.mark.parametrize("has_bias", [True, False])
def test_qlinear_adds_its_fifth_input(has_bias: bool):
    case = make_case(14, 96, 41, has_bias=has_bias)
    arrays = make_initializers(case)
    inputs = [name if name == "addend" or name in ("x", *arrays) else "" for name in QLINEAR.inputs]
    model = make_model("QLinear", tuple(inputs), arrays, make_attributes(case))
    addend = np.random.default_rng(3).standard_normal((14, 41)).astype(np.float32)
    feeds = {"x": case.x.reshape(2, 7, 96), "addend": addend.reshape(2, 7, 41)}
    with OrtRunner(model) as runner, case.open() as layer:
        same_bits(runner.run(feeds).reshape(14, 41), layer.run(case.x) + addend)
    wrong = run_error(model, feeds | {"addend": addend})
    assert f"{NODE}: addend has shape (14, 41), expected (2, 7, 41)" in wrong


@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 7, 96), (2, 3, 5, 96), (0, 96), (2, 0, 96)])
def test_leading_axes_are_kept(shape: tuple[int, ...]):
    case = make_case(math.prod(shape[:-1]), 96, 40, rotation_group=32)
    with case.open() as layer:
        expected = layer.run(case.x).reshape(*shape[:-1], 40)
    for model in (qlinear_model(case), fused_model(case)):
        with OrtRunner(model) as runner:
            same_bits(runner.run({"x": case.x.reshape(shape)}), expected)


def test_the_batch_may_change_from_call_to_call():
    case = make_case(64, 96, 40)
    with OrtRunner(qlinear_model(case)) as runner, case.open() as layer:
        expected = layer.run(case.x)
        for m in (1, 64, 2, 13, 5, 63):
            same_bits(runner.run({"x": case.x[:m]}), expected[:m])


@pytest.mark.parametrize("branch", [(1, 1, 3), (4, 2, 3), (3, 5, 1)])
def test_monarch_has_the_bits_of_the_c_abi(branch: tuple[int, int, int]):
    case = make_case(14, 96, 150, branch=branch)
    assert case.branch is not None
    arrays = dict(zip(("R", "L"), case.branch, strict=True))
    model = make_model("Monarch", ("x", "R", "L"), arrays, {})
    with OrtRunner(model) as runner, CpuMonarch(*case.branch) as layer:
        expected = layer.run(case.x)
        same_bits(runner.run({"x": case.x.reshape(2, 7, 96)}), expected.reshape(2, 7, 150))
        assert runner.run({"x": case.x[:0]}).shape == (0, 150)


# Arrays around the layer that are given; every other input of the node is an empty name.
FUSIONS: dict[str, tuple[dict[str, Any], tuple[str, ...], str, int]] = {
    "nothing": ({"has_bias": False}, (), "none", 1),
    "gelu": ({}, (), "gelu_tanh", 1),
    "norm": ({"has_bias": False}, ("norm_scale", "norm_shift"), "none", 1),
    "branch": ({"branch": (2, 2, 3), "has_bias": False}, (), "gelu_tanh", 1),
    "gate": ({"has_bias": False}, ("gate", "residual"), "none", 1),
    "qkv": ({"branch": (1, 3, 2)}, ("norm_scale", "norm_shift"), "none", 3),
    "two": ({}, ("norm_scale", "norm_shift"), "gelu_tanh", 2),
    "all": (
        {"branch": (2, 2, 3), "act_bits": None},
        AROUND_INPUTS,
        "gelu_tanh",
        1,
    ),
}


def make_feeds(case: Case, names: tuple[str, ...], leading: tuple[int, ...]) -> Arrays:
    """Random arrays around a case whose x has these leading axes."""
    rng = np.random.default_rng(3)
    n, k = case.codes.shape
    images = leading[0] if leading else 1
    shapes = {
        "norm_scale": (images, k),
        "norm_shift": (images, k),
        "gate": (images, n),
        "residual": (*leading, n),
    }
    feeds = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in names}
    return {"x": case.x.reshape(*leading, k), **feeds}


@pytest.mark.parametrize("what", FUSIONS)
@pytest.mark.parametrize("leading", [(3, 7), (13,), (), (3, 1, 7), (0, 7)])
def test_fused_has_the_bits_of_the_c_abi(what: str, leading: tuple[int, ...]):
    options, names, activation, num_outputs = FUSIONS[what]
    m, images = math.prod(leading), leading[0] if leading else 1
    case = make_case(m, 96, 192, **options)
    feeds = make_feeds(case, names, leading)
    model = fused_model(
        case, names, activation=activation, num_outputs=num_outputs, norm_epsilon=1e-3
    )
    with OrtRunner(model) as runner:
        results = list(runner.run_all(feeds).values())
    flat = {name: array for name, array in feeds.items() if name != "x"}
    if "residual" in flat:
        flat["residual"] = flat["residual"].reshape(m, 192)
    with case.open() as layer:
        expected = layer.run_fused(
            case.x,
            activation=activation,
            num_outputs=num_outputs,
            norm_epsilon=1e-3,
            tokens=m // max(images, 1),
            **flat,
        )
    assert len(results) == num_outputs
    for y, y_expected in zip(results, expected, strict=True):
        same_bits(y, y_expected.reshape(*leading, 192 // num_outputs))


def test_threads_and_sessions_do_not_change_a_bit():
    case = make_case(70, 288, 192, rotation_group=32, branch=(1, 1, 8))
    names = ("norm_scale", "norm_shift")
    feeds = make_feeds(case, names, (7, 10))
    model = fused_model(case, names, activation="gelu_tanh", num_outputs=3)
    with (
        OrtRunner(model, threads=1) as one,
        OrtRunner(model, threads=2) as two,
        OrtRunner(qlinear_model(make_case(5, 288, 40)), threads=2) as other,
        ThreadPoolExecutor(4) as pool,
    ):
        expected = one.run_all(feeds)
        alone = other.run({"x": feeds["x"]})
        for result in pool.map(lambda i: (one, two)[i % 2].run_all(feeds), range(12)):
            for name, y in result.items():
                same_bits(y, expected[name])
        for y in pool.map(lambda _: other.run({"x": feeds["x"]}), range(4)):
            same_bits(y, alone)


# ---- errors ----


def load_error(model: bytes) -> str:
    """The one line that making a session of a model ends with."""
    with pytest.raises(RunnerError) as caught:
        OrtRunner(model).__enter__()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_error(model: bytes, feeds: Arrays) -> str:
    """The one line that a call ends with; the session lives on."""
    with OrtRunner(model) as runner, pytest.raises(RunnerError) as caught:
        runner.run_all(feeds)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS = {"act_scale": "a string", "activation": "a string", "act_step": "a float"}


@pytest.mark.parametrize("attribute", make_attributes(make_case(1, 96, 8), is_fused=True))
def test_a_missing_attribute_is_named(attribute: str):
    case = make_case(1, 96, 8)
    kind = "a float" if attribute == "norm_epsilon" else KINDS.get(attribute, "an integer")
    expected = f"{NODE}: attribute {attribute} is missing, expected {kind}"
    assert expected in load_error(fused_model(case, **{attribute: None}))
    if attribute not in FUSED_ONLY:
        assert expected in load_error(qlinear_model(case, **{attribute: None}))


VALUES = {
    "act_scale": (
        "token_max",
        '"token_max", expected token_rms, token_absmax, tensor_static or none',
    ),
    "activation": ("relu", '"relu", expected gelu_tanh or none'),
    "act_bits": (9, "act_bits is not in 2..8"),
    "rotation_group": (64, "rotation_group is no power of two that divides in_features"),
    "act_step": (-1.0, "act_step is not a positive number"),
    "group_size": (-1, "group_size does not divide in_features"),
    "weight_bits": (9, "planes has shape (3, 8, 3), expected (9, 8, 3)"),
    "in_features": (64, "planes hold 3 words a row, expected 2 for in_features 64"),
    "out_features": (9, "planes has shape (3, 8, 3), expected (3, 9, 3)"),
}


@pytest.mark.parametrize("attribute", VALUES)
def test_a_wrong_attribute_is_named(attribute: str):
    value, expected = VALUES[attribute]
    error = load_error(fused_model(make_case(1, 96, 8), **{attribute: value}))
    assert f"{NODE}: " in error
    assert expected in error


def test_nine_bits_are_refused():
    case = make_case(1, 96, 8)
    arrays = make_initializers(case)
    arrays["planes"] = np.zeros((9, 8, 3), np.int32)
    model = make_model(
        "QLinear", ("x", *arrays), arrays, make_attributes(case) | {"weight_bits": 9}
    )
    assert f"{NODE}: weight_bits is not in 2..8" in load_error(model)


@pytest.mark.parametrize("what", ["planes", "weight_scale"])
def test_planes_and_scales_have_to_be_initializers(what: str):
    case = make_case(1, 96, 8)
    arrays = make_initializers(case)
    inputs = ("x", *arrays)
    del arrays[what]
    model = make_model("QLinear", inputs, arrays, make_attributes(case))
    assert f"{NODE}: input {what} has to be an initializer" in load_error(model)


@pytest.mark.parametrize("what", ["bias", "branch_R", "branch_L"])
def test_bias_and_factors_have_to_be_initializers(what: str):
    """A fed one must not be left out without a word."""
    case = make_case(5, 96, 8, branch=(2, 2, 3))
    arrays = make_initializers(case)
    del arrays[what]
    model = make_model(
        "FusedQLinear", FUSED_INPUTS[:6], arrays, make_attributes(case, is_fused=True)
    )
    assert f"{NODE}: input {what} has to be an initializer" in load_error(model)


def test_half_a_branch_is_refused():
    case = make_case(5, 96, 8, branch=(2, 2, 3))
    arrays = make_initializers(case)
    inputs = tuple("" if name == "branch_R" else name for name in FUSED_INPUTS[:6])
    del arrays["branch_R"]
    model = make_model("FusedQLinear", inputs, arrays, make_attributes(case, is_fused=True))
    assert f"{NODE}: " in load_error(model)


SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "planes": ((3, 7, 3), "input planes has shape (3, 7, 3), expected (3, 8, 3)"),
    "weight_scale": ((8, 3), "input weight_scale has shape (8, 3), expected (8, 1)"),
    "bias": ((7,), "input bias has shape (7), expected (8)"),
    "branch_R": ((2, 47, 6), "input branch_R has shape (2, 47, 6), expected (2, 48, 6)"),
    "branch_L": ((2, 6, 3), "input branch_L has shape (2, 6, 3), expected (2, 6, 4)"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_an_initializer_of_another_shape_is_named(what: str):
    case = make_case(1, 96, 8, branch=(2, 2, 3))
    arrays = make_initializers(case)
    attributes = make_attributes(case, is_fused=True)
    shape, expected = SHAPES[what]
    for wrong, message in (
        (shape, expected),
        ((1, *shape), f"{what} has shape ({', '.join(map(str, (1, *shape)))}), expected "),
    ):
        changed = arrays | {what: np.zeros(wrong, arrays[what].dtype)}
        model = make_model("FusedQLinear", FUSED_INPUTS[:6], changed, attributes)
        error = load_error(model)
        assert f"{NODE}: " in error
        assert message in error


def test_a_branch_that_does_not_fit_is_named():
    case = make_case(1, 96, 8, branch=(2, 2, 3))
    changed = make_initializers(case) | {"branch_L": np.zeros((3, 6, 4), np.float32)}
    attributes = make_attributes(case, is_fused=True)
    error = load_error(make_model("FusedQLinear", FUSED_INPUTS[:6], changed, attributes))
    assert f"{NODE}: branch of shapes (2, 48, 6), (3, 6, 4) does not fit 96 x 8" in error
    factors = {"R": np.zeros((2, 5, 4), np.float32), "L": np.zeros((3, 2, 5), np.float32)}
    error = load_error(make_model("Monarch", ("x", *factors), factors, {}))
    assert f"{NODE}: branch of shapes (2, 5, 4), (3, 2, 5) does not fit 10 x 15" in error


@pytest.mark.parametrize("shape", [(5, 95), (96, 5), (), (2, 97)])
def test_x_of_another_shape_is_named(shape: tuple[int, ...]):
    case = make_case(1, 96, 8, branch=(2, 2, 3))
    assert case.branch is not None
    factors = dict(zip(("R", "L"), case.branch, strict=True))
    models = (
        qlinear_model(case),
        fused_model(case),
        make_model("Monarch", ("x", "R", "L"), factors, {}),
    )
    for model in models:
        error = run_error(model, {"x": np.zeros(shape, np.float32)})
        assert f"{NODE}: x has shape ({', '.join(map(str, shape))}), expected (..., 96)" in error


AROUND: dict[str, tuple[tuple[int, ...], str]] = {
    "gate": ((3, 8), "gate has shape (3, 8), expected (2, 8)"),
    "residual": ((14, 8), "residual has shape (14, 8), expected (2, 7, 8)"),
    "norm_scale": ((2, 8), "norm_scale has shape (2, 8), expected (2, 96)"),
    "norm_shift": ((96,), "norm_shift has shape (96), expected (2, 96)"),
}


@pytest.mark.parametrize("what", AROUND)
def test_an_array_around_the_layer_of_another_shape_is_named(what: str):
    shape, expected = AROUND[what]
    case = make_case(14, 96, 8)
    feeds = make_feeds(case, tuple(AROUND), (2, 7))
    feeds[what] = np.zeros(shape, np.float32)
    assert f"{NODE}: {expected}" in run_error(fused_model(case, tuple(AROUND)), feeds)


@pytest.mark.parametrize(
    ("names", "num_outputs", "expected"),
    [
        (("gate",), 1, "a required array is missing"),
        (("residual",), 1, "a required array is missing"),
        (("norm_scale",), 1, "a required array is missing"),
        ((), 2, "the outputs do not share the channels in tiles of 32"),
        (("gate", "residual"), 3, "the outputs do not share the channels in tiles of 32"),
    ],
)
def test_a_fusion_that_makes_no_sense_is_named(
    names: tuple[str, ...], num_outputs: int, expected: str
):
    case = make_case(14, 96, 96)
    model = fused_model(case, names, num_outputs=num_outputs)
    error = run_error(model, make_feeds(case, names, (2, 7)))
    assert f"{NODE}: " in error
    assert expected in error


def test_an_unsupported_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch):
    model = qlinear_model(make_case(1, 96, 8))
    monkeypatch.setenv("TREEQ_ISA", "avx9")
    error = load_error(model)
    assert f"{NODE}: TREEQ_ISA names an instruction set that is unknown or missing here" in error


def test_an_op_that_the_library_does_not_have_is_one_line():
    case = make_case(1, 96, 8)
    arrays = make_initializers(case)
    assert "treeq" in load_error(make_model("QLinea", ("x", *arrays), arrays, {}))


def test_a_file_that_is_no_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = qlinear_model(make_case(1, 96, 8))
    path = tmp_path / ORT_LIBRARY
    path.write_text("no library")
    monkeypatch.setenv("TREEQ_LIBRARIES", str(tmp_path))
    error = load_error(model)
    assert str(path) in error


def test_a_library_without_our_ops_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernels' own library, which does not register anything."""
    model = qlinear_model(make_case(1, 96, 8))
    kernels = find_library(KERNELS_LIBRARY)
    assert kernels is not None
    (tmp_path / ORT_LIBRARY).symlink_to(kernels)
    monkeypatch.setenv("TREEQ_LIBRARIES", str(tmp_path))
    assert "RegisterCustomOps" in load_error(model)


def test_without_the_library_the_op_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = qlinear_model(make_case(1, 96, 8))
    monkeypatch.setenv("TREEQ_LIBRARIES", str(tmp_path))
    assert "model in memory: ONNX Runtime cannot load it" in load_error(model)
    assert "QLinear" in load_error(model)
