"""Measuring whole configurations after calibration.

Calibration fits every layer to what the quantized layers before it leave, so a calibrated network
errs less than one of weights that were fitted one by one, and not by the same factor for every
assignment (0.77 to 0.85 on the digits model at 3.5 bits). This step is ours.
"""

from collections.abc import Callable, Iterator

import torch

from treeq_export.model.fit_plan import fit_plan
from treeq_export.model.quantized import quantize_model
from treeq_export.model.trajectories import predict
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan
from treeq_export.search.executor import Task
from treeq_export.search.session import Session
from treeq_export.search.store import FINAL_FILE, ROWS_FILE
from treeq_export.search.tree import Configuration, decode

_MOST_ROWS = 512  # network inputs of these calibrations; fewer than those of the stage, for time


class CalibratedNetwork:
    """Calibrates whole configurations as the chosen plan will be, and measures the network's error.

    Args:
        session: The search, prepared.
        denoiser: The full-precision model, as it is when no search runs on it.
        make_plan: Returns the plan of a configuration.
    """

    NAME = "calibrated"

    def __init__(
        self, session: Session, denoiser: Denoiser, make_plan: Callable[[Configuration], Plan]
    ) -> None:
        self._denoiser = denoiser
        recipe = session.recipe
        fewer = min(recipe.calibrate.num_rows, _MOST_ROWS)
        calibrate = recipe.calibrate.without_training().model_copy(update={"num_rows": fewer})
        self._recipe = recipe.model_copy(update={"calibrate": calibrate})
        self._make_plan = make_plan
        name = FINAL_FILE if recipe.search.num_final_rows else ROWS_FILE
        self._rows, self._prediction = session.store.load_rows(name)

    def measure(self, task: Task) -> Iterator[float]:
        """Yield the mean squared error of every suffix, a whole configuration each."""
        for suffix in task.suffixes:
            plan = self._make_plan(decode(suffix))
            tensors, _ = fit_plan(self._denoiser, plan, self._recipe, lambda _: None)
            calibrated = quantize_model(self._denoiser, plan, tensors)
            found = predict(calibrated, self._rows, self._recipe.sampler.batch_size)
            yield float(torch.mean((found - self._prediction).double().square()))
