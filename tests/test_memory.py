"""Too little memory is one line that names the stage and what to lower, whoever ran out of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from treeq_export import memory
from treeq_export.errors import OutOfMemoryError, PlanError, RunnerError
from treeq_export.memory import explain_memory, is_out_of_memory, out_of_memory
from treeq_export.pipeline import run as pipeline
from treeq_export.pipeline.stages import STAGES
from treeq_export.recipe import Recipe
from treeq_export.runners.ort_runner import OrtRunner

KEYS = ("sampler.batch_size", "calibrate.num_samples")
LINE = (
    "calibrate: out of memory{}. Lower sampler.batch_size or calibrate.num_samples in the recipe, "
    "or use a machine with more memory."
)


def make_constant_graph() -> bytes:
    """Return a graph that fills a tensor of a given shape."""
    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["y"])],
        "big",
        [helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def run_constant(*shape: int) -> None:
    with OrtRunner(make_constant_graph(), threads=1) as runner:
        runner.run({"shape": np.array(shape, np.int64)})


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.zeros(10**13),
        lambda: torch.randn(10**12, 8),
        lambda: torch.arange(10**18),
        lambda: torch.nn.Linear(10**7, 10**7),
        lambda: torch.zeros(10**20),
        lambda: torch.zeros(2**40, 2**40),
        lambda: torch.zeros(3).repeat(10**18, 10),
        lambda: torch.zeros(1).expand(10**14).contiguous(),
        lambda: torch.empty(-(2**62)),
        lambda: np.zeros(10**14),
        lambda: np.zeros(10**20),
        lambda: np.zeros((2**40, 2**40)),
        lambda: np.arange(10**20),
        lambda: np.linspace(0, 1, 10**15),
        lambda: np.random.default_rng(0).standard_normal(10**15),
        lambda: [0] * 10**15,
        lambda: [0] * 10**20,
        lambda: bytearray(10**18),
        lambda: len(range(10**30)),
        lambda: run_constant(10**14),
        lambda: run_constant(2**40, 2**40),
        lambda: run_constant(2**62),
        lambda: run_constant(-4),
    ],
)
def test_what_no_machine_can_hold(
    allocate: Callable[[], object], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OutOfMemoryError) as caught, explain_memory("calibrate", KEYS):
        allocate()
    line = str(caught.value)
    assert line.startswith("calibrate: out of memory")
    assert line.endswith(LINE.partition("{}")[2])
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"
            ),
            20 * 1024**3,
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 102400 bytes. Error code 12 (Cannot allocate memory)"
            ),
            102400,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64"), 64),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), None),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), None),
        (
            RuntimeError("Trying to create tensor with negative dimension -9223372036854775808"),
            None,
        ),
        (RuntimeError("std::bad_alloc"), None),
        (
            RuntimeError(
                "bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 7"
            ),
            7,
        ),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), None),
        (MemoryError(), None),
        (MemoryError("Unable to allocate 1.50 MiB for an array with shape (3,)"), 1.5 * 1024**2),
        (OverflowError("Python int too large to convert to C long"), None),
        (OSError(12, "Cannot allocate memory"), None),
    ],
)
def test_every_library_that_runs_out(error: Exception, wanted: float | None) -> None:
    assert is_out_of_memory(error)
    assert memory._wanted_bytes(str(error)) == wanted
    wrapped = RunnerError("ONNX Runtime cannot run the model: Non-zero")
    wrapped.__cause__ = error
    with pytest.raises(OutOfMemoryError) as caught, explain_memory("calibrate", KEYS):
        raise wrapped
    size = memory.available_memory() / 1e9
    asked = (
        f" (it asked for {wanted / 1e9:,.1f} GB at once; there are {size:,.1f} GB in all)"
        if wanted
        else ""
    )
    assert str(caught.value) == LINE.format(asked)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("could not broadcast input array from shape (3,) into shape (4,)"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("Trying to create tensor with negative dimension -1: [-1]"),
        OverflowError("cannot convert float infinity to integer"),
        OverflowError("math range error"),
        OSError(28, "No space left on device"),
        PlanError("plan.json: missing."),
        KeyError("memory"),
    ],
)
def test_another_error_stays(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explain_memory("calibrate", KEYS):
        raise error
    assert caught.value is error


def test_the_line_of_one_key_of_none_and_of_three() -> None:
    more = "machine with more memory."
    assert str(out_of_memory("serve", ())) == f"serve: out of memory. Use a {more}"
    assert str(out_of_memory("bench", ["a.b"])) == (
        f"bench: out of memory. Lower a.b in the recipe, or use a {more}"
    )
    assert "Lower a, b or c in" in str(out_of_memory("bench", ["a", "b", "c"]))


def test_an_error_that_is_explained_already_stays() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="bench: out of memory"),
        explain_memory("evaluate", ()),
        explain_memory("bench", ()),
    ):
        raise MemoryError


class TestStages:
    @pytest.fixture
    def recipe(self) -> dict[str, Any]:
        return {
            "name": "x",
            "model": {"checkpoint": "checkpoint", "latent_size": 8},
            "search": {"strategy": "tss", "budget": {"weight_bits": 4}},
            "finetune": {"mode": "peft"},
        }

    def test_keys_are_keys_of_the_recipe(self, recipe: dict[str, Any]) -> None:
        values = Recipe.model_validate(recipe).model_dump(by_alias=True)
        for stage in STAGES:
            keys = pipeline.memory_keys(Recipe.model_validate(recipe), stage)
            assert keys[-1] == "model.latent_size"
            for key in keys:
                section, _, name = key.partition(".")
                assert name in values[section]

    def test_only_keys_that_are_in_use(self, recipe: dict[str, Any]) -> None:
        plain = Recipe.model_validate({"name": "x", "model": {"checkpoint": "checkpoint"}})
        keys = {stage.name: pipeline.memory_keys(plain, stage) for stage in STAGES}
        assert keys["search"] == keys["finetune"] == keys["compile"] == []
        assert keys["bench"] == ["bench.batch_sizes"]
        assert keys["evaluate"] == ["evaluate.num_samples", "sampler.batch_size"]
