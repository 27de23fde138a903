"""Running a range of a network's transformer blocks on recorded inputs.

The network is called as always; blocks before the range return what was recorded instead of
running, and the last one ends the call. So everything between the blocks (position ids, skip
connections, the change from double to single blocks) is the model's own code, for every family.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from treeq_export.model.layers import LinearInfo
from treeq_export.model.zoo import Denoiser

Output = tuple[Tensor | None, ...]  # what a block returns; a single tensor is a tuple of one


class _EndOfRangeError(Exception):
    """Ends a forward pass behind the last block of the range; not seen outside."""


def block_names(linears: Sequence[LinearInfo]) -> list[str]:
    """Return the module names of the blocks that hold these layers, in execution order.

    >>> info = LinearInfo("blocks.0.attn.to_q", 8, 8, False, 0, "attn.to_q", 0)
    >>> block_names([info])
    ['blocks.0']
    """
    names = {linear.block: linear.name[: -len(linear.position) - 1] for linear in linears}
    return [names[block] for block in sorted(names)]


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module's calls run `forward` until the stack is closed."""
    vars(module)["forward"] = forward
    stack.callback(vars(module).pop, "forward")


class BlockReplay:
    """Runs a range of blocks; a context manager, since the blocks are patched meanwhile.

    Args:
        denoiser: The model; its weights are not touched.
        blocks: Names of its blocks in execution order (`block_names`).
    """

    def __init__(self, denoiser: Denoiser, blocks: Sequence[str]) -> None:
        self.denoiser = denoiser
        self.blocks = list(blocks)
        self._first, self._last = 0, len(self.blocks)
        self._recorded: Callable[[int], Output] = _nothing_recorded
        self._on_output: Callable[[int, Output], None] = _ignore
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for index, name in enumerate(self.blocks):
            block = self.denoiser.model.get_submodule(name)
            replace_forward(self._stack, block, self._make_forward(index, block.forward))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < self._first:
                return _as_returned(self._recorded(index))
            result = original(*args, **kwargs)
            output = result if isinstance(result, tuple) else (result,)
            self._on_output(index, output)
            if index == self._last:
                raise _EndOfRangeError
            return result

        return forward

    @torch.no_grad()
    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        first: int = 0,
        last: int | None = None,
        recorded: Callable[[int], Output] | None = None,
        on_output: Callable[[int, Output], None] = lambda _index, _output: None,
    ) -> Output:
        """Run the blocks `first`..`last` and return the last one's output.

        Args:
            inputs: The denoiser's inputs by name.
            first: First block that runs.
            last: Last block that runs; None goes on to the network's prediction.
            recorded: Gives the output of every block before `first`.
            on_output: Called with every running block's number and output.

        Returns:
            The output of block `last`, or a tuple of the prediction (b, *sample_shape).
        """
        final: list[Output] = []

        def keep_final(index: int, output: Output) -> None:
            on_output(index, output)
            if index == last:
                final.append(output)

        self._first = first
        self._last = len(self.blocks) if last is None else last
        self._recorded = recorded or _nothing_recorded
        self._on_output = keep_final
        try:
            raw = self.denoiser(*(inputs[name] for name in self.denoiser.input_names))
        except _EndOfRangeError:
            return final[0]
        return (self.denoiser.prediction(raw),)


def _as_returned(output: Output) -> Any:
    return output[0] if len(output) == 1 else output


def _nothing_recorded(index: int) -> Output:
    raise ValueError(f"block {index} lies before the range and has no recorded output")


def _ignore(_index: int, _output: Output) -> None:
    return
