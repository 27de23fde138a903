"""What a configuration costs, and what it may cost.

Average bits are weighted by number of weights, for weights and activations alike, as the plan
states them. Size is that of the packed codes, scales and branches of all quantized layers.
"""

from dataclasses import dataclass

from treeq_export.errors import RecipeError
from treeq_export.ops import PACK_WORD
from treeq_export.quant.grids import find_grid
from treeq_export.recipe import BudgetSection, SearchSection
from treeq_export.search.network import Network
from treeq_export.search.tree import Configuration, LeafConfiguration

FLOAT_BITS = 32  # of a weight or an activation that is not quantized


@dataclass(frozen=True)
class Cost:
    """Cost of a configuration, summed over its leaves.

    Attributes:
        weight_bits: Sum over weights of the weight's bits.
        activation_bits: Sum over weights of the layer's activation bits.
        size_bytes: Packed size.
        num_weights: Number of weights.
    """

    weight_bits: int = 0
    activation_bits: int = 0
    size_bytes: int = 0
    num_weights: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.weight_bits + other.weight_bits,
            self.activation_bits + other.activation_bits,
            self.size_bytes + other.size_bytes,
            self.num_weights + other.num_weights,
        )

    @property
    def averages(self) -> dict[str, float]:
        """Average bits by the names that they have in records."""
        return {
            "weight_bits": self.average_weight_bits,
            "activation_bits": self.average_activation_bits,
        }

    @property
    def average_weight_bits(self) -> float:
        """Average bits of a weight."""
        return self.weight_bits / max(self.num_weights, 1)

    @property
    def average_activation_bits(self) -> float:
        """Average bits of an activation, weighted by number of weights."""
        return self.activation_bits / max(self.num_weights, 1)


class CostModel:
    """Costs of configurations of one network.

    Args:
        network: The searched layers and their branches.
        section: Grid and group size of the weights.
    """

    def __init__(self, network: Network, section: SearchSection) -> None:
        self.network = network
        self._group_size, self._grid = section.group_size, find_grid(section.weight_grid)
        self._known: dict[tuple[int, LeafConfiguration], Cost] = {}

    def cost(self, configuration: Configuration, first: int = 0) -> Cost:
        """Return the cost of consecutive leaves.

        Args:
            configuration: One entry per leaf.
            first: The first entry's leaf.
        """
        total = Cost()
        for offset, pair in enumerate(configuration):
            key = (first + offset, pair)
            if key not in self._known:
                self._known[key] = self._leaf_cost(*key)
            total += self._known[key]
        return total

    def _leaf_cost(self, index: int, pair: LeafConfiguration) -> Cost:
        leaf = self.network.leaves[index]
        weights = leaf.num_weights
        if pair is None:
            bits = FLOAT_BITS * weights
            return Cost(bits, bits, 4 * weights, weights)
        size = 0
        for linear in leaf.linears:
            n, k = linear.out_features, linear.in_features
            words = -(-k // PACK_WORD)
            scales = k // self._group_size if self._group_size else 1
            branch = self.network.branches.get(linear.name)
            factors = branch.num_parameters(k, n) if branch else 0
            size += self._grid.size_bytes(pair[0], n * words, n * scales) + 4 * factors
        return Cost(pair[0] * weights, (pair[1] or FLOAT_BITS) * weights, size, weights)


@dataclass(frozen=True)
class Budget:
    """The limits of a search, as totals over the network.

    Attributes:
        weight_bits: Sum over weights; None is no limit.
        activation_bits: Sum over weights of the layer's activation bits; None is no limit.
        size_bytes: Packed size; None is no limit.
        num_weights: Weights of the network.
    """

    weight_bits: float | None = None
    activation_bits: float | None = None
    size_bytes: float | None = None
    num_weights: int = 1

    def allows(self, cost: Cost) -> bool:
        """Whether a whole network's cost is within every limit."""
        return all(part <= 1 + 1e-12 for part in self.fractions(cost))

    def fractions(self, cost: Cost) -> list[float]:
        """Return what part of every limit that is set a cost takes: weights, activations, size."""
        limits = (self.weight_bits, self.activation_bits, self.size_bytes)
        spent = (cost.weight_bits, cost.activation_bits, cost.size_bytes)
        return [x / limit for limit, x in zip(limits, spent, strict=True) if limit is not None]

    def relative(self, cost: Cost) -> list[float]:
        """Return what a node spends relative to its share: for weights, then for activations.

        Args:
            cost: Cost of a node of the network.

        Returns:
            One number for each of the two that a limit stands for; 1 spends the node's share. With
            limits on both weight bits and size, the one that is closer to its limit counts.
        """
        share = cost.num_weights / self.num_weights
        scaled = [
            None if limit is None else limit * share
            for limit in (self.weight_bits, self.activation_bits, self.size_bytes)
        ]
        weights = Budget(scaled[0], None, scaled[2]).fractions(cost)
        return [*([max(weights)] if weights else []), *Budget(None, scaled[1]).fractions(cost)]


def make_budget(section: SearchSection, costs: CostModel) -> Budget:
    """Return the limits as totals, checked against what the candidates can reach.

    Args:
        section: The recipe's search section.
        costs: Costs of configurations of the network.

    Raises:
        RecipeError: No limit is set, or the cheapest candidates exceed one.
    """
    limits = section.budget or BudgetSection()
    if limits == BudgetSection():
        raise RecipeError(
            f"search.budget: missing, expected by strategy {section.strategy}. Set at least one of "
            "weight_bits, activation_bits and size_bytes."
        )
    least_pair = (min(section.weight_candidates), min(section.activation_candidates))
    least = costs.cost((least_pair,) * len(costs.network.leaves))
    for name, limit, reached in (
        ("weight_bits", limits.weight_bits, least.average_weight_bits),
        ("activation_bits", limits.activation_bits, least.average_activation_bits),
        ("size_bytes", limits.size_bytes, least.size_bytes),
    ):
        if limit is not None and reached > limit:
            raise RecipeError(
                f"search.budget.{name}: received {limit:g}, expected at least {reached:g}, which "
                "the smallest candidates need. Raise it, or add smaller candidates."
            )
    num = least.num_weights

    def total(average: float | None) -> float | None:
        return None if average is None else average * num

    return Budget(total(limits.weight_bits), total(limits.activation_bits), limits.size_bytes, num)
