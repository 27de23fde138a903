"""The calibrate stage: fill a plan with codes, scales, biases and branch factors.

Trajectories are sampled from the full-precision model; each planned layer's rotated input is
summarised along them (model/statistics.py). Then each layer is fitted (model/fit.py): to these
clean inputs, or in execution order to what the quantized layers before it leave of them
(model/sequential.py), where the rounding of a block may be trained as well
(model/reconstruct.py).

The statistics go to `calibration.json`: a kurtosis near 3 says that the rotated tokens are close
to the Gaussian for which the token_rms step is optimal.
"""

from pathlib import Path

from treeq_export.artefacts import write_json
from treeq_export.model.fit_plan import fit_plan
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, save_plan
from treeq_export.progress import OnStep
from treeq_export.recipe import Recipe
from treeq_export.run_folder import RunFolder


def run_calibrate(
    run: Path, denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: OnStep
) -> Plan:
    """Fill the plan and write `plan.safetensors`, `plan.json` and `calibration.json`.

    Args:
        run: The run folder.
        denoiser: The full-precision model.
        plan: The plan that search wrote.
        recipe: The recipe.
        on_step: Called with the fraction done, 0..1.

    Returns:
        The plan as written, with the digest of its tensors.

    Raises:
        PlanError: The plan does not fit the model.
        OutputError: The folder cannot be written to.
    """
    tensors, statistics = fit_plan(denoiser, plan, recipe, on_step)
    write_json(
        run / RunFolder.CALIBRATION,
        {
            "conditioning": denoiser.conditioning_source,
            "num_samples": recipe.calibrate.num_samples,
            "seed": recipe.seed,
            "layers": {name: entry.summary() for name, entry in statistics.items()},
        },
    )
    return save_plan(run, plan, tensors)
