"""Trees and searches made by hand: networks without a model, and errors that a formula gives."""

from collections.abc import Callable, Sequence

import pytest

from treeq_export.model.layers import LinearInfo
from treeq_export.recipe import SearchSection
from treeq_export.search.budget import CostModel, make_budget
from treeq_export.search.executor import Key, Task
from treeq_export.search.network import Network
from treeq_export.search.network import make_network as network_of
from treeq_export.search.strategies.context import SearchContext
from treeq_export.search.tree import Configuration, decode

# Of a DiT block: adaLN, q/k/v, output projection, two MLP layers; (positions, K, N).
_LEAVES = (
    (("norm",), 8, 12),
    (("to_q", "to_k", "to_v"), 8, 8),
    (("to_out",), 8, 8),
    (("fc1",), 8, 32),
    (("fc2",), 32, 8),
)


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Network]:
    """A function: number of blocks -> a DiT of that depth."""

    def make(num_blocks: int) -> Network:
        linears: list[LinearInfo] = []
        for block in range(num_blocks):
            for at, (positions, k, n) in enumerate(_LEAVES):
                linears += [
                    LinearInfo(
                        f"blocks.{block}.{position}", k, n, True, block, position, 5 * block + at
                    )
                    for position in positions
                ]
        return network_of(linears)

    return make


@pytest.fixture(scope="session")
def make_context(make_network: Callable[..., Network]) -> Callable[..., SearchContext]:
    """A function: search section, blocks, error of leaves `first` on -> a context and its calls."""

    def make(
        section: SearchSection,
        num_blocks: int,
        error: Callable[[Configuration, int], float],
        calls: list[Task] | None = None,
    ) -> SearchContext:
        network = make_network(num_blocks)

        def measure(tasks: Sequence[Task], _block_runs: int) -> dict[Key, float]:
            values: dict[Key, float] = {}
            for task in tasks:
                if calls is not None:
                    calls.append(task)
                whole = task.node in ("network", "final")
                first = 0 if whole else int(task.node.split()[1].split(".")[0])
                prefix = () if whole else decode(task.prefix)
                for suffix in task.suffixes:
                    values[task.node, task.prefix, suffix] = error(prefix + decode(suffix), first)
            return values

        costs = CostModel(network, section)
        return SearchContext(section, network, costs, make_budget(section, costs), measure)

    return make
