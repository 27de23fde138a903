"""Running blocks of the network on the prepared inputs, with some of its layers quantized."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Self

import torch
from torch import Tensor

from treeq_export.model.replay import BlockReplay, Output, replace_forward
from treeq_export.model.sensitivity import prediction_error
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.search.measure.bank import Handler, Handlers, LayerBank
from treeq_export.search.network import Network
from treeq_export.search.session import Session
from treeq_export.search.store import BLOCK_FILE, CLEAN, PROBE_FILE, slice_output, slice_rows
from treeq_export.search.tree import Configuration


class LinearSwitch:
    """Lets the searched linears run something else; a context manager, since they are patched.

    Args:
        denoiser: The model.
        network: The searched layers.
    """

    def __init__(self, denoiser: Denoiser, network: Network) -> None:
        self._denoiser = denoiser
        self._names = [linear.name for linear in network.linears]
        self._stack = ExitStack()
        self.originals: Handlers = {}
        self.handlers: Handlers = {}

    def __enter__(self) -> Self:
        for name in self._names:
            module = self._denoiser.model.get_submodule(name)
            self.originals[name] = module.forward
            replace_forward(self._stack, module, partial(self._forward, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _forward(self, name: str, x: Tensor) -> Tensor:
        return self.handlers.get(name, self.originals[name])(x)


class PreparedBlocks:
    """The blocks of a network on the prepared inputs. Call `close` when it is no longer needed.

    Args:
        session: The search, prepared.
        denoiser: The full-precision model.
    """

    def __init__(self, session: Session, denoiser: Denoiser) -> None:
        self.session = session
        self.network = session.network
        self.store = session.store
        self.batch_rows = session.batch_rows
        self._bank = LayerBank(session, denoiser)
        self._rows, self._prediction = self.store.load_rows()
        self.starts = range(0, len(self._prediction), self.batch_rows)
        self._stack = ExitStack()
        self._replay = self._stack.enter_context(BlockReplay(denoiser, self.network.blocks))
        self._switch = self._stack.enter_context(LinearSwitch(denoiser, self.network))

    def close(self) -> None:
        """Give the model back as it was."""
        self._stack.close()

    def original(self, name: str) -> Handler:
        """Return what a layer does in full precision."""
        return self._switch.originals[name]

    def quantized(self, first: int, configuration: Configuration) -> Handlers:
        """Return handlers for the leaves from number `first` on."""
        return self._bank.handlers(self.network.leaves[first:], configuration)

    def run(
        self,
        start: int,
        handlers: Handlers,
        *,
        first: int = 0,
        last: int | None = None,
        before: Output | None = None,
        rows: Rows | None = None,
        on_output: Callable[[int, Output], None] = lambda _block, _output: None,
    ) -> Output:
        """Run blocks on one batch and return the last one's output.

        Args:
            start: First row of the batch.
            handlers: Functions that layers run in the place of themselves.
            first: First block that runs.
            last: Last block that runs; None goes on to the network's prediction.
            before: Output of block `first - 1`; None is the clean one.
            rows: Other inputs of the network than the prepared ones.
            on_output: Called with every running block's number and output.
        """

        def recorded(block: int) -> Output:
            if block == first - 1 and before is not None:
                return before
            return self.load_output(block, start)

        self._switch.handlers = handlers
        rows = slice_rows(self._rows if rows is None else rows, start, self.batch_rows)
        return self._replay.run(
            rows, first=first, last=last, recorded=recorded, on_output=on_output
        )

    def load_output(self, block: int, start: int, kind: str = CLEAN) -> Output:
        """Return one batch of the prepared output of a block."""
        return slice_output(
            self.store.load_outputs(BLOCK_FILE.format(block), kind), start, self.batch_rows
        )

    def clean_outputs(self, block: int) -> list[Output]:
        """Return the clean output of a block, batch by batch."""
        return self._split(self.store.load_outputs(BLOCK_FILE.format(block), CLEAN))

    def network_error(self, outputs: Sequence[Output]) -> float:
        """Return the mean squared error of batches of the prediction."""
        return mean_square(outputs, self._split((self._prediction,)))

    def block_error(self, outputs: Sequence[Output], wanted: Sequence[Output], block: int) -> float:
        """Return the error of batches of a block's output, as the recipe wants it measured.

        It is measured by what it does to the prediction (model/sensitivity.py) where there are
        probes.
        """
        if not self.session.recipe.search.num_probes:
            return mean_square(outputs, wanted)
        return prediction_error(
            self._split(self.store.load_outputs(PROBE_FILE.format(block))),
            [_difference(*pair) for pair in zip(outputs, wanted, strict=True)],
            self._prediction.numel(),
        )

    def _split(self, output: Output) -> list[Output]:
        return [slice_output(output, start, self.batch_rows) for start in self.starts]


def mean_square(outputs: Sequence[Output], wanted: Sequence[Output]) -> float:
    """Return the mean squared error of batches of outputs."""
    total, count = 0.0, 0
    for expected, output in zip(wanted, outputs, strict=True):
        for x, x_hat in zip(expected, output, strict=True):
            if x is not None and x_hat is not None:
                total += float(torch.sum((x_hat - x).square(), dtype=torch.float64))
                count += x.numel()
    return total / max(count, 1)


def _difference(output: Output, wanted: Output) -> Output:
    return tuple(
        None if x is None or x_hat is None else x_hat - x
        for x_hat, x in zip(output, wanted, strict=True)
    )
