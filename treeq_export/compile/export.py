"""From a PyTorch denoiser to an ONNX graph with a dynamic batch.

`QLinear` and `Monarch` modules come out as `treeq::` nodes, straight from their forward; all other
operators are standard ONNX of opset 21.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from treeq_export.errors import CompileError
from treeq_export.model.zoo import Denoiser
from treeq_export.ops import OPSET

OUTPUT = "prediction"
_BATCH = 2  # 1 would be specialised by torch.export


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own notices off the terminal; its errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def export_graph(denoiser: Denoiser, max_batch: int) -> ir.Model:
    """Export a denoiser.

    Args:
        denoiser: Full precision, or with `QLinear` modules.
        max_batch: Upper end of the dynamic batch.

    Returns:
        A graph with the denoiser's inputs by name and the output "prediction".

    Raises:
        CompileError: torch.onnx cannot export the model, or it leaves out an input or freezes the
            batch.
    """
    inputs = denoiser.make_example_inputs(_BATCH, seed=0)
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    try:
        with _quiet(), torch.no_grad(), denoiser.exportable():
            program = torch.onnx.export(
                denoiser.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[OUTPUT],
                dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise CompileError(
            f"{denoiser.class_name}: torch.onnx cannot export it ({reason}). "
            "Check that the model runs with these diffusers and torch versions."
        ) from error
    assert program is not None
    check_inputs(program.model, denoiser)
    return program.model


def check_inputs(model: ir.Model, denoiser: Denoiser) -> None:
    """Check that the exporter has kept every input, and the batch of each dynamic.

    A constant that the network makes of its batch size, or a timestep that it turns into a number,
    is put into the graph without a word.

    Raises:
        CompileError: Names the input.
    """
    found = {value.name: value for value in model.graph.inputs}
    for name in denoiser.input_names:
        value = found.get(name)
        if value is None or not value.uses():
            raise CompileError(
                f"{denoiser.class_name}: the exported graph does not depend on its input {name}, "
                "so torch.onnx made a constant of it. Use a model whose forward keeps it a tensor."
            )
        if value.shape is None or isinstance(value.shape[0], int):
            raise CompileError(
                f"{denoiser.class_name}: torch.onnx froze the batch of input {name} at {_BATCH}. "
                "Use a model whose forward makes no constant of the batch size."
            )
