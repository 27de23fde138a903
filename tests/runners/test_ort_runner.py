import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from treeq_export.doctor import examine
from treeq_export.environment import default_threads
from treeq_export.errors import RunnerError
from treeq_export.runners.cpu_kernels import ORT_LIBRARY
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.targets.table import different_ways, open_way, way_named

Make = Callable[..., Any]


@pytest.fixture
def two_outputs(tmp_path: Path) -> Path:
    """Y = a + b and z = a - b, float32 (batch, 2)."""
    values = [ir.val(name, ir.DataType.FLOAT, ["batch", 2]) for name in "ab"]
    nodes = [ir.node("Add", values), ir.node("Sub", values)]
    for node, name in zip(nodes, "yz", strict=True):
        node.outputs[0].name = name
        node.outputs[0].type, node.outputs[0].shape = values[0].type, values[0].shape
    graph = ir.Graph(
        values,
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        opset_imports={"": 21},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_runs_arrays_and_tensors_by_name(two_outputs: Path):
    a = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    b = torch.ones(3, 2)
    with OrtRunner(two_outputs) as runner:
        assert runner.input_names == ("a", "b")
        assert runner.output_names == ("y", "z")
        received = runner.run({"b": b, "a": a})
        np.testing.assert_array_equal(received, a + 1)
        assert received.dtype == np.float32
        results = runner.run_all({"b": b, "a": a})
    assert list(results) == ["y", "z"]
    np.testing.assert_array_equal(results["z"], a - 1)


def test_bytes_run_like_the_file(two_outputs: Path):
    a = np.ones((1, 2), np.float32)
    with OrtRunner(two_outputs.read_bytes(), threads=1) as runner:
        np.testing.assert_array_equal(runner.run({"a": a, "b": a}), 2 * a)


def test_nothing_is_read_before_entering(tmp_path: Path):
    runner = OrtRunner(tmp_path / "model.onnx")
    message = r"model\.onnx: missing\. Run the compile stage first\."
    with pytest.raises(RunnerError, match=message), runner:
        pass


@pytest.mark.parametrize("as_bytes", [False, True])
def test_corrupt_model_is_an_error(as_bytes: bool, tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not an onnx model")
    name = "model in memory" if as_bytes else "model.onnx"
    with (
        pytest.raises(RunnerError, match=f"{name}: ONNX Runtime cannot load it: ") as caught,
        OrtRunner(path.read_bytes() if as_bytes else path),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_truncated_model_is_an_error(two_outputs: Path):
    content = two_outputs.read_bytes()
    two_outputs.write_bytes(content[: len(content) // 2])
    with pytest.raises(RunnerError, match="cannot load it"), OrtRunner(two_outputs):
        pass


GOOD = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"a": np.ones((1, 3), np.float32), "b": GOOD}, "dimensions"),
        ({"a": np.ones(2, np.float32), "b": GOOD}, "rank"),
        ({"a": np.ones((1, 2), np.float64), "b": GOOD}, "type"),
        ({"a": GOOD}, "['b']"),
        ({"a": GOOD, "c": GOOD}, "['b']"),
    ],
)
def test_wrong_inputs_are_errors(two_outputs: Path, inputs: dict[str, Any], word: str):
    with OrtRunner(two_outputs, threads=1) as runner:
        with pytest.raises(RunnerError, match=r"^ONNX Runtime cannot run the model: ") as caught:
            runner.run(inputs)
        message = str(caught.value)
        assert word in message
        assert "\n" not in message
        # It still runs afterwards.
        np.testing.assert_array_equal(runner.run({"a": GOOD, "b": GOOD}), 2 * GOOD)


def test_not_entered_is_an_error(two_outputs: Path):
    runner = OrtRunner(two_outputs)
    with pytest.raises(RunnerError, match="not entered"):
        runner.run({"a": GOOD, "b": GOOD})
    with runner:
        runner.run({"a": GOOD, "b": GOOD})
    with pytest.raises(RunnerError, match="not entered"):
        runner.run_all({"a": GOOD, "b": GOOD})


def test_threads_reach_the_session(two_outputs: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    create = onnxruntime.InferenceSession

    def record(model: Any, options: onnxruntime.SessionOptions, **rest: Any) -> Any:
        seen.append(options.intra_op_num_threads)
        return create(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    for threads in (None, 1, 2):
        with OrtRunner(two_outputs, threads=threads) as runner:
            np.testing.assert_array_equal(runner.run({"a": GOOD, "b": GOOD}), 2 * GOOD)
    assert seen == [default_threads(), 1, 2]


def put_library(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a library of that C source be the custom-op library."""
    code = folder / "other.c"
    code.write_text(source)
    command = ["gcc", "-shared", "-fPIC", str(code), "-o", str(folder / ORT_LIBRARY)]
    subprocess.run(command, check=True)
    monkeypatch.setenv("TREEQ_LIBRARIES", str(folder))


def test_library_of_another_version_is_refused(
    two_outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = 'const char* treeq_version(void) { return "9.9.9"; }'
    put_library(tmp_path, source, monkeypatch)
    with pytest.raises(RunnerError, match=r"version 9\.9\.9, expected .* Reinstall") as caught:
        OrtRunner(two_outputs).__enter__()
    assert "\n" not in str(caught.value)
    with OrtRunner(two_outputs, use_kernels=False) as runner:
        assert runner.output_names == ("y", "z")
    [finding] = [finding for finding in examine() if finding.name == "cpu kernels"]
    assert finding.found is None
    assert finding.remedy


def test_a_library_that_is_not_ours_is_refused(
    two_outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put_library(tmp_path, "int nothing;", monkeypatch)
    with pytest.raises(RunnerError, match="is not treeq-export's custom-op library"):
        OrtRunner(two_outputs).__enter__()


def names_of_ways() -> list[str]:
    return [way.name for way in different_ways(["portable", "ort"])]


def test_without_the_library_bodies_run(
    compiled_dit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TREEQ_LIBRARIES", str(tmp_path))
    assert not way_named("ort").uses_kernels
    assert names_of_ways() == ["portable", "ort"]
    inputs = compiled_dit.denoiser.make_example_inputs(2, 0)
    with open_way(compiled_dit.run, "ort") as runner:
        y = runner.run(inputs)
    monkeypatch.delenv("TREEQ_LIBRARIES")
    assert names_of_ways() == ["portable", "ort", "ort_body"]
    with open_way(compiled_dit.run, "ort_body") as runner:
        np.testing.assert_array_equal(runner.run(inputs), y)


def test_large_packed_models_are_not_folded_without_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(10))

    def folds(target: str) -> tuple[bool, bool]:
        options = way_named(target).options(path)
        assert options["keep_int8"] is False  # of the emulation of TensorRT only
        return options["use_kernels"], options["fold_constants"]

    assert folds("ort_body") == (False, True)
    with path.open("wb") as file:
        file.truncate(200_000_000)
    assert folds("ort_body") == (False, False)
    assert folds("ort") == (True, True)
    assert folds("portable") == (False, True)


@pytest.mark.parametrize("spin", [False, True])
def test_threads_spin_where_that_is_asked_for(
    two_outputs: Path, spin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[onnxruntime.SessionOptions] = []
    create = onnxruntime.InferenceSession

    def record(model: Any, options: onnxruntime.SessionOptions, **rest: Any) -> Any:
        seen.append(options)
        return create(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    with OrtRunner(two_outputs, spin=spin) as runner:
        np.testing.assert_array_equal(runner.run({"a": GOOD, "b": GOOD}), 2 * GOOD)
    for pool in ("intra_op", "inter_op"):
        if spin:  # ONNX Runtime's default; an entry that was not set cannot be read
            with pytest.raises(RuntimeError, match="does not have configuration"):
                seen[0].get_session_config_entry(f"session.{pool}.allow_spinning")
        else:
            assert seen[0].get_session_config_entry(f"session.{pool}.allow_spinning") == "0"
