"""Choosing each layer's branch among Monarch shapes of equal parameters.

A shape is a grid of b_out x b_in blocks of rank r with r (N b_in + K b_out) parameters; plain low
rank (1, 1, r) and plain Monarch (b, b, r) are among them. For every grid the largest rank within
the parameter budget is taken, the layer is quantized with it, and the shape of least output error
on calibration inputs wins:

    error = |X W^T - (Q(X H) Q_w^T + X M^T)|^2 / |X W^T|^2

Every second kept token is fitted to and decides; the others say whether the choice holds.

TreeQ publishes the branch; this way of choosing its shape is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeq_export.model.fit import quantize_layer
from treeq_export.model.quantized import linear_of
from treeq_export.model.statistics import InputStatistics
from treeq_export.model.zoo import Denoiser
from treeq_export.ops import MAX_BITS
from treeq_export.plan import LayerPlan, Tensors
from treeq_export.progress import OnStep
from treeq_export.quant.branch import apply_branch
from treeq_export.quant.numerics import qlinear
from treeq_export.quant.rotation import rotate
from treeq_export.quant.spec import BranchFormat
from treeq_export.recipe import (
    BranchBudget,
    BudgetSection,
    CalibrateSection,
    Recipe,
    SearchSection,
)
from treeq_export.search.formats import assign
from treeq_export.search.network import Network

_MOST_TOKENS = 1024  # that are fitted to, and as many that are held out


@dataclass(frozen=True)
class BranchTrial:
    """One shape that was tried for a layer.

    Attributes:
        branch: The shape.
        num_parameters: Parameters of both factors.
        error: Relative squared error of the layer's output, on the tokens it was fitted to.
        held_out_error: The same on other tokens.
    """

    branch: BranchFormat
    num_parameters: int
    error: float
    held_out_error: float

    def describe(self) -> dict[str, Any]:
        """Return the trial as the record holds it."""
        numbers = asdict(self)
        return numbers.pop("branch").model_dump() | numbers


def branch_candidates(
    in_features: int, out_features: int, budget: BranchBudget
) -> list[BranchFormat]:
    """Return the shapes within the budget, low rank first; none where not even rank 1 fits.

    Args:
        in_features: Number K of input features.
        out_features: Number N of output features.
        budget: Fraction of the N K weights, and the largest grid.

    >>> budget = BranchBudget(parameter_fraction=0.125, grids=2)
    >>> [(c.b_in, c.b_out, c.rank) for c in branch_candidates(128, 128, budget)]
    [(1, 1, 8), (1, 2, 5), (2, 1, 5), (2, 2, 4)]
    """
    limit = int(budget.parameter_fraction * in_features * out_features)
    sizes = [1 << power for power in range(budget.grids.bit_length()) if 1 << power <= budget.grids]
    found: list[BranchFormat] = []
    for b_in in sizes:
        for b_out in sizes:
            if in_features % b_in or out_features % b_out:
                continue
            rank = limit // (out_features * b_in + in_features * b_out)
            rank = min(rank, in_features // b_in, out_features // b_out)
            if rank:
                found.append(BranchFormat(b_in=b_in, b_out=b_out, rank=rank))
    return found


def _output_error(
    layer: LayerPlan, weight: NDArray[np.floating], tensors: Tensors, x: NDArray[np.floating]
) -> float:
    """Return the relative squared error of a quantized layer's output for x (n, K), not rotated."""
    step = tensors.get("activation_step")
    y_hat = qlinear(
        x,
        tensors["codes"],
        tensors["weight_scale"],
        activation=layer.activation,
        step=None if step is None else float(step[0]),
        rotation_group=layer.rotation_group,
    )
    if layer.branch is not None:
        y_hat = y_hat + apply_branch(x, tensors["branch.R"], tensors["branch.L"])
    y = x @ weight.T
    error, signal = (np.square(v, dtype=np.float64).sum() for v in (y - y_hat, y))
    return float(error / max(signal, 1e-300))


def _try_branches(
    layer: LayerPlan,
    weight: NDArray[np.floating],
    statistics: InputStatistics,
    section: CalibrateSection,
    budget: BranchBudget,
) -> list[BranchTrial]:
    """Measure every shape on one layer, in its formats; the shape of least error comes first."""
    kept = np.concatenate(statistics.kept)
    kept = kept[:: max(1, len(kept) // (2 * _MOST_TOKENS))]
    fitted, held_out = kept[::2], kept[1::2]
    own = InputStatistics(kept=[fitted])
    # Shapes are compared by what they do to the weight, before anything makes up for it.
    plain = section.model_copy(
        update={"inputs": "full_precision", "bias_correction": False, "step": "gaussian"}
    )
    trials: list[BranchTrial] = []
    for branch in branch_candidates(layer.in_features, layer.out_features, budget):
        tried = layer.model_copy(update={"branch": branch})
        tensors = quantize_layer(tried, weight, own, plain)
        errors = [
            # The rotation is its own inverse.
            _output_error(tried, weight, tensors, rotate(tokens, layer.rotation_group))
            for tokens in (fitted, held_out)
        ]
        number = branch.num_parameters(layer.in_features, layer.out_features)
        trials.append(BranchTrial(branch, number, *errors))
    return sorted(trials, key=lambda trial: trial.error)


def choose_branches(
    denoiser: Denoiser,
    network: Network,
    recipe: Recipe,
    statistics: Callable[[], Mapping[str, InputStatistics]],
    on_step: OnStep,
) -> tuple[dict[str, BranchFormat], dict[str, list[BranchTrial]]]:
    """Return every layer's branch, and the trials that it was chosen from.

    Args:
        denoiser: The full-precision model.
        network: The searched layers, without branches.
        recipe: The branch, or the budget within which shapes are tried at the nominal bits.
        statistics: Returns every layer's rotated input; called only if shapes are tried.
        on_step: Called with the fraction done, 0..1.

    Returns:
        Branches by layer, and trials by layer, that of least error first. Layers without a branch
        are missing, such as those too small for rank 1.
    """
    section = recipe.search
    if section.branch_budget is None:
        fixed = section.branch
        return {x.name: fixed for x in network.linears if fixed is not None}, {}
    layers = assign(network, (nominal_bits(section),) * len(network.leaves), section)
    found: dict[str, list[BranchTrial]] = {}
    inputs = statistics()
    for done, layer in enumerate(layers, start=1):
        weight = linear_of(denoiser, layer).weight.detach().numpy()
        found[layer.name] = _try_branches(
            layer, weight, inputs[layer.name], recipe.calibrate, section.branch_budget
        )
        on_step(done / len(layers))
    found = {name: trials for name, trials in found.items() if trials}
    return {name: trials[0].branch for name, trials in found.items()}, found


def nominal_bits(section: SearchSection) -> tuple[int, int]:
    """Return the bits that branch shapes are tried at: the budget's, to the nearest."""
    limits = section.budget or BudgetSection()
    weight = limits.weight_bits or section.weight_bits
    activation = limits.activation_bits or section.activation_bits or MAX_BITS
    return round(weight), round(activation)
