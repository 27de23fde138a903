"""What an error in the output of a block does to the network's prediction, to first order.

With J the derivative of the prediction (of n elements) by a block's output h, an error e of h
changes the prediction by J e. For random signs v, uncorrelated and of variance one, the mean of
(v^T J e)^2 is |J e|^2. So a few gradients g_k = J^T v_k, taken once on clean inputs, measure any
error of the block:

    |J e|^2 / n  ~  mean over k of (g_k . e)^2 / n

in the unit of the prediction's mean squared error, and without running what lies behind the block
(Hutchinson's estimator of the trace of J e e^T J^T).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from treeq_export.model.mapped import make_tensor
from treeq_export.model.replay import Output
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser


def probe_gradients(
    denoiser: Denoiser,
    blocks: Sequence[str],
    rows: Rows,
    *,
    num_probes: int,
    batch_rows: int,
    seed: int,
    folder: Path | None = None,
) -> list[Output]:
    """Return gradients of random directions of the prediction by the outputs of blocks.

    Args:
        denoiser: The full-precision model.
        blocks: Names of the blocks, in execution order.
        rows: Network inputs.
        num_probes: Directions K of every row.
        batch_rows: Rows of one forward and K backward passes.
        seed: Seed of the directions.
        folder: Folder of files that hold the gradients; None holds them in memory.

    Returns:
        By block, then by element of its output: (rows, K, ...) float32, zero where the prediction
        does not depend on it; None where the element is.
    """
    generator = torch.Generator().manual_seed(seed)
    total = len(next(iter(rows.values())))
    found: list[Output] = []
    with torch.enable_grad():
        for start in range(0, total, batch_rows):
            batch = [rows[name][start : start + batch_rows] for name in denoiser.input_names]
            with _tracked(denoiser, blocks) as outputs:
                prediction = denoiser.prediction(denoiser(*batch))
            found = found or [
                tuple(
                    None
                    if x is None
                    else make_tensor((total, num_probes, *x.shape[1:]), x.dtype, folder)
                    for x in output
                )
                for output in outputs
            ]
            _fill_gradients(found, start, prediction, outputs, num_probes, generator)
            del outputs, prediction
    return found


def _fill_gradients(
    found: Sequence[Output],
    start: int,
    prediction: Tensor,
    outputs: Sequence[Output],
    num_probes: int,
    generator: torch.Generator,
) -> None:
    """Write the gradients of one batch, whose first row is `start`, direction by direction."""
    tensors = [x for output in outputs for x in output if x is not None]
    wholes = [whole for output in found for whole in output if whole is not None]
    for probe in range(num_probes):
        signs = torch.randint(0, 2, prediction.shape, generator=generator) * 2 - 1
        gradients = torch.autograd.grad(
            prediction, tensors, signs.to(prediction.dtype), retain_graph=True, allow_unused=True
        )
        for whole, tensor, gradient in zip(wholes, tensors, gradients, strict=True):
            part = whole[start : start + len(tensor), probe]
            part.copy_(torch.zeros_like(tensor) if gradient is None else gradient.detach())


@contextmanager
def _tracked(denoiser: Denoiser, blocks: Sequence[str]) -> Iterator[list[Output]]:
    """Record the outputs of blocks with their place in the graph, which starts at the first one."""
    outputs: list[Output] = []

    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        elements = output if isinstance(output, tuple) else (output,)
        outputs.append(tuple(x if isinstance(x, Tensor) else None for x in elements))
        for x in outputs[-1]:
            if x is not None and not x.requires_grad:
                x.requires_grad_(True)

    handles = [denoiser.model.get_submodule(name).register_forward_hook(record) for name in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def prediction_error(
    probes: Sequence[Output], errors: Sequence[Output], num_elements: int
) -> float:
    """Return the mean squared error of the prediction that errors of a block's output cause.

    Args:
        probes: Gradients of the block, batch by batch, elements (rows, K, ...).
        errors: Errors of its output, batch by batch, elements (rows, ...).
        num_elements: Number of elements of the prediction, over all rows.
    """
    total = 0.0
    for gradients, error in zip(probes, errors, strict=True):
        along = [
            torch.einsum("rkx,rx->rk", g.flatten(2), e.flatten(1))
            for g, e in zip(gradients, error, strict=True)
            if g is not None and e is not None
        ]
        along_all = torch.stack(along).sum(dim=0)
        total += float(along_all.double().square().mean(dim=1).sum())
    return total / num_elements
