"""Measuring configurations: the segment's blocks run on recorded inputs, all rows, real arithmetic.

    segment a..b   a node of the tree. Its blocks run on the (noisy) recorded input, and what lies
                   before the segment inside its first block is noisy too. The error is that of the
                   last block's output against what full precision makes of the same input: what the
                   noise itself does there is not the segment's doing, and would hide what is. It
                   is measured by what it does to the prediction (model/sensitivity.py).
    segment a..a   a leaf. Its block runs on the clean input, all else in it is clean as well.
    network        configurations of all leaves; the error is that of the network's prediction.
                   The task's prefix is a configuration that most of them start like, "" none
    final          the same on other inputs

The network's errors, and so the root's, are against full precision on its own trajectory. What a
task's left configuration computes is computed once and replayed for every right configuration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from treeq_export.model.replay import BlockReplay, Output, replace_forward
from treeq_export.model.sensitivity import prediction_error
from treeq_export.model.trajectories import Rows
from treeq_export.model.zoo import Denoiser
from treeq_export.search.executor import Task
from treeq_export.search.measure.bank import LayerBank
from treeq_export.search.prepare import FINAL_FILE, Store, slice_output, slice_rows
from treeq_export.search.tree import Configuration, Leaf, Node, decode, walk

NETWORK, FINAL = "network", "final"
Handler = Callable[[Tensor], Tensor]


class LinearSwitch:
    """Lets the searched linears run something else; a context manager, since they are patched.

    Args:
        denoiser: The model.
        names: The searched layers.
    """

    def __init__(self, denoiser: Denoiser, names: Sequence[str]) -> None:
        self._denoiser = denoiser
        self._names = list(names)
        self._stack = ExitStack()
        self.originals: dict[str, Handler] = {}
        self.handlers: dict[str, Handler] = {}

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


def quantized_handlers(
    bank: LayerBank, leaves: Sequence[Leaf], configuration: Configuration
) -> dict[str, Handler]:
    """Return handlers that run leaves in their formats; those in full precision have none.

    Args:
        bank: Quantized layers.
        leaves: Consecutive leaves, at least as many as the configuration has entries.
        configuration: Their formats.
    """

    def run(name: str, weight_bits: int, activation_bits: int, x: Tensor) -> Tensor:
        return bank.layer(name, weight_bits, activation_bits)(x)

    return {
        linear.name: partial(run, linear.name, *pair)
        for leaf, pair in zip(leaves, configuration, strict=False)
        if pair is not None
        for linear in leaf.linears
    }


class SegmentWorker:
    """Measures tasks; see the module's docstring. Call `close` when it is no longer needed.

    Args:
        denoiser: The full-precision model.
        blocks: Names of all its blocks.
        leaves: All leaves.
        root: The tree.
        store: The prepared files.
        bank: Quantized layers.
        environment: The configuration that the noisy outputs were recorded with.
        noise: Lambda of Environmental Noise Guidance.
        with_probes: Measure errors of blocks by their effect on the prediction.
        batch_rows: Rows of one forward pass.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        blocks: Sequence[str],
        leaves: Sequence[Leaf],
        root: Node,
        store: Store,
        bank: LayerBank,
        *,
        environment: Configuration,
        noise: float,
        with_probes: bool,
        batch_rows: int,
    ) -> None:
        self._leaves = list(leaves)
        self._root = root
        self._nodes = {node.name: node for node, _ in walk(root)}
        self._store = store
        self._bank = bank
        self._environment = environment
        self._noise = noise
        self._with_probes = with_probes
        self._batch_rows = batch_rows
        self._rows, self._prediction = store.load_rows()
        self._num_rows = len(self._prediction)
        self._base: Configuration = ()
        self._base_outputs: dict[tuple[int, int], Output] = {}
        self._reference: tuple[str, list[Output]] = ("", [])
        self._stack = ExitStack()
        self._replay = self._stack.enter_context(BlockReplay(denoiser, blocks))
        names = [linear.name for leaf in leaves for linear in leaf.linears]
        self._switch = self._stack.enter_context(LinearSwitch(denoiser, names))

    def close(self) -> None:
        """Give the model back as it was."""
        self._stack.close()

    @torch.no_grad()
    def measure(self, task: Task) -> Iterator[float]:
        """Yield the mean squared error of every suffix of a task, in order."""
        suffixes = [decode(suffix) for suffix in task.suffixes]
        if task.node == NETWORK:
            base = decode(task.prefix) or (None,) * len(self._leaves)
            yield from self._measure_network(base, suffixes)
            return
        if task.node == FINAL:
            yield from self._measure_final(suffixes)
            return
        node, prefix = self._nodes[task.node], decode(task.prefix)
        if not node.children:
            yield from self._measure_alone(node, suffixes)
            return
        inside = node.children[1].first_block == node.first_block
        make_state = self._start_inside if inside else self._start_across
        states = [make_state(node, prefix, start) for start in self._starts]
        for suffix in suffixes:
            yield self._finish(node, states, suffix)

    @property
    def _starts(self) -> range:
        return range(0, self._num_rows, self._batch_rows)

    def _input_of(self, first: int, start: int) -> Output | None:
        """Return one batch of x_lambda = x + lambda (x_q - x) before a block, None at the first."""
        if first == 0:
            return None
        block = first - 1
        clean = slice_output(self._store.load_block(block, "clean"), start, self._batch_rows)
        if self._noise == 0.0:
            return clean
        noisy = slice_output(self._store.load_block(block, "noisy"), start, self._batch_rows)
        if self._noise == 1.0:
            return noisy
        return tuple(
            None if x is None or x_q is None else torch.lerp(x, x_q, self._noise)
            for x, x_q in zip(clean, noisy, strict=True)
        )

    def _quantized(self, first: int, configuration: Configuration) -> dict[str, Handler]:
        return quantized_handlers(self._bank, self._leaves[first:], configuration)

    def _noisy_before(self, node: Node) -> dict[str, Handler]:
        """Return handlers for the leaves of the node's first block that lie before it."""
        before = [leaf for leaf in self._leaves[: node.first] if leaf.block == node.first_block]
        if not before or self._noise == 0.0:
            return {}
        first = before[0].index
        quantized = self._quantized(first, self._environment[first : node.first])
        if self._noise == 1.0:
            return quantized
        return {name: partial(self._mix, name, handler) for name, handler in quantized.items()}

    def _mix(self, name: str, quantized: Handler, x: Tensor) -> Tensor:
        return torch.lerp(self._switch.originals[name](x), quantized(x), self._noise)

    def _run(
        self, start: int, first: int, last: int | None, before: Output | None, **options: Any
    ) -> Output:
        """Run blocks on one batch; `before` is the output of block first - 1."""

        def recorded(block: int) -> Output:
            if block == first - 1 and before is not None:
                return before
            return slice_output(self._store.load_block(block, "clean"), start, self._batch_rows)

        rows: Rows = slice_rows(self._rows, start, self._batch_rows)
        return self._replay.run(rows, first=first, last=last, recorded=recorded, **options)

    def _start_inside(
        self, node: Node, prefix: Configuration, start: int
    ) -> tuple[Output | None, dict[str, Handler]]:
        """Run the block once and return its input and handlers that replay the left child."""
        block = node.first_block
        before = self._input_of(block, start)
        outputs: dict[str, Tensor] = {}
        running = self._noisy_before(node) | self._quantized(node.first, prefix)
        replayed = [
            linear.name
            for leaf in self._leaves[: node.children[0].last + 1]
            if leaf.block == block
            for linear in leaf.linears
        ]
        self._switch.handlers = {
            name: _keep(name, running.get(name, self._switch.originals[name]), outputs)
            for name in replayed
        }
        self._run(start, block, block, before)
        return before, {name: _constant(outputs[name]) for name in replayed}

    def _start_across(
        self, node: Node, prefix: Configuration, start: int
    ) -> tuple[Output | None, dict[str, Handler]]:
        """Run the left child's blocks and return their output."""
        first = node.first_block
        before = self._input_of(first, start)
        self._switch.handlers = self._noisy_before(node) | self._quantized(node.first, prefix)
        return self._run(start, first, node.children[1].first_block - 1, before), {}

    def _finish(
        self,
        node: Node,
        states: Sequence[tuple[Output | None, dict[str, Handler]]],
        suffix: Configuration,
    ) -> float:
        right = node.children[1]
        ends = node is self._root and node.last_block == len(self._replay.blocks) - 1
        last = None if ends else node.last_block
        outputs: list[Output] = []
        for start, (before, handlers) in zip(self._starts, states, strict=True):
            self._switch.handlers = handlers | self._quantized(right.first, suffix)
            outputs.append(self._run(start, right.first_block, last, before))
        if ends:
            return self._error(outputs, self._clean(None))
        return self._block_error(outputs, self._wanted(node), node.last_block)

    def _clean(self, last: int | None) -> list[Output]:
        """Return the recorded output of a block, or the prediction (None), batch by batch."""
        clean = (self._prediction,) if last is None else self._store.load_block(last, "clean")
        return [slice_output(clean, start, self._batch_rows) for start in self._starts]

    def _wanted(self, node: Node) -> list[Output]:
        """Return what a segment in full precision makes of the input that it is measured on."""
        noisy_before = self._noisy_before(node)
        if not noisy_before and (node.first_block == 0 or self._noise == 0.0):
            return self._clean(node.last_block)
        if self._reference[0] != node.name:
            outputs: list[Output] = []
            self._switch.handlers = noisy_before
            for start in self._starts:
                first = node.first_block
                before = self._input_of(first, start)
                outputs.append(self._run(start, first, node.last_block, before))
            self._reference = (node.name, outputs)
        return self._reference[1]

    def _block_error(
        self, outputs: Sequence[Output], wanted: Sequence[Output], block: int
    ) -> float:
        """Return the error of a block's output, as the recipe wants it measured."""
        if not self._with_probes:
            return self._error(outputs, wanted)
        probes = self._store.load_probes(block)
        return prediction_error(
            [slice_output(probes, start, self._batch_rows) for start in self._starts],
            [_difference(*pair) for pair in zip(outputs, wanted, strict=True)],
            self._prediction.numel(),
        )

    def _error(self, outputs: Sequence[Output], wanted: Sequence[Output]) -> float:
        """Return the mean squared error of batches of outputs."""
        total, count = 0.0, 0
        for expected, output in zip(wanted, outputs, strict=True):
            for x, x_hat in zip(expected, output, strict=True):
                if x is not None and x_hat is not None:
                    total += float(torch.sum((x_hat - x).square(), dtype=torch.float64))
                    count += x.numel()
        return total / max(count, 1)

    def _measure_alone(
        self, leaf: Node, configurations: Sequence[Configuration]
    ) -> Iterator[float]:
        """Run a leaf's block on its clean input, nothing quantized but the leaf."""
        block = leaf.first_block
        for configuration in configurations:
            self._switch.handlers = self._quantized(leaf.first, configuration)
            outputs = [self._run(start, block, block, None) for start in self._starts]
            yield self._block_error(outputs, self._clean(block), block)

    def _measure_network(
        self, base: Configuration, configurations: Sequence[Configuration]
    ) -> Iterator[float]:
        """Measure whole configurations; blocks before the first that differs are not run again.

        Args:
            base: What their first blocks have in common; its block outputs are kept. Leaves in
                full precision at its start need no run: their outputs are the clean ones.
            configurations: What to measure.
        """
        if base != self._base:
            self._base, self._base_outputs = base, {}
        for configuration in configurations:
            first = self._first_difference(base, configuration)
            outputs: list[Output] = []
            for start in self._starts:
                before = None if first == 0 else self._base_output(first - 1, start)
                self._switch.handlers = self._quantized(0, configuration)
                outputs.append(self._run(start, first, None, before))
            yield self._error(outputs, self._clean(None))

    def _measure_final(self, configurations: Sequence[Configuration]) -> Iterator[float]:
        """Measure whole configurations on the inputs that finalists are compared on."""
        rows, prediction = self._store.load_rows(FINAL_FILE)
        starts = range(0, len(prediction), self._batch_rows)
        for configuration in configurations:
            self._switch.handlers = self._quantized(0, configuration)
            outputs = [self._replay.run(slice_rows(rows, at, self._batch_rows)) for at in starts]
            yield self._error(outputs, [(prediction[at : at + self._batch_rows],) for at in starts])

    def _base_output(self, block: int, start: int) -> Output:
        """Return a block's output in the base configuration; all blocks run once."""
        if self._first_difference((None,) * len(self._leaves), self._base) > block:
            clean = self._store.load_block(block, "clean")
            return slice_output(clean, start, self._batch_rows)
        if (start, block) not in self._base_outputs:
            self._switch.handlers = self._quantized(0, self._base)
            kept = self._base_outputs
            self._run(start, 0, None, None, on_output=_record_at(kept, start))
        return self._base_outputs[start, block]

    def _first_difference(self, base: Configuration, configuration: Configuration) -> int:
        """Return the first block in which two configurations differ (the last one if none)."""
        pairs = zip(self._leaves, base, configuration, strict=True)
        blocks = [leaf.block for leaf, one, other in pairs if one != other]
        return min(blocks, default=len(self._replay.blocks) - 1)


def _difference(output: Output, wanted: Output) -> Output:
    return tuple(
        None if x is None or x_hat is None else x_hat - x
        for x_hat, x in zip(output, wanted, strict=True)
    )


def _keep(name: str, handler: Handler, outputs: dict[str, Tensor]) -> Handler:
    def run(x: Tensor) -> Tensor:
        outputs[name] = handler(x)
        return outputs[name]

    return run


def _constant(value: Tensor) -> Handler:
    return lambda _: value


def _record_at(outputs: dict[tuple[int, int], Output], start: int) -> Callable[[int, Output], None]:
    def record(block: int, output: Output) -> None:
        outputs[start, block] = output

    return record


def biases_of(denoiser: Denoiser, names: Sequence[str]) -> Mapping[str, Tensor | None]:
    """Return the bias of every named linear."""
    found: dict[str, Tensor | None] = {}
    for name in names:
        module = denoiser.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        found[name] = module.bias
    return found
