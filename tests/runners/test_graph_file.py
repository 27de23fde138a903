"""A graph is read as it is, or refused in one line: damage, and where its external data lie."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from treeq_export.errors import CompileError
from treeq_export.runners.graph_file import path_of, read_graph
from treeq_export.runners.ort_runner import OrtRunner

FAULTS: dict[str, Any] = {"error": CompileError, "remedy": "Compile again."}
WEIGHT = np.arange(32, dtype=np.float32).reshape(8, 4)
CODES = np.arange(-8, 8, dtype=np.int8)


def _proto(*, batch: Any = "batch") -> onnx.ModelProto:
    codes = numpy_helper.from_array(CODES.astype(ir.DataType.INT4.numpy()), "codes")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(WEIGHT, "weight"), codes],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _external(folder: Path) -> Path:
    """Write the model with its weights in model.onnx.data."""
    folder.mkdir()
    path = folder / "model.onnx"
    model = ir.from_proto(_proto())
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=0)
    return path


def _values(path: Path) -> dict[str, Any]:
    initializers = read_graph(path, **FAULTS).graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items()}  # type: ignore[union-attr]


def _assert_right(path: Path) -> None:
    values = _values(path)
    assert np.array_equal(values["weight"], WEIGHT)
    assert values["codes"].astype(np.int8).tolist() == CODES.tolist()
    with OrtRunner(path, threads=1) as runner:
        assert np.array_equal(runner.run({"x": np.eye(8, dtype=np.float32)}), WEIGHT)


def _line(path: Path) -> str:
    with pytest.raises(CompileError) as caught:
        read_graph(path, **FAULTS)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.endswith(". Compile again.")
    return line


def test_a_graph_with_its_weights_inside(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_proto().SerializeToString())
    _assert_right(path)
    assert path_of(read_graph(path, **FAULTS)) == str(path)


def test_external_data_of_all_kinds_of_links(tmp_path: Path) -> None:
    _assert_right(_external(tmp_path / "plain"))
    data = tmp_path / "plain" / "model.onnx.data"

    shutil.copytree(tmp_path / "plain", tmp_path / "hard", copy_function=os.link)  # cp -al
    assert data.stat().st_nlink == 2
    _assert_right(tmp_path / "hard" / "model.onnx")

    inner = tmp_path / "inner"
    shutil.copytree(tmp_path / "plain", inner)
    (inner / "model.onnx.data").rename(inner / "blob")
    (inner / "model.onnx.data").symlink_to("blob")
    _assert_right(inner / "model.onnx")

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"  # a download cache
    blobs.mkdir()
    snapshot.mkdir()
    for index, name in enumerate(("model.onnx", "model.onnx.data")):
        shutil.copy(tmp_path / "plain" / name, blobs / str(index))
        (snapshot / name).symlink_to(blobs / str(index))
    _assert_right(snapshot / "model.onnx")


def test_a_link_to_elsewhere_is_refused_as_onnx_runtime_does(tmp_path: Path) -> None:
    path = _external(tmp_path / "model")
    shutil.move(tmp_path / "model" / "model.onnx.data", tmp_path / "elsewhere")
    (tmp_path / "model" / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    line = _line(path)
    assert f"'model.onnx.data', a link to {tmp_path}/elsewhere outside" in line
    assert "put a copy of the file there" in line


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("../secret", "lies in '../secret', expected a file of its own folder"),
        ("a/../../secret", "expected a file of its own folder"),
        ("/etc/passwd", "lies in '/etc/passwd', expected a file of its own folder"),
        ("a\0b", "expected a file of its own folder"),
        ("none", "lies in 'none': No such file or directory"),
        ("", "is not a regular file"),
        (".", "is not a regular file"),
        ("pipe", "is not a regular file"),
    ],
)
def test_where_external_data_may_not_lie(
    tmp_path: Path, location: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (tmp_path / "secret").write_bytes(bytes(200))
    proto = _proto()
    weight = proto.graph.initializer[0]
    _make_external(weight, location=location)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    assert problem in _line(folder / "model.onnx")
    # onnx_ir checks nothing for a bare file name; the absolute path is what makes it safe.
    monkeypatch.chdir(folder)
    with pytest.raises(CompileError, match="damaged"):
        read_graph(Path("model.onnx"), **FAULTS)


def _make_external(tensor: TensorProto, **entries: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def test_a_bare_file_name_is_opened_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _external(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    model = read_graph(Path("model.onnx"), **FAULTS)
    tensor: Any = model.graph.initializers["weight"].const_value
    assert Path(tensor.base_dir) == tmp_path / "model"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"offset": 73}, "ends at byte 201 of 'data', which has 200"),
        ({"offset": 1 << 62}, "which has 200"),
        ({"offset": -1}, "not an ONNX graph"),
        ({"length": 127}, "has 127 bytes, expected 128"),
        ({"length": 1 << 62}, "bytes, expected 128"),
        ({"offset": "x"}, "not an ONNX graph"),
    ],
)
def test_external_data_of_another_length(
    tmp_path: Path, entries: dict[str, Any], problem: str
) -> None:
    (tmp_path / "data").write_bytes(bytes(200))
    proto = _proto()
    _make_external(proto.graph.initializer[0], location="data", **entries)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert problem in _line(path)


def test_damaged_graphs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert _line(path) == f"{path}: cannot be read (No such file or directory). Compile again."
    path.write_bytes(b"")
    assert "it has no input" in _line(path)
    whole = _proto().SerializeToString()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        _line(path)
    path.write_bytes(b"\xff" * 100)
    assert "not an ONNX graph (Error parsing" in _line(path)

    def line_of(change: Any) -> str:
        proto = _proto()
        change(proto.graph)
        path.write_bytes(proto.SerializeToString())
        return _line(path)

    assert "it has no output" in line_of(lambda graph: graph.ClearField("output"))
    assert "has no name" in line_of(lambda graph: graph.input[0].ClearField("name"))
    weight = "tensor 'weight' has 128 bytes, expected "
    assert weight in line_of(lambda graph: graph.initializer[0].dims.append(1 << 40))
    assert weight in line_of(lambda graph: graph.initializer[0].dims.append(-1))
    line_of(lambda graph: setattr(graph.initializer[0], "data_type", 0))
    line_of(lambda graph: setattr(graph.initializer[0], "data_type", 99))
    assert "has no data" in line_of(lambda graph: graph.initializer[0].ClearField("raw_data"))
    assert "node 'product' reads 'x', which is nowhere" in line_of(
        lambda graph: setattr(graph.input[0], "name", "other")
    )

    def nested(graph: Any) -> None:
        for _ in range(200):
            node = graph.node.add(op_type="If")
            attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
            graph = attribute.g

    assert "not an ONNX graph" in line_of(nested)
    with_tensor = helper.make_node(
        "Constant", [], ["c"], value=numpy_helper.from_array(WEIGHT, "constant")
    )
    with_tensor.attribute[0].t.dims[0] = 9
    assert "tensor 'constant' has 128 bytes" in line_of(
        lambda graph: graph.node.append(with_tensor)
    )
