"""The CUDA runner on the CPU: its kernels in Triton's interpreter, its graphs by a fake capture."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from treeq_export.errors import RunnerError
from treeq_export.model.qlinear import QLinear
from treeq_export.plan import LayerPlan, TreePath
from treeq_export.quant.spec import ActivationFormat, WeightFormat
from treeq_export.runners.cuda_runner import CudaRunner, GraphedModel
from treeq_export.runners.gpu_layers import (
    GpuQLinear,
    SharedCodes,
    channel_order,
    check_supported,
    make_dequantized,
    make_gpu_model,
)
from treeq_export.runners.gpu_ops import load_launch

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("interpreted_dit.py")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Results of a tiny DiT in the interpreter, in a process of its own, by type."""
    paths = [str(ROOT), str(ROOT / "kernels" / "gpu")]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "float32", "float16"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_layer_equals_the_reference(dtype: str, interpreted: dict[str, Any]):
    parity = interpreted[dtype]
    assert parity["passed"]
    assert [layer["name"] for layer in parity["layers"]] == interpreted["layers"]
    assert len(parity["layers"]) == 7
    coded = [layer for layer in parity["layers"] if layer["equal_code_fraction"] is not None]
    assert len(coded) == 6
    for layer in coded:
        assert layer["equal_code_fraction"] >= 0.999
        assert layer["accumulators_equal"] is True
    # float32 in, float32 arithmetic: nothing but the order of float sums may differ.
    assert all(float(layer["sqnr_db"]) > 120 for layer in parity["layers"])


@pytest.mark.slow
def test_the_whole_network_is_as_near_as_its_type_allows(interpreted: dict[str, Any]):
    assert interpreted["float32"]["sqnr_db"] > 120
    assert 45 < interpreted["float16"]["sqnr_db"] < 100
    for layer in interpreted["float16"]["layers"]:
        assert layer["propagated_sqnr_db"] > 40


@pytest.mark.slow
def test_only_the_body_is_cast(interpreted: dict[str, Any]):
    for dtype in ("float32", "float16"):
        assert interpreted[dtype]["body"] == f"torch.{dtype}"
        assert interpreted[dtype]["types"] == ["torch.float32"]
        assert interpreted[dtype]["num_kernel_layers"] == 6
    assert interpreted["reference_untouched"]
    assert interpreted["num_references"] == 7


@pytest.mark.slow
def test_siblings_share_their_codes(interpreted: dict[str, Any]):
    """q, k and v are quantized once: four times for six layers."""
    assert interpreted["float16"]["num_quantizations"] == 4


@pytest.mark.slow
def test_compiling_a_block_changes_nothing(interpreted: dict[str, Any]):
    """Our kernels are operators for torch.compile: no graph break, codes shared as before."""
    for dtype in ("float32", "float16"):
        assert interpreted[dtype]["compiled"] == {"difference": 0.0, "num_quantizations": 4}


@pytest.mark.slow
def test_one_capture_for_all_calls(interpreted: dict[str, Any]):
    assert interpreted["float16"]["num_captures"] == 1
    assert interpreted["float16"]["repeatable"]


class TestGraphedModel:
    def make(self) -> tuple[GraphedModel, list[str]]:
        events: list[str] = []

        def model(x: Tensor, y: Tensor) -> Tensor:
            events.append("run")
            return x + 2 * y

        def capture(call: Any) -> Any:
            events.append("capture")
            output = call()

            def replay() -> Tensor:
                events.append("replay")
                return output.copy_(call())

            return replay

        return GraphedModel(model, capture), events

    def test_one_capture_a_shape(self):
        graphed, events = self.make()
        for value in (1.0, 2.0, 3.0):
            for batch in (1, 4):
                x = torch.full((batch,), value)
                torch.testing.assert_close(graphed(x, x), 3 * x)
        assert events.count("capture") == 2
        assert events.count("replay") == 6

    def test_inputs_of_the_caller_are_not_the_graph_s(self):
        graphed, _ = self.make()
        x = torch.ones(2)
        graphed(x, x)
        y = torch.full((2,), 5.0)
        graphed(y, y)
        torch.testing.assert_close(x, torch.ones(2))
        torch.testing.assert_close(graphed(x, x), 3 * x)

    def test_without_a_capture_it_is_the_model(self):
        graphed = GraphedModel(lambda x: x + 1, None)
        torch.testing.assert_close(graphed(torch.zeros(2)), torch.ones(2))


class TestSharedCodes:
    def test_same_tensor_and_format(self):
        shared, calls = SharedCodes(), []

        def quantize() -> tuple[Tensor, Tensor]:
            calls.append(1)
            return torch.zeros(1), torch.zeros(1)

        x = torch.zeros(3)
        first = shared.get(x, (3,), quantize)
        assert shared.get(x, (3,), quantize) is first
        assert len(calls) == 1
        shared.get(x, (4,), quantize)
        assert len(calls) == 2
        shared.get(x.clone(), (4,), quantize)
        assert len(calls) == 3
        shared.clear()
        shared.get(x, (4,), quantize)
        assert len(calls) == 4

    def test_a_tensor_that_was_changed_is_another(self):
        shared = SharedCodes()
        x = torch.zeros(3)
        first = shared.get(x, (), lambda: (x + 0, x))
        x += 1
        second = shared.get(x, (), lambda: (x + 0, x))
        assert first is not second
        assert second[0].tolist() == [1, 1, 1]


def make_layer(**options: Any) -> QLinear:
    fields: dict[str, Any] = {"bits": 4, "group": None, "act": 4, "rotation": 32} | options
    k, n = 64, 8
    plan = LayerPlan(
        name="blocks.0.fc",
        in_features=k,
        out_features=n,
        tree=TreePath(block=0, position="fc", leaf=0),
        weight=WeightFormat(bits=fields["bits"], group_size=fields["group"]),
        activation=ActivationFormat(
            bits=fields["act"], scale="none" if fields["act"] is None else "token_rms"
        ),
        rotation_group=fields["rotation"],
    )
    rng = np.random.default_rng(0)
    groups = k // (fields["group"] or k)
    tensors: dict[str, Any] = {
        "codes": rng.integers(-8, 8, (n, k)).astype(np.int8),
        "weight_scale": rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32),
    }
    if fields["act"]:
        tensors["activation_step"] = np.array([0.3], np.float32)
    return QLinear(plan, tensors, torch.randn(n) if fields.get("bias", True) else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_weight_only_layers_become_plain_linears(group: int | None, bias: bool):
    layer = make_layer(act=None, group=group, bias=bias)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(make_dequantized(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 16}, "group_size 16, expected a multiple of 32"),
        ({"rotation": 256}, "rotation_group 256, expected at most 128"),
    ],
)
def test_formats_that_the_kernels_do_not_have_are_refused(options: Any, message: str):
    layer = make_layer().layer
    plan = layer.model_copy(
        update={
            "weight": WeightFormat(bits=4, group_size=options.get("group")),
            "rotation_group": options.get("rotation", 32),
        }
    )
    with pytest.raises(RunnerError, match=f"^blocks.0.fc: {message}") as caught:
        check_supported(plan)
    assert "\n" not in str(caught.value)


def test_placing_casts_the_branch_alone():
    layer = GpuQLinear.of(make_layer())
    layer.R, layer.L = torch.zeros(1, 64, 2), torch.zeros(1, 2, 8)
    layer.place(torch.device("cpu"), torch.float16)
    assert layer.planes.dtype == torch.int32
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert layer.R.dtype == layer.L.dtype == torch.float16


def test_the_copy_shares_nothing_that_is_cast(make_tiny_denoiser: Any):
    denoiser = make_tiny_denoiser("dit")
    before = {name: tensor.dtype for name, tensor in denoiser.state_dict().items()}
    model = make_gpu_model(denoiser, torch.device("cpu"), torch.float16)
    assert {name: tensor.dtype for name, tensor in denoiser.state_dict().items()} == before
    types = {tensor.dtype for tensor in model.parameters()}
    assert types == {torch.float16}
    assert not model.training


def test_channel_order_is_the_kernels_own():
    """The inverse of treeq_gpu's rule: code 4*i + j of 32 is channel 8*j + i."""
    k = 96
    stored = torch.empty(1, 128, dtype=torch.int8)
    for column in range(128):
        channel = column // 32 * 32 + column % 4 * 8 + column % 32 // 4
        stored[0, column] = channel
    assert channel_order(stored, k)[0].tolist() == list(range(k))


def test_inputs_are_cast_but_for_time_and_labels(make_tiny_denoiser: Any):
    runner = CudaRunner(make_tiny_denoiser("dit"), device="cpu", dtype="bfloat16")
    inputs = runner.quantized.make_example_inputs(2, 0)
    types = [tensor.dtype for tensor in runner.prepare(inputs)]
    assert types == [torch.bfloat16, torch.float32, torch.int64]
    with pytest.raises(RunnerError, match=r"input timestep is missing\. Give all of sample, tim"):
        runner.prepare({"sample": inputs["sample"]})


def test_a_runner_without_quantized_layers_is_the_model(make_tiny_denoiser: Any):
    """The body alone, with the fake capture of the CPU: float32 equals the original."""
    denoiser = make_tiny_denoiser("dit")
    inputs = denoiser.make_example_inputs(2, 0)
    with torch.no_grad():
        expected = denoiser(*inputs.values()).numpy()
    with CudaRunner(denoiser, device="cpu", dtype="float32", use_graphs=False) as runner:
        assert runner.input_names == denoiser.input_names
        np.testing.assert_allclose(runner.run(inputs), expected, rtol=1e-5, atol=1e-6)
        output, layers = runner.run_with_layers(inputs)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
        assert layers == {}


def test_not_entered_is_an_error(make_tiny_denoiser: Any):
    runner = CudaRunner(make_tiny_denoiser("dit"), device="cpu")
    inputs = runner.quantized.make_example_inputs(1, 0)
    with pytest.raises(RunnerError, match="not entered"):
        runner.run(inputs)
    with runner:
        assert isinstance(runner.model, nn.Module)
    with pytest.raises(RunnerError, match="not entered"):
        runner.run(inputs)


def test_wrong_type_is_an_error(make_tiny_denoiser: Any):
    with pytest.raises(RunnerError, match=r"dtype int8: expected one of float16, bfloat16"):
        CudaRunner(make_tiny_denoiser("dit"), dtype="int8")


def test_without_a_gpu_entering_is_one_line(
    make_tiny_denoiser: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunnerError, match="PyTorch sees no CUDA GPU") as caught:
        CudaRunner(make_tiny_denoiser("dit")).__enter__()
    assert "\n" not in str(caught.value)


def test_triton_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "treeq_gpu", None)
    load_launch.cache_clear()
    with pytest.raises(RunnerError, match=r"pip install 'treeq-export\[gpu\]'"):
        load_launch()
