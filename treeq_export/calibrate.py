"""The calibrate stage: fill a plan with codes, scales and branch factors.

Each planned layer's rotated input is summarised along trajectories of the full-precision model
(model/statistics.py); then each layer is fitted (model/fit.py).

The statistics go to `calibration.json`: a kurtosis near 3 says that the rotated tokens are close
to the Gaussian for which the token_rms step is optimal.
"""

from collections.abc import Callable
from pathlib import Path

from treeq_export.artefacts import write_json
from treeq_export.model.fit import quantize_layer
from treeq_export.model.quantized import linear_of
from treeq_export.model.statistics import collect_statistics
from treeq_export.model.zoo import Denoiser
from treeq_export.plan import Plan, Tensors, save_plan
from treeq_export.recipe import Recipe

STATISTICS_FILE = "calibration.json"


def run_calibrate(
    run: Path, denoiser: Denoiser, plan: Plan, recipe: Recipe, on_step: Callable[[float], None]
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
    statistics = collect_statistics(denoiser, plan.layers, recipe, lambda part: on_step(0.7 * part))
    tensors: Tensors = {}
    for done, layer in enumerate(plan.layers, start=1):
        weight = linear_of(denoiser, layer).weight.detach().numpy()
        short = quantize_layer(layer, weight, statistics[layer.name], recipe.calibrate)
        tensors |= {f"{layer.name}.{name}": value for name, value in short.items()}
        on_step(0.7 + 0.3 * done / len(plan.layers))
    write_json(
        run / STATISTICS_FILE,
        {
            "conditioning": denoiser.conditioning_source,
            "num_samples": recipe.calibrate.num_samples,
            "seed": recipe.seed,
            "layers": {name: entry.summary() for name, entry in statistics.items()},
        },
    )
    return save_plan(run, plan, tensors)
