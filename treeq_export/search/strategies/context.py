"""What every strategy sees: the tree, the costs, the budget, and a way to measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treeq_export.recipe import SearchSection
from treeq_export.records import SearchPoint
from treeq_export.search.budget import Budget, Cost, CostModel
from treeq_export.search.executor import Key, Task
from treeq_export.search.formats import Pair, candidate_pairs
from treeq_export.search.measure.segment import FINAL, NETWORK
from treeq_export.search.tree import Configuration, Leaf, Node, encode

_CHUNK = 16  # whole configurations of one task


@dataclass(frozen=True)
class SearchContext:
    """Inputs of a strategy.

    Attributes:
        section: The recipe's search section.
        leaves: All leaves, in execution order.
        root: Their tree.
        num_blocks: Blocks of the whole network, searched or not.
        costs: Costs of configurations.
        budget: The limits.
        measure: Measures tasks (executor.measure_all); the second argument is how many block
            evaluations the tasks take, for the estimate.
    """

    section: SearchSection
    leaves: list[Leaf]
    root: Node
    num_blocks: int
    costs: CostModel
    budget: Budget
    measure: Callable[[Sequence[Task], int], dict[Key, float]]

    @property
    def candidates(self) -> list[Pair]:
        """The candidates of a leaf, ascending in weight bits, then activation bits."""
        return candidate_pairs(self.section)

    def measure_network(
        self, configurations: Sequence[Configuration], base: Configuration = ()
    ) -> list[float]:
        """Return the error of the network's prediction for whole configurations.

        Args:
            configurations: One entry per leaf each.
            base: What most of them start like: blocks that do not differ are not run again. The
                empty one stands for full precision. Values depend on it by rounding only.
        """
        return self._measure_whole(NETWORK, base, configurations)

    def measure_final(self, configurations: Sequence[Configuration]) -> list[float]:
        """Return the network's error on the inputs that finalists are compared on.

        Few configurations are measured on them, so that the best of them is hardly flattered.
        """
        if self.section.num_final_rows == 0:
            return self.measure_network(configurations)
        return self._measure_whole(FINAL, (), configurations)

    def _measure_whole(
        self, node: str, base: Configuration, configurations: Sequence[Configuration]
    ) -> list[float]:
        prefix = encode(base)
        texts = [encode(configuration) for configuration in configurations]
        chunks = [tuple(texts[at : at + _CHUNK]) for at in range(0, len(texts), _CHUNK)]
        tasks = [Task(node, prefix, chunk) for chunk in chunks]
        values = self.measure(tasks, len(set(texts)) * self.num_blocks)
        return [values[node, prefix, text] for text in texts]

    def allows(self, configuration: Configuration) -> bool:
        """Whether a whole configuration is within the budget."""
        return self.budget.allows(self.costs.cost(configuration))


@dataclass(frozen=True)
class Finalist:
    """A whole configuration that may be chosen at the end.

    Attributes:
        configuration: One pair per leaf.
        network_mse: Its error on the search's inputs.
        final_mse: Its error on the inputs that finalists are compared on.
        calibrated_mse: That of the calibrated network on the same; None where it was not measured.
    """

    configuration: Configuration
    network_mse: float
    final_mse: float
    calibrated_mse: float | None = None


@dataclass
class Outcome:
    """What a strategy found.

    Attributes:
        configuration: The chosen one.
        network_mse: Its error on the whole network.
        front: Configurations measured at the root.
        kept: How many configurations each node kept, by the node's name.
        finalists: What may still be chosen, the present choice first.
    """

    configuration: Configuration
    network_mse: float
    front: list[SearchPoint] = field(default_factory=list[SearchPoint])
    kept: dict[str, int] = field(default_factory=dict[str, int])
    finalists: list[Finalist] = field(default_factory=list[Finalist])


def make_point(cost: Cost, mse: float, *, kept: bool, chosen: bool) -> SearchPoint:
    """Return a measured configuration as the record holds it."""
    return SearchPoint(
        weight_bits=cost.average_weight_bits,
        activation_bits=cost.average_activation_bits,
        size_bytes=cost.size_bytes,
        mse=mse,
        kept=kept,
        chosen=chosen,
    )
