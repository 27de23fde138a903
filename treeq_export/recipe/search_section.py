"""The section `search` of a recipe."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from treeq_export.quant.grids import INTEGER
from treeq_export.quant.spec import Bits, BranchFormat, GridName, check_width
from treeq_export.recipe.fields import (
    MAX_COUNT,
    AverageBits,
    Axis,
    NonNegative,
    Positive,
    Section,
    Threads,
)


class BudgetSection(Section):
    """What a searched assignment may cost. Every limit that is set has to hold.

    Attributes:
        weight_bits: Largest average of weight bits, weighted by number of weights.
        activation_bits: Largest average of activation bits, weighted by number of weights.
        size_bytes: Largest size of packed codes, scales and branches of all quantized layers.
    """

    weight_bits: AverageBits | None = None
    activation_bits: AverageBits | None = None
    size_bytes: Annotated[int, Field(ge=1, le=1 << 60)] | None = None


class BranchBudget(Section):
    """Let the search choose each layer's branch among Monarch shapes of equal parameters.

    Attributes:
        parameter_fraction: Largest ratio of a branch's parameters to its layer's weights.
        grids: Largest number of blocks along each axis. Candidates are the powers of two up to it.
    """

    parameter_fraction: Annotated[float, Field(gt=0, lt=1, strict=False)]
    grids: Axis = 8


class SearchSection(Section):
    """Which formats the layers get.

    Attributes:
        strategy: "uniform" gives every layer the same formats; "tss" is TreeQ's tree-structured
            search; "integer_programming" and "greedy" are baselines of the search.
        weight_bits: Weight bits of strategy "uniform" without a budget.
        activation_bits: Activation bits of strategy "uniform" without a budget. null keeps
            activations in floating point.
        budget: Limits of the assignment's cost. "uniform" spreads two neighbouring widths evenly.
        weight_candidates: Weight bits that the search may choose from.
        activation_candidates: Activation bits that the search may choose from. Weight and
            activation candidates make at most 16 pairs.
        noise: Environmental Noise Guidance, lambda in 0..1. 1 measures every segment on inputs that
            the quantized layers before it leave (for PTQ), 0 on clean inputs (before training).
        keep: Configurations that a node keeps.
        num_samples: Trajectories from which inputs are taken.
        num_rows: Network inputs (sample and timestep) on which every configuration is measured.
        num_final_rows: Inputs of other trajectories on which "tss" compares its finalists. 0
            compares them on the inputs of all other measurements.
        calibrated_finalists: Number of finalists that are calibrated before the last choice. 0
            chooses without calibration, which saves hours for large models.
        num_probes: Random directions of the prediction along which a segment's error is measured
            (model/sensitivity.py). 0 takes the mean squared error of the segment's output, as TreeQ
            does.
        refine: Least relative gain for which bits are exchanged between leaves at the end, measured
            on the whole network. null exchanges none.
        executor: "local" measures in this process, "ray" in several processes or machines.
        num_workers: Number of Ray workers.
        threads: PyTorch threads of each process. Another number may round differently.
        activation_scale: Scale of activations. "auto" is token_rms below 7 bits and token_absmax
            from 7 bits on.
        weight_grid: Number grid of the weights.
        activation_grid: Number grid of the activations.
        group_size: Input channels that share a weight scale. null is one scale per output channel.
        rotation_group: Size of the Hadamard blocks. "auto" is, for each layer, the largest power of
            two up to 128 that divides its in_features. A number has to divide the in_features of
            every layer.
        branch: Shape of the Monarch branch. null is no branch.
        branch_budget: Limit under which each layer's branch is chosen by measured output error,
            instead of one shape for all.
        exclude: Glob patterns of the layers that stay in floating point.
    """

    strategy: Literal["uniform", "tss", "integer_programming", "greedy"] = "uniform"
    weight_bits: Bits = 4
    activation_bits: Bits | None = 4
    budget: BudgetSection | None = None
    weight_candidates: Annotated[list[Bits], Field(min_length=1)] = [2, 3, 4, 6]
    activation_candidates: Annotated[list[Bits], Field(min_length=1)] = [2, 3, 4, 6]
    noise: Annotated[float, Field(ge=0, le=1, strict=False)] = 1.0
    keep: Annotated[int, Field(ge=2, le=MAX_COUNT)] = 16
    num_samples: Positive = 32
    num_rows: Positive = 128
    num_final_rows: NonNegative = 256
    calibrated_finalists: NonNegative = 4
    num_probes: NonNegative = 16
    refine: Annotated[float, Field(ge=0, lt=1, strict=False)] | None = 1e-3
    executor: Literal["local", "ray"] = "local"
    num_workers: Threads = 2
    threads: Threads = 1
    activation_scale: Literal["auto", "token_rms", "token_absmax", "tensor_static"] = "auto"
    weight_grid: GridName = INTEGER.name
    activation_grid: GridName = INTEGER.name
    group_size: Positive | None = None
    rotation_group: Positive | Literal["auto"] = "auto"
    branch: BranchFormat | None = BranchFormat(b_in=1, b_out=1, rank=8)
    branch_budget: BranchBudget | None = None
    exclude: list[str] = []

    @model_validator(mode="after")
    def _grids_have_the_widths(self) -> Self:
        weights: list[int | None] = [*self.weight_candidates]
        activations: list[int | None] = [*self.activation_candidates]
        if self.strategy == "uniform":
            weights, activations = [self.weight_bits], [self.activation_bits]
        for grid, widths in ((self.weight_grid, weights), (self.activation_grid, activations)):
            for bits in widths:
                check_width(grid, bits)
        return self


def strategy_options(section: SearchSection) -> dict[str, Any]:
    """Return what a plan records of the search: all that can change it, not where it ran."""
    return section.model_dump(mode="json", exclude={"executor", "num_workers"})
