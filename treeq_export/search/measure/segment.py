"""Measuring nodes of the tree: their blocks run on the (noisy) prepared input.

A leaf alone runs its block on the clean input, and nothing else in the block is quantized.

A merge is measured as a segment. What lies before the segment inside its first block is noisy too.
The error is that of the last block's output against what full precision makes of the same input:
what the noise itself does there is no error of the segment, and would hide that error. Only the
root, where it ends with the network, is measured on the prediction, against full precision on its
own trajectory. What the left configuration of a task computes is computed once and replayed for
every right one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from treeq_export.model.replay import Output
from treeq_export.search.measure.bank import Handler, Handlers
from treeq_export.search.measure.blocks import PreparedBlocks
from treeq_export.search.store import NOISY
from treeq_export.search.tree import Configuration, Node


@dataclass
class LeafAlone:
    """Measures the formats of a leaf by the error of its block's output.

    Attributes:
        blocks: The network on the prepared inputs.
        node: The leaf.
    """

    blocks: PreparedBlocks
    node: Node

    def measure(self, _prefix: Configuration, suffixes: Sequence[Configuration]) -> Iterator[float]:
        """Yield the error of every format."""
        blocks, block = self.blocks, self.node.first_block
        for suffix in suffixes:
            handlers = blocks.quantized(self.node.first, suffix)
            outputs = [blocks.run(at, handlers, first=block, last=block) for at in blocks.starts]
            yield blocks.block_error(outputs, blocks.clean_outputs(block), block)


class Segment:
    """Measures pairs of configurations of a node's children.

    Args:
        blocks: The network on the prepared inputs.
        node: A node with children.
    """

    def __init__(self, blocks: PreparedBlocks, node: Node) -> None:
        self._blocks = blocks
        self._node = node
        self._right = node.children[1]
        self._noise = blocks.session.recipe.search.noise
        network = blocks.network
        self._ends = node is network.root and node.last_block == len(network.blocks) - 1

    def measure(self, prefix: Configuration, suffixes: Sequence[Configuration]) -> Iterator[float]:
        """Yield the error of every suffix behind the prefix."""
        states = [self._start(prefix, start) for start in self._blocks.starts]
        for suffix in suffixes:
            yield self._finish(states, suffix)

    def _input_at(self, start: int) -> Output | None:
        """Return one batch of x_lambda = x + lambda (x_q - x), None before the first block."""
        block = self._node.first_block - 1
        if block < 0:
            return None
        if self._noise == 0.0:
            return self._blocks.load_output(block, start)
        noisy = self._blocks.load_output(block, start, NOISY)
        if self._noise == 1.0:
            return noisy
        return tuple(
            None if x is None or x_q is None else torch.lerp(x, x_q, self._noise)
            for x, x_q in zip(self._blocks.load_output(block, start), noisy, strict=True)
        )

    @cached_property
    def _noisy_before(self) -> Handlers:
        """Handlers for the leaves of the node's first block that lie before it."""
        node, leaves = self._node, self._blocks.network.leaves
        before = [leaf for leaf in leaves[: node.first] if leaf.block == node.first_block]
        if not before or self._noise == 0.0:
            return {}
        first = before[0].index
        environment = self._blocks.session.environment[first : node.first]
        quantized = self._blocks.quantized(first, environment)
        if self._noise == 1.0:
            return quantized
        return {name: partial(self._mix, name, handler) for name, handler in quantized.items()}

    def _mix(self, name: str, quantized: Handler, x: Tensor) -> Tensor:
        return torch.lerp(self._blocks.original(name)(x), quantized(x), self._noise)

    def _run_left(self, start: int, handlers: Handlers, last: int) -> Output:
        first = self._node.first_block
        return self._blocks.run(
            start, handlers, first=first, last=last, before=self._input_at(start)
        )

    def _start(self, prefix: Configuration, start: int) -> tuple[Output | None, Handlers]:
        """Run the left child, and return what the right one runs on.

        Returns:
            The output before the right child's first block, and handlers that replay the layers of
            that block which lie before the right child.
        """
        blocks, block = self._blocks, self._right.first_block
        running = self._noisy_before | blocks.quantized(self._node.first, prefix)
        if block != self._node.first_block:
            return self._run_left(start, running, block - 1), {}
        outputs: dict[str, Tensor] = {}
        replayed = [
            linear.name
            for leaf in blocks.network.leaves[: self._right.first]
            if leaf.block == block
            for linear in leaf.linears
        ]
        handlers = {
            name: _keep(name, running.get(name, blocks.original(name)), outputs)
            for name in replayed
        }
        self._run_left(start, handlers, block)
        return self._input_at(start), {name: _constant(outputs[name]) for name in replayed}

    def _finish(
        self, states: Sequence[tuple[Output | None, Handlers]], suffix: Configuration
    ) -> float:
        blocks, right = self._blocks, self._right
        last = None if self._ends else self._node.last_block
        suffix_handlers = blocks.quantized(right.first, suffix)
        outputs = [
            blocks.run(
                start,
                handlers | suffix_handlers,
                first=right.first_block,
                last=last,
                before=before,
            )
            for start, (before, handlers) in zip(blocks.starts, states, strict=True)
        ]
        if self._ends:
            return blocks.network_error(outputs)
        return blocks.block_error(outputs, self._wanted, self._node.last_block)

    @cached_property
    def _wanted(self) -> list[Output]:
        """What the segment in full precision makes of the input that it is measured on."""
        node = self._node
        if not self._noisy_before and (node.first_block == 0 or self._noise == 0.0):
            return self._blocks.clean_outputs(node.last_block)
        return [
            self._run_left(start, self._noisy_before, node.last_block)
            for start in self._blocks.starts
        ]


def _keep(name: str, handler: Handler, outputs: dict[str, Tensor]) -> Handler:
    def run(x: Tensor) -> Tensor:
        outputs[name] = handler(x)
        return outputs[name]

    return run


def _constant(value: Tensor) -> Handler:
    return lambda _: value
