"""Measuring configurations of the whole network: the error of its prediction."""

from collections.abc import Iterator, Sequence
from functools import partial

from treeq_export.model.replay import Output
from treeq_export.search.measure.blocks import PreparedBlocks, mean_square
from treeq_export.search.store import FINAL_FILE
from treeq_export.search.tree import Configuration


class WholeNetwork:
    """Measures on the search's inputs; blocks before the first that differs are not run again.

    The prefix of a task is a configuration that most of its configurations start like; the outputs
    of its blocks are kept. The empty prefix stands for full precision, whose outputs are prepared.

    Args:
        blocks: The network on the prepared inputs.
    """

    NAME = "network"

    def __init__(self, blocks: PreparedBlocks) -> None:
        self._blocks = blocks
        self._clean: Configuration = (None,) * len(blocks.network.leaves)
        self._base = self._clean
        self._base_outputs: dict[tuple[int, int], Output] = {}

    def measure(self, prefix: Configuration, suffixes: Sequence[Configuration]) -> Iterator[float]:
        """Yield the error of every configuration; values depend on the prefix by rounding only."""
        base = prefix or self._clean
        if base != self._base:
            self._base, self._base_outputs = base, {}
        for configuration in suffixes:
            first = self._first_difference(base, configuration)
            outputs: list[Output] = []
            for start in self._blocks.starts:
                before = self._base_output(first - 1, start) if first else None
                handlers = self._blocks.quantized(0, configuration)
                outputs.append(self._blocks.run(start, handlers, first=first, before=before))
            yield self._blocks.network_error(outputs)

    def _base_output(self, block: int, start: int) -> Output | None:
        """Return a block's output in the base configuration, None where it is the clean one."""
        if self._first_difference(self._clean, self._base) > block:
            return None
        if (start, block) not in self._base_outputs:
            keep = partial(self._keep, start)
            self._blocks.run(start, self._blocks.quantized(0, self._base), on_output=keep)
        return self._base_outputs[start, block]

    def _keep(self, start: int, block: int, output: Output) -> None:
        self._base_outputs[start, block] = output

    def _first_difference(self, base: Configuration, configuration: Configuration) -> int:
        """Return the first block in which two configurations differ (the last one if none)."""
        network = self._blocks.network
        pairs = zip(network.leaves, base, configuration, strict=True)
        blocks = [leaf.block for leaf, one, other in pairs if one != other]
        return min(blocks, default=len(network.blocks) - 1)


class FinalInputs:
    """Measures on the inputs that finalists are compared on.

    Args:
        blocks: The network on the prepared inputs.
    """

    NAME = "final"

    def __init__(self, blocks: PreparedBlocks) -> None:
        self._blocks = blocks
        self._rows, self._prediction = blocks.store.load_rows(FINAL_FILE)

    def measure(self, _prefix: Configuration, suffixes: Sequence[Configuration]) -> Iterator[float]:
        """Yield the error of every configuration."""
        size = self._blocks.batch_rows
        starts = range(0, len(self._prediction), size)
        wanted = [(self._prediction[at : at + size],) for at in starts]
        for configuration in suffixes:
            handlers = self._blocks.quantized(0, configuration)
            outputs = [self._blocks.run(at, handlers, rows=self._rows) for at in starts]
            yield mean_square(outputs, wanted)
