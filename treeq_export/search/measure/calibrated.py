"""The last choice: finalists are calibrated, as the chosen plan will be, and compared.

Calibration fits every layer to what the quantized layers before it leave, so a calibrated network
errs less than one of weights that were fitted one by one, and not by the same factor for every
assignment (0.77 to 0.85 on the digits model at 3.5 bits). This step is ours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from treeq_export.model.fit_plan import fit_plan
from treeq_export.model.quantized import quantize_model
from treeq_export.model.trajectories import Rows, predict
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.recipe import Recipe
from treeq_export.search.executor import Task
from treeq_export.search.strategies.context import Finalist, Outcome, SearchContext, make_point
from treeq_export.search.tree import Configuration, decode, encode

CALIBRATED = "calibrated"
_MOST_ROWS = 512  # network inputs of these calibrations; fewer than those of the stage, for time


class CalibratingWorker:
    """Calibrates whole configurations and measures the network's error.

    Args:
        denoiser: The full-precision model, as it is when no search runs on it.
        recipe: How to calibrate.
        make_plan: Returns the plan of a configuration.
        rows: Inputs to measure on.
        prediction: Full precision's answers to them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        recipe: Recipe,
        make_plan: Callable[[Configuration], Plan],
        rows: Rows,
        prediction: Tensor,
    ) -> None:
        self._denoiser = denoiser
        fewer = min(recipe.calibrate.num_rows, _MOST_ROWS)
        calibrate = recipe.calibrate.without_training().model_copy(update={"num_rows": fewer})
        self._recipe = recipe.model_copy(update={"calibrate": calibrate})
        self._make_plan = make_plan
        self._rows, self._prediction = rows, prediction

    def measure(self, task: Task) -> Iterator[float]:
        """Yield the mean squared error of every suffix, a whole configuration each."""
        for suffix in task.suffixes:
            plan = self._make_plan(decode(suffix))
            tensors, _ = fit_plan(self._denoiser, plan, self._recipe, lambda _: None)
            calibrated = quantize_model(self._denoiser, plan, tensors)
            found = predict(calibrated, self._rows, self._recipe.sampler.batch_size)
            yield float(torch.mean((found - self._prediction).double().square()))


def calibration_task(finalists: Sequence[Finalist]) -> Task:
    """Return what a `CalibratingWorker` has to measure."""
    return Task(CALIBRATED, "", tuple(encode(finalist.configuration) for finalist in finalists))


def choose_calibrated(
    context: SearchContext, outcome: Outcome, values: dict[Any, float], task: Task
) -> Outcome:
    """Return the outcome with the finalist of least calibrated error.

    Args:
        context: The search's inputs.
        outcome: With its finalists.
        values: Their errors, by key.
        task: Of `calibration_task`.
    """
    finalists = [
        replace(finalist, calibrated_mse=values[task.node, task.prefix, suffix])
        for finalist, suffix in zip(outcome.finalists, task.suffixes, strict=True)
    ]
    best = min(finalists, key=lambda x: (x.calibrated_mse, encode(x.configuration)))
    if best.configuration == outcome.configuration:
        return replace(outcome, finalists=finalists)
    front = [point.model_copy(update={"chosen": False}) for point in outcome.front]
    cost = context.costs.cost(best.configuration)
    front.append(make_point(cost, best.network_mse, kept=True, chosen=True))
    return replace(
        outcome,
        configuration=best.configuration,
        network_mse=best.network_mse,
        front=front,
        finalists=finalists,
    )
