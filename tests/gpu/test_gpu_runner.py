"""The CUDA runner on a GPU. Never ran yet: written on machines without one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from treeq_export.bisect.cuda import CUDA, compare_cuda
from treeq_export.model.quantized import quantize_model
from treeq_export.quant.metrics import sqnr_db
from treeq_export.recipe import ParityGates
from treeq_export.runners.cuda_device import CudaDevice
from treeq_export.runners.cuda_runner import CudaRunner
from treeq_export.runners.reference_trace import make_reference
from treeq_export.runners.ways import Way
from treeq_export.validate.gates import judge

pytestmark = pytest.mark.gpu
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny(make_tiny_run: Make) -> Any:
    """A calibrated tiny DiT at 3 bits with a rank-4 branch."""
    return make_tiny_run("dit", weight_bits=3, activation_bits=3)


@pytest.fixture(scope="session")
def quantized(tiny: Any) -> Any:
    return quantize_model(tiny.denoiser, tiny.plan, tiny.tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_layer_equals_the_reference(dtype: str, tiny: Any, quantized: Any):
    reference = make_reference(tiny.denoiser, tiny.plan, tiny.tensors, 3, 5)
    # bfloat16 inside the network flips codes: only the layers' own errors are bounded then.
    limits = ParityGates(min_end_to_end_sqnr_db=30.0 if dtype == "float16" else 10.0)
    with CudaRunner(reference.quantized, dtype=dtype) as runner:
        output = runner.run(reference.trace.inputs)
        layers = list(compare_cuda(runner, reference))
    parity = judge(reference, Way(CUDA, CUDA), output, layers, limits)
    assert parity.passed, parity.gates
    assert all(layer.accumulators_equal for layer in parity.layers)
    assert all(layer.sqnr_db > 100 for layer in parity.layers)


def test_graphs_replay_what_the_model_computes(tiny: Any, quantized: Any):
    with (
        CudaRunner(quantized) as graphed,
        CudaRunner(quantized, use_graphs=False) as plain,
    ):
        for seed in range(2):
            for batch in (1, 2, 5):
                inputs = tiny.denoiser.make_example_inputs(batch, seed)
                expected = plain.run(inputs)
                for _ in range(2):
                    np.testing.assert_array_equal(graphed.run(inputs), expected)


def test_compiled_blocks_agree(tiny: Any, quantized: Any):
    inputs = tiny.denoiser.make_example_inputs(2, 0)
    with CudaRunner(quantized, use_graphs=False) as runner:
        expected = runner.run(inputs)
        for block in runner.model.model.transformer_blocks:
            block.compile(dynamic=False, fullgraph=True)
        assert sqnr_db(expected, runner.run(inputs)) > 25


def test_device_memory_survives_a_round_trip():
    x = np.arange(1000, dtype=np.float32)
    with CudaDevice() as device:
        pointer = device.allocate(x.nbytes)
        device.upload(pointer, x)
        y = np.zeros_like(x)
        device.download(y, pointer)
        device.synchronize()
    np.testing.assert_array_equal(x, y)


def test_a_copy_is_captured_and_replayed():
    x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
    with CudaDevice() as device:
        pointer = device.allocate(x.nbytes)
        graph = device.capture(lambda: device.upload(pointer, x))
        for value in (2.0, 3.0):
            x[:] = value
            device.launch(graph)
            device.download(y, pointer)
            device.synchronize()
            np.testing.assert_array_equal(y, value)


def test_the_gpu_is_one_that_kernels_are_written_for():
    assert torch.cuda.get_device_capability() >= (8, 0)
