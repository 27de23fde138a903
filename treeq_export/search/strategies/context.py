"""What every strategy sees: the network, the costs, the budget, and a way to measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from treeq_export.recipe import SearchSection
from treeq_export.records import SearchPoint
from treeq_export.search.budget import Budget, Cost, CostModel
from treeq_export.search.executor import Key, Task
from treeq_export.search.formats import candidate_pairs
from treeq_export.search.measure.calibrated import CalibratedNetwork
from treeq_export.search.measure.whole import FinalInputs, WholeNetwork
from treeq_export.search.network import Network
from treeq_export.search.tree import Configuration, Leaf, Pair, encode

_CHUNK = 16  # whole configurations of one task
Measure = Callable[[Sequence[Task], int], dict[Key, float]]


@dataclass(frozen=True)
class Finalist:
    """A whole configuration that may be chosen at the end.

    Attributes:
        configuration: One pair per leaf.
        network_mse: The network's error on the search's inputs.
        final_mse: The network's error on the inputs that finalists are compared on.
        calibrated_mse: Error of the calibrated network on the same; None where it was not measured.
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
        network_mse: Error of the whole network; NaN where the strategy measures nothing.
        front: Configurations measured at the root.
        kept: Number of configurations that each node kept, by the node's name.
        finalists: Configurations that may still be chosen, the present choice first.
    """

    configuration: Configuration
    network_mse: float
    front: list[SearchPoint] = field(default_factory=list[SearchPoint])
    kept: dict[str, int] = field(default_factory=dict[str, int])
    finalists: list[Finalist] = field(default_factory=list[Finalist])


def _measure_nothing(_tasks: Sequence[Task], _block_runs: int) -> dict[Key, float]:
    raise NotImplementedError("this strategy was said to measure nothing")


@dataclass(frozen=True)
class SearchContext:
    """Inputs of a strategy. One that measures nothing needs neither `budget` nor `measure`.

    Attributes:
        section: The recipe's search section.
        network: The layers to choose formats for.
        costs: Costs of configurations.
        budget: The limits.
        measure: Measures tasks (executor.measure_all); the second argument is how many block
            evaluations the tasks take, for the estimate.
    """

    section: SearchSection
    network: Network
    costs: CostModel
    budget: Budget = field(default_factory=Budget)
    measure: Measure = _measure_nothing

    @property
    def leaves(self) -> Sequence[Leaf]:
        """All leaves, in execution order."""
        return self.network.leaves

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
            base: A configuration that most of them start like: blocks that do not differ are not
                run again. The empty one stands for full precision. Values depend on it by rounding
                only.
        """
        return self._measure_whole(WholeNetwork.NAME, base, configurations)

    def measure_final(self, configurations: Sequence[Configuration]) -> list[float]:
        """Return the network's error on the inputs that finalists are compared on.

        Few configurations are measured on them, so that the best of them is hardly flattered.
        """
        if self.section.num_final_rows == 0:
            return self.measure_network(configurations)
        return self._measure_whole(FinalInputs.NAME, (), configurations)

    def _measure_whole(
        self, node: str, base: Configuration, configurations: Sequence[Configuration]
    ) -> list[float]:
        prefix = encode(base)
        texts = [encode(configuration) for configuration in configurations]
        chunks = [tuple(texts[at : at + _CHUNK]) for at in range(0, len(texts), _CHUNK)]
        tasks = [Task(node, prefix, chunk) for chunk in chunks]
        values = self.measure(tasks, len(set(texts)) * len(self.network.blocks))
        return [values[node, prefix, text] for text in texts]

    def allows(self, configuration: Configuration) -> bool:
        """Whether a whole configuration is within the budget."""
        return self.budget.allows(self.costs.cost(configuration))

    def costs_of(self, options: Sequence[Sequence[Pair]]) -> list[list[Cost]]:
        """Return the cost of every option of every leaf."""
        return [
            [self.costs.cost((pair,), leaf) for pair in row] for leaf, row in enumerate(options)
        ]

    def make_point(
        self, configuration: Configuration, mse: float, *, kept: bool, chosen: bool
    ) -> SearchPoint:
        """Return a measured whole configuration as the record holds it."""
        cost = self.costs.cost(configuration)
        return SearchPoint(
            **cost.averages,
            size_bytes=cost.size_bytes,
            mse=mse,
            kept=kept,
            chosen=chosen,
        )

    def choose_instead(
        self, outcome: Outcome, best: Finalist, finalists: list[Finalist]
    ) -> Outcome:
        """Return the outcome with another choice.

        Args:
            outcome: The outcome before.
            best: The new choice.
            finalists: Configurations that may still be chosen.
        """
        front = [point.model_copy(update={"chosen": False}) for point in outcome.front]
        mse = best.network_mse
        front.append(self.make_point(best.configuration, mse, kept=True, chosen=True))
        return Outcome(best.configuration, mse, front, outcome.kept, finalists)

    def choose_calibrated(self, outcome: Outcome) -> Outcome:
        """Return the outcome with the finalist of least error once all are calibrated."""
        texts = tuple(encode(finalist.configuration) for finalist in outcome.finalists)
        node = CalibratedNetwork.NAME
        values = self.measure([Task(node, "", texts)], len(texts) * len(self.network.blocks))
        finalists = [
            replace(finalist, calibrated_mse=values[node, "", text])
            for finalist, text in zip(outcome.finalists, texts, strict=True)
        ]
        best = min(finalists, key=lambda x: (x.calibrated_mse, encode(x.configuration)))
        if best.configuration == outcome.configuration:
            return replace(outcome, finalists=finalists)
        return self.choose_instead(outcome, best, finalists)
