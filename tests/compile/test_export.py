import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from treeq_export.compile.export import OPSET, OUTPUT, export_graph
from treeq_export.errors import CompileError, RunnerError
from treeq_export.model.quantized import quantize_model
from treeq_export.model.zoo import Denoiser
from treeq_export.quant.metrics import sqnr_db
from treeq_export.run_folder import RunFolder
from treeq_export.runners.ort_runner import OrtRunner
from treeq_export.runners.torch_runner import TorchRunner

TARGETS = ["portable", "ort", "fp32"]


class Small(Denoiser):
    """One linear over 3 channels."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), (3,), {"text": (2,)})

    def forward(self, *inputs: Tensor) -> Tensor:
        sample, timestep, text = inputs
        return self.model(sample) * timestep[:, None] + text.sum(1, keepdim=True)


class Unexportable(Small):
    """Branches on its data, which no graph can hold."""

    def forward(self, *inputs: Tensor) -> Tensor:
        sample = inputs[0]
        return sample if sample.sum() > 0 else -sample


class FrozenBatch(Small):
    """Makes a constant of its batch size."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs) + torch.tensor([0.5] * len(inputs[0]))[:, None]


class NoTimestep(Small):
    """Looks at the timestep while it is exported only."""

    def forward(self, *inputs: Tensor) -> Tensor:
        sample, _, text = inputs
        return super().forward(sample, torch.full_like(sample[:, 0], 10.0), text)


@pytest.mark.parametrize(
    ("denoiser", "words"),
    [
        (FrozenBatch, ["FrozenBatch", "froze the batch of input sample at 2"]),
        (NoTimestep, ["NoTimestep", "does not depend on its input timestep"]),
    ],
)
def test_what_the_exporter_made_constant_is_found(denoiser: type[Small], words: list[str]):
    made = denoiser()
    made.class_name = denoiser.__name__
    with pytest.raises(CompileError) as caught:
        export_graph(made.requires_grad_(False), 8)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_another_latent_size_is_one_line(compiled_dit: Any):
    inputs = compiled_dit.denoiser.make_example_inputs(1, seed=0)
    inputs["sample"] = torch.zeros(1, 4, 12, 12)
    path = compiled_dit.run / RunFolder.graph("portable")
    with OrtRunner(path, threads=1) as runner, pytest.raises(RunnerError) as caught:
        runner.run(inputs)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ["sample", "12", "Expected: 8"])


@pytest.mark.parametrize("timestep", [0.0, 1.0, 999.0, 1000.0])
def test_the_output_depends_on_the_timestep(timestep: float, compiled_dit: Any):
    inputs = compiled_dit.denoiser.make_example_inputs(1, seed=0)
    path = compiled_dit.run / RunFolder.graph("portable")
    with OrtRunner(path, threads=1) as runner:
        middle = runner.run(inputs | {"timestep": torch.tensor([500.0])})
        end = runner.run(inputs | {"timestep": torch.tensor([timestep])})
    assert np.isfinite(end).all()
    assert np.abs(end - middle).max() > 1e-2 * np.abs(middle).max()


@pytest.mark.parametrize("target", TARGETS)
def test_batch_is_dynamic(target: str, compiled_dit: Any):
    reference = compiled_dit.denoiser
    if target != "fp32":
        reference = quantize_model(reference, compiled_dit.plan, compiled_dit.tensors)
    path = compiled_dit.run / RunFolder.graph(target)
    with OrtRunner(path, threads=1) as ort, TorchRunner(reference) as torch_runner:
        for batch in (1, 3, 16):
            inputs = reference.make_example_inputs(batch, seed=batch)
            received, expected = ort.run(inputs), torch_runner.run(inputs)
            assert received.shape == expected.shape == (batch, 8, 8, 8)
            assert sqnr_db(expected, received) > 60


@pytest.mark.parametrize("target", TARGETS)
def test_names_and_shapes(target: str, compiled_dit: Any):
    model = ir.load(compiled_dit.run / RunFolder.graph(target))
    names = [value.name for value in model.graph.inputs]
    assert names == list(compiled_dit.denoiser.input_names)
    assert [value.name for value in model.graph.outputs] == [OUTPUT]
    assert model.opset_imports[""] == OPSET
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        assert str(value.shape[0]) == "batch"
        assert all(isinstance(dim, int) for dim in value.shape[1:])


@pytest.mark.parametrize("target", TARGETS)
def test_no_local_path_is_written(target: str, compiled_dit: Any):
    repository = str(Path(__file__).parents[2]).encode()
    path = compiled_dit.run / RunFolder.graph(target)
    files = list(path.parent.iterdir())
    assert path in files
    for file in files:
        content = file.read_bytes()
        for needle in (b"site-packages", b".py", repository, str(Path.home()).encode() + b"/"):
            assert needle not in content


def test_exporter_leaves_paths_that_have_to_go(exported_dit: ir.Model):
    """Otherwise the test above would prove nothing."""
    assert b".py" in ir.to_proto(exported_dit).SerializeToString()


def test_export_is_quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("torch.onnx")
    logger.setLevel(logging.WARNING)
    graph = export_graph(Small(), max_batch=4).graph
    assert logger.level == logging.WARNING
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("torch.onnx")]
    assert [value.name for value in graph.inputs] == ["sample", "timestep", "text"]


def test_model_that_cannot_be_exported_is_an_error():
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(CompileError, match=r"^Linear: torch\.onnx cannot export it") as caught:
        export_graph(Unexportable(), max_batch=4)
    assert "\n" not in str(caught.value)
    assert logging.getLogger("torch.onnx").level == level
