"""The distillation loss: the student's prediction and block outputs against the teacher's.

    loss = |v - v_hat|^2 / |v|^2 + block_weight * mean over blocks of |h - h_hat|^2 / |h|^2

The teacher is run on the same inputs in the same step, so that no outputs are stored.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from treeq_export.model.zoo import Denoiser

_TINY = 1e-20


class Watched:
    """A denoiser whose block outputs are seen together with its prediction.

    Args:
        denoiser: Teacher or student.
        blocks: Names of its blocks.
    """

    def __init__(self, denoiser: Denoiser, blocks: Sequence[str]) -> None:
        self.denoiser = denoiser
        self.blocks = [denoiser.model.get_submodule(name) for name in blocks]

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the prediction and all output tensors of all blocks, in order of execution.

        Args:
            inputs: Network inputs by name.
        """
        with _recording(self.blocks) as outputs:
            raw = self.denoiser(*(inputs[name] for name in self.denoiser.input_names))
        return self.denoiser.prediction(raw), outputs


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        # SD3 and Flux return the text's hidden states beside the image's, None in the last block.
        parts = output if isinstance(output, tuple) else (output,)
        outputs.extend(part for part in parts if isinstance(part, Tensor))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_hook(record))
        yield outputs


def relative_error(target: Tensor, found: Tensor) -> Tensor:
    """Return |target - found|^2 / |target|^2, a scalar."""
    return (found - target).square().sum() / target.square().sum().clamp_min(_TINY)


def distillation_loss(
    teacher: tuple[Tensor, list[Tensor]],
    student: tuple[Tensor, list[Tensor]],
    block_weight: float,
) -> Tensor:
    """Return the loss of what `Watched` returned for both, a scalar."""
    loss = relative_error(teacher[0], student[0])
    if block_weight == 0.0:
        return loss
    pairs = zip(teacher[1], student[1], strict=True)
    errors = [relative_error(target, found) for target, found in pairs]
    return loss + block_weight * torch.stack(errors).mean()
